"""Class shares from any segmentation model or detector: twelve families, any classes, names in place."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d, one_hot

from modeling_difnet.pipeline_difnet import (
    hash_of_parameters,
    load_grid_backbone,
    load_segmenter,
    segmentation_provenance_of,
)
from modeling_difnet.segmentation_difnet import CLASS_NAMES, PanopticSegmenter
from modeling_difnet.segmentation_models_difnet import SegmentationModel, class_shares, kind_of, match_classes

SIZE = {"height": 64, "width": 64}
CLASSES = {0: "wall", 1: "building", 2: "sky", 3: "floor, flooring", 4: "tree"}
STAGES = [f"stage{number}" for number in range(1, 5)]
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 2,
    "encoder_attention_heads": 8,
    "num_queries": 20,
}
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 64,
    "patch_size": 16,
}


def swin() -> transformers.SwinConfig:
    return transformers.SwinConfig(embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 2, 2], out_features=STAGES)


def resnet() -> transformers.ResNetConfig:
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1] * 4, out_features=STAGES
    )


def maskformer() -> tuple:
    config = transformers.MaskFormerConfig(
        backbone_config=swin(),
        decoder_config=transformers.DetrConfig(**DETR),
        fpn_feature_size=32,
        mask_feature_size=32,
        id2label=CLASSES,
    )
    processor = transformers.MaskFormerImageProcessor(size=SIZE, ignore_index=255)
    return transformers.MaskFormerForInstanceSegmentation(config), processor


def mask2former() -> tuple:
    config = transformers.Mask2FormerConfig(
        backbone_config=swin(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=1,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=20,
        id2label=CLASSES,
    )
    processor = transformers.Mask2FormerImageProcessor(size=SIZE, ignore_index=255)
    return transformers.Mask2FormerForUniversalSegmentation(config), processor


def eomt() -> tuple:
    config = transformers.EomtConfig(**{**VIT, "hidden_size": 32}, num_blocks=1, num_queries=20, id2label=CLASSES)
    processor = transformers.EomtImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 64}, do_pad=True, do_split_image=False
    )
    return transformers.EomtForUniversalSegmentation(config), processor


def eomt_in_parts() -> tuple:
    """A semantic checkpoint."""
    model, _ = eomt()
    processor = transformers.EomtImageProcessor(
        size={"shortest_edge": 64, "longest_edge": None}, do_pad=False, do_split_image=True
    )
    return model, processor


def detr_masks() -> tuple:
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=resnet(), use_pretrained_backbone=False, id2label=CLASSES, **DETR
    )
    return transformers.DetrForSegmentation(config), transformers.DetrImageProcessor(size=SIZE)


def detr_boxes() -> tuple:
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=resnet(), use_pretrained_backbone=False, id2label=CLASSES, **DETR
    )
    return transformers.DetrForObjectDetection(config), transformers.DetrImageProcessor(size=SIZE)


def yolos() -> tuple:
    config = transformers.YolosConfig(
        **{**VIT, "image_size": [64, 64]}, num_detection_tokens=10, id2label=CLASSES, use_mid_position_embeddings=False
    )
    return transformers.YolosForObjectDetection(config), transformers.YolosImageProcessor(size=SIZE, do_pad=False)


def segformer() -> tuple:
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 12, 16, 24],
        depths=[1] * 4,
        num_attention_heads=[1, 2, 2, 2],
        decoder_hidden_size=16,
        id2label=CLASSES,
    )
    return transformers.SegformerForSemanticSegmentation(config), transformers.SegformerImageProcessor(size=SIZE)


def beit() -> tuple:
    config = transformers.BeitConfig(**VIT, out_indices=[1, 2, 3, 4], id2label=CLASSES)
    return transformers.BeitForSemanticSegmentation(config), transformers.BeitImageProcessor(size=SIZE)


def mobilenet_v2() -> tuple:
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=64, id2label=CLASSES)
    processor = transformers.MobileNetV2ImageProcessor(size=SIZE, do_center_crop=False)
    return transformers.MobileNetV2ForSemanticSegmentation(config), processor


def mobilevit() -> tuple:
    sizes = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "num_attention_heads": 2}
    config = transformers.MobileViTConfig(**sizes, id2label=CLASSES)
    processor = transformers.MobileViTImageProcessor(size={"shortest_edge": 80}, crop_size=SIZE, do_center_crop=True)
    return transformers.MobileViTForSemanticSegmentation(config), processor


def upernet() -> tuple:
    config = transformers.UperNetConfig(
        backbone_config=swin(), hidden_size=16, auxiliary_in_channels=64, auxiliary_channels=8, id2label=CLASSES
    )
    return transformers.UperNetForSemanticSegmentation(config), transformers.SegformerImageProcessor(size=SIZE)


def dpt() -> tuple:
    config = transformers.DPTConfig(
        **VIT,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        id2label=CLASSES,
    )
    return transformers.DPTForSemanticSegmentation(config), transformers.DPTImageProcessor(size=SIZE)


FAMILIES = [
    maskformer, mask2former, eomt, eomt_in_parts, detr_masks, detr_boxes, yolos, segformer, beit, mobilenet_v2,
    mobilevit, upernet, dpt,
]  # fmt: skip


@pytest.fixture(params=FAMILIES, ids=lambda make: make.__name__)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    # With these seeds some of the random masks pass the processors' thresholds.
    torch.manual_seed({maskformer: 2, eomt: 9}.get(request.param, 0))
    model, processor = request.param()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("class_predictor", "class_labels_classifier", "class_embed")):
                parameter *= 100  # fresh weights are undecided, and processors drop undecided queries
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def noise(width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_shares_of_every_family(folder: Path) -> None:
    segmenter = SegmentationModel.from_pretrained(str(folder), grid_size=3, score_threshold=0.1)
    assert segmenter.class_names == tuple(CLASSES.values())
    shares = segmenter(noise())
    assert shares.shape == (5, 3, 3)
    assert shares.dtype == np.float32
    assert shares.min() >= 0
    assert shares.sum(0).max() <= 1 + 1e-6
    assert shares.sum() > 0
    labels = segmenter.label_map(noise())
    assert labels.shape == (60, 90)
    assert set(np.unique(labels)) <= {-1, 0, 1, 2, 3, 4}


def test_the_same_classes_in_another_order_are_matched_by_name(folder: Path) -> None:
    names = list(CLASSES.values())[::-1]
    plain = SegmentationModel.from_pretrained(str(folder), score_threshold=0.1)
    reordered = SegmentationModel.from_pretrained(str(folder), class_names=names, score_threshold=0.1)
    np.testing.assert_array_equal(reordered(noise()), plain(noise())[::-1])


def test_semantic_labels_are_the_models_own() -> None:
    """Against the class that the upsampled logits favour."""
    torch.manual_seed(0)
    model, processor = segformer()
    segmenter = SegmentationModel(model, processor, "semantic", grid_size=2)
    with torch.no_grad():
        logits = model.eval()(**processor(noise(), return_tensors="pt")).logits
    labels = torch.nn.functional.interpolate(logits, size=(60, 90), mode="bilinear", align_corners=False).argmax(1)[0]
    np.testing.assert_array_equal(segmenter.label_map(noise()), labels.numpy())


def test_the_whole_image_is_seen() -> None:
    """What changes at the left edge alone changes there, though the processor would crop it away."""
    torch.manual_seed(0)
    model, processor = mobilevit()
    seen = []

    def show(module: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
        seen.append(keywords["pixel_values"])

    model.register_forward_pre_hook(show, with_kwargs=True)
    segmenter = SegmentationModel(model, processor, "semantic")
    image = noise(120, 60)
    segmenter(image)
    edge = np.asarray(image).copy()
    edge[:, :15] = 0
    segmenter(Image.fromarray(edge))
    assert seen[0].shape == (1, 3, 80, 160)
    changed = (seen[0] != seen[1]).any(dim=(0, 1, 2))
    assert changed[:15].all()
    assert not changed[40:].any()


def test_the_surest_box_is_on_top() -> None:
    segmenter = SegmentationModel(*detr_boxes(), "boxes")
    found = {
        "scores": torch.tensor([0.9, 0.6]),
        "labels": torch.tensor([2, 4]),
        "boxes": torch.tensor([[0.0, 0.0, 4.0, 2.0], [2.0, -1.0, 9.0, 4.0]]),
    }
    labels = segmenter._fill_boxes(found, 4, 8)
    assert labels.tolist() == [[2, 2, 2, 2, 4, 4, 4, 4]] * 2 + [[-1, -1, 4, 4, 4, 4, 4, 4]] * 2


@pytest.mark.parametrize("size", [(60, 90), (7, 7), (3, 5)])
def test_shares_equal_the_pooled_bit_maps(size: tuple[int, int]) -> None:
    labels = np.random.default_rng(1).integers(-1, 6, size)
    bit_maps = one_hot(torch.from_numpy(labels) + 1, 7)[..., 1:].permute(2, 0, 1).double()
    np.testing.assert_allclose(class_shares(labels, 6, 7), adaptive_avg_pool2d(bit_maps, 7), atol=1e-6)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["wall", "building", "sky", "floor, flooring", "plant"], "5 classes, the captioner 5: it lacks 'plant'"),
        (["wall", "building"], "5 classes, the captioner 2: 'sky' is none of the captioner's"),
    ],
)
def test_other_classes_are_refused_by_the_first_difference(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_classes(CLASSES, names)


def test_models_of_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="vit: ViTForImageClassification: neither a segmentation model"):
        kind_of(["ViTForImageClassification"], "vit")


@pytest.mark.parametrize(
    ("names", "message"),
    [({0: "LABEL_0", 1: "LABEL_1"}, "have no names"), ({0: "sky", 1: "Sky"}, "names the class 'Sky' twice")],
)
def test_classes_without_names_of_their_own_are_refused(names: dict[int, str], message: str) -> None:
    model, processor = segformer()
    model.config.id2label = names
    with pytest.raises(ValueError, match=message):
        SegmentationModel(model, processor, "semantic")


# Which of the two kinds of segmenter a name gives


def save(parts: tuple, folder: Path) -> str:
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def test_a_coco_panoptic_model_gives_the_originals_channels(tmp_path: Path) -> None:
    """As before, unless a captioner has the classes in another order."""
    untrained = load_segmenter(None, untrained=True)
    name = save((untrained.model, untrained.processor), tmp_path)
    expected = untrained(noise())
    assert expected.any()
    for class_names in (None, CLASS_NAMES, [name.title() for name in CLASS_NAMES]):
        segmenter = load_segmenter(name, class_names=class_names)
        assert isinstance(segmenter, PanopticSegmenter)
        assert segmenter.class_names == CLASS_NAMES
        np.testing.assert_array_equal(segmenter(noise()), expected)
    reordered = load_segmenter(name, class_names=CLASS_NAMES[::-1])
    assert isinstance(reordered, SegmentationModel)
    np.testing.assert_array_equal(reordered(noise()), expected[::-1])


def test_any_other_model_gives_its_own_classes(folder: Path) -> None:
    segmenter = load_segmenter(str(folder), grid_size=2)
    assert isinstance(segmenter, SegmentationModel)
    assert segmenter(noise()).shape == (5, 2, 2)
    record = segmentation_provenance_of(segmenter, str(folder))
    assert record["name"] == str(folder)
    assert record["source"] == segmenter.kind
    assert record["parameters_sha256"] == hash_of_parameters(segmenter.model)
    assert record["class_names"] == list(CLASSES.values())
    assert ("score_threshold" in record) == (segmenter.kind == "boxes")
    assert record["seen"] == "whole image, no crop"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": 0.3}, "a score threshold is of object detectors"),
        ({"class_names": CLASS_NAMES}, "has 5 classes, the captioner 133: it lacks 'banner'"),
    ],
)
def test_what_a_model_cannot_do_is_one_line(tmp_path: Path, options: dict, message: str) -> None:
    name = save(segformer(), tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_segmenter(name, **options)
    assert "\n" not in str(caught.value)


def test_no_segmentation_model_is_one_line(tmp_path: Path) -> None:
    load_grid_backbone(None, untrained=True).save_pretrained(tmp_path / "grids")
    transformers.BertConfig(num_hidden_layers=1, architectures=["BertModel"]).save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("grids", "GridFeatureBackbone: neither a segmentation model"),
        ("bert", "BertModel: neither a segmentation model"),
        ("empty", "the network cannot be loaded"),
        ("missing", "no such folder, and not available from the Hub"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            load_segmenter(str(tmp_path / name))
        assert "\n" not in str(caught.value)
