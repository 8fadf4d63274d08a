"""`scripts/evaluate_captions.py`: every image of a split once, over one or two processes, and its scores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, load_from_disk

from caption_metrics import score_captions
from dataset_difnet import decode_segmentation, encode_segmentation, packed_features
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "scripts"))
import evaluate_captions  # noqa: E402

WORDS = ["a", "man", "dog", "cat", "on", "the", "grass", "runs", "sits", "red", "ball", "with"]
VOCABULARY = ["<unk>", "<pad>", "<bos>", "<eos>", *WORDS]
CONFIG = DifnetConfig(
    vocab_size=len(VOCABULARY),
    grid_feature_size=6,
    num_segmentation_classes=5,
    d_model=16,
    encoder_layers=2,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    head_dim=8,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
)
OPTIONS = {"num_beams": 3, "max_new_tokens": 6}


def save_captioner(folder: Path, **changes) -> Path:
    torch.manual_seed(3)
    config = DifnetConfig(**{**CONFIG.to_dict(), **changes})
    model = DifnetForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # else all pictures get one caption
    model.save_pretrained(folder)
    extractor = DifnetFeatureExtractor(
        grid_size=2, grid_feature_size=config.grid_feature_size, num_segmentation_classes=5
    )
    DifnetProcessor(extractor, DifnetTokenizer(vocab=VOCABULARY)).save_pretrained(folder)
    return folder


def save_packed(folder: Path, sizes: dict[str, int]) -> Path:
    """A packed dataset of random features, every third grid with a padded cell; image ids are not positions."""
    splits = {}
    for number, (split, size) in enumerate(sizes.items()):
        random = np.random.default_rng(number)
        rows = []
        for image in range(size):
            cells = 3 if image % 3 == 0 else 4
            grid = random.normal(size=(4, 6)).astype(np.float16)
            grid[cells:] = 0
            segmentation = np.where(random.random((5, 2, 2)) > 0.6, 1, 0).astype(np.float16)
            rows.append(
                {
                    "image_id": 1000 * (number + 1) - 7 * image,
                    "file_name": f"{image}.jpg",
                    "restval": False,
                    "grid_features": grid,
                    "grid_cells": cells,
                    "segmentation_features": encode_segmentation(segmentation),
                    "captions": [" ".join(random.choice(WORDS, 4)) for _ in range(1 + image % 3)],
                }
            )
        splits[split] = Dataset.from_list(rows, features=packed_features("float16", 2, 6))
    DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return save_packed(tmp_path_factory.mktemp("packed"), {"train": 4, "validation": 11, "test": 13, "one": 1})


def captions_of(captioner: Path, packed: Path, split: str, **options) -> list[evaluate_captions.CaptionedImage]:
    model = DifnetForConditionalGeneration.from_pretrained(captioner)
    tokenizer = DifnetTokenizer.from_pretrained(captioner)
    accelerator = Accelerator(cpu=True)
    options = {"generation_options": OPTIONS, **options}
    return evaluate_captions.caption_split(model, tokenizer, load_from_disk(packed)[split], accelerator, **options)


def one_by_one(captioner: Path, packed: Path, split: str, **options) -> list[str]:
    """The reference: each image alone, through the processor, as a user would."""
    model = DifnetForConditionalGeneration.from_pretrained(captioner)
    processor = DifnetProcessor.from_pretrained(captioner)
    captions = []
    for row in load_from_disk(packed)[split].with_format("numpy"):
        inputs = processor(
            row["grid_features"][: row["grid_cells"]],
            decode_segmentation([row["segmentation_features"]])[0],
            return_tensors="pt",
        )
        captions += processor.post_process_captions(model.generate(**inputs, **OPTIONS, **options))
    return captions


class TestCaptionSplit:
    @pytest.mark.parametrize("batch_size", [1, 4, 13, 50])
    def test_every_image_in_the_order_of_the_dataset(self, captioner, packed, batch_size):
        captioned = captions_of(captioner, packed, "test", batch_size=batch_size)
        rows = load_from_disk(packed)["test"]
        assert [image.image_id for image in captioned] == rows["image_id"][:]
        assert [image.references for image in captioned] == rows["captions"][:]
        expected = one_by_one(captioner, packed, "test", custom_generate=evaluate_captions.original_beam_search)
        assert [image.caption for image in captioned] == expected
        assert len(set(expected)) > 3

    def test_the_librarys_decoding(self, captioner, packed):
        captioned = captions_of(captioner, packed, "test", original_decoding=False, batch_size=5)
        assert [image.caption for image in captioned] == one_by_one(captioner, packed, "test")

    def test_the_model_goes_on_training_where_it_was(self, captioner, packed):
        model = DifnetForConditionalGeneration.from_pretrained(captioner).train()
        tokenizer = DifnetTokenizer.from_pretrained(captioner)
        split, accelerator = load_from_disk(packed)["validation"], Accelerator(cpu=True)
        captioned = evaluate_captions.caption_split(
            model, tokenizer, split, accelerator, generation_options=OPTIONS, batch_size=50
        )
        assert model.training
        assert captioned == captions_of(captioner, packed, "validation")

    @pytest.mark.parametrize("split", ["test", "one"])
    def test_two_processes_caption_every_image_once(self, captioner, packed, tmp_path, split):
        """13 images in batches of 3 (shares of 9 and 4), and a split with fewer images than processes."""
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        command += [str(captioner), str(packed), split, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr
        expected = [list(image) for image in captions_of(captioner, packed, split)]
        for process in range(2):
            assert json.loads((tmp_path / f"{process}.json").read_text()) == expected


def test_scores_are_those_of_caption_metrics(captioner, packed):
    captioned = captions_of(captioner, packed, "test")
    scores = evaluate_captions.score_split(captioned)
    assert list(scores) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"]
    references = load_from_disk(packed)["test"]["captions"][:]
    assert scores == score_captions([image.caption for image in captioned], references)
    perfect = [image._replace(caption=image.references[0]) for image in captioned]
    assert evaluate_captions.score_split(perfect)["bleu_1"] == pytest.approx(1)


def one_of_two_processes(captioner: str, packed: str, split: str, output: str) -> None:
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    captioned = captions_of(Path(captioner), Path(packed), split, batch_size=3)
    Path(output, f"{accelerator.process_index}.json").write_text(json.dumps(captioned))
    accelerator.wait_for_everyone()
    accelerator.end_training()  # a process that just ends may be aborted by gloo's threads


if __name__ == "__main__":
    one_of_two_processes(*sys.argv[1:])
