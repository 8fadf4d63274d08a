"""What the runtime takes and writes without Transformers, against the processor of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_features
from test_runtime import decisive_model, exported, processor_of

import processing_difnet
from difnet_transformers import DifnetRuntimeModel
from difnet_transformers.runtime import captions
from difnet_transformers.runtime.captions import CaptionDecoder
from difnet_transformers.runtime.features import make_batch
from modeling_difnet import DifnetConfig
from processing_difnet import DifnetProcessor

CONFIG = DifnetConfig(
    vocab_size=50, grid_feature_size=24, num_segmentation_classes=7, d_model=32, encoder_layers=2, decoder_layers=1,
    encoder_attention_heads=4, decoder_attention_heads=2, head_dim=10, encoder_ffn_dim=40, decoder_ffn_dim=48,
    max_position_embeddings=30,
)  # fmt: skip


@pytest.fixture(scope="module")
def processor() -> DifnetProcessor:
    return processor_of(CONFIG)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DifnetRuntimeModel:
    return exported(decisive_model(CONFIG), tmp_path_factory.mktemp("inputs") / "exported", "onnx")


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    return {name: each.numpy() for name, each in random_features(CONFIG).items()}


# --- Captions --------------------------------------------------------------------------------------------------------

TEXTS = [
    "a man 's dog",
    'a " stop " sign',
    "( a cat ) is n't here",
    "can not gon na got ta",
    "50 % off [ now ] .",
    "  ",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_captions_are_written_as_the_tokenizer_writes_them(processor: DifnetProcessor, text: str) -> None:
    assert captions.clean_up_tokenization(text) == processor.tokenizer.clean_up_tokenization(text)


def test_the_rules_of_writing_are_the_same() -> None:
    for name in ("CLITICS", "CLOSING", "OPENING", "SPLIT_WORDS"):
        assert getattr(captions, name) == getattr(processing_difnet, name)


@pytest.mark.parametrize("clean_up", [True, False])
def test_ids_become_the_same_captions(processor: DifnetProcessor, clean_up: bool, tmp_path: Path) -> None:
    processor.tokenizer.clean_up_tokenization_spaces = clean_up
    processor.tokenizer.init_kwargs["clean_up_tokenization_spaces"] = clean_up
    processor.save_pretrained(tmp_path)
    decoder = CaptionDecoder(tmp_path, CONFIG.vocab_size)
    sequences = np.random.default_rng(0).integers(0, 12, (60, 9))
    sequences[:, 0] = CONFIG.bos_token_id
    sequences[::7, 0] = 5
    assert decoder.decode(sequences) == processor.batch_decode(sequences, skip_special_tokens=True)
    assert decoder.decode_captions(sequences) == processor.tokenizer.decode_captions(sequences)
    assert decoder.post_process_captions(sequences) == processor.post_process_captions(sequences)


def test_captions_of_the_model(model: DifnetRuntimeModel, processor: DifnetProcessor, images: dict) -> None:
    sequences = model.generate(**images)
    assert model.caption(**images) == processor.batch_decode(sequences, skip_special_tokens=True)
    alone = model.caption(images["grid_features"][1], images["segmentation_features"][1])
    assert alone == model.caption(**images)[1:]


# --- Features --------------------------------------------------------------------------------------------------------


def settings_of(processor: DifnetProcessor, **changes: Any) -> dict[str, Any]:
    return {**processor.feature_extractor.to_dict(), **changes}


@pytest.mark.parametrize(
    "form",
    ["batch", "one image", "list of images", "small grids", "nested lists", "float16", "without segmentation"],
)
def test_batches_are_those_of_the_processor(processor: DifnetProcessor, images: dict, form: str) -> None:
    grids, shares = images["grid_features"], images["segmentation_features"]
    given: tuple[Any, Any] = {
        "batch": (grids, shares),
        "one image": (grids[0], shares[0]),
        "list of images": (list(grids), list(shares)),
        "small grids": ([grids[0][:5], grids[1]], shares),
        "nested lists": (grids.tolist(), shares.tolist()),
        "float16": (grids.astype(np.float16), shares.astype(np.float16)),
        "without segmentation": (grids, None),
    }[form]
    expected = processor.feature_extractor(*given)
    found = make_batch(*given, settings_of(processor))
    assert set(found) == set(expected)
    for name, each in expected.items():
        assert found[name].dtype == each.dtype
        np.testing.assert_array_equal(found[name], each)


def test_large_grids_are_cut_where_the_checkpoint_says_so(processor: DifnetProcessor) -> None:
    grids = np.ones((1, 20, 24), np.float32)
    found = make_batch(grids, None, settings_of(processor, cut_large_grids=True))
    expected = processor.feature_extractor(grids, cut_large_grids=True)
    np.testing.assert_array_equal(found["grid_features"], expected["grid_features"])


def nan_in_image_1(values: np.ndarray) -> np.ndarray:
    changed = values.copy()
    changed[1].flat[3] = np.nan
    return changed


MISTAKES = {
    "NaN": (lambda grids, shares: (nan_in_image_1(grids), shares), "grid_features of image 1: expected finite"),
    "NaN in the shares": (
        lambda grids, shares: (grids, nan_in_image_1(shares)),
        "segmentation_features of image 1: expected finite numbers",
    ),
    "other width": (lambda grids, shares: (grids[..., :5], shares), r"of image 0: expected \(cells, 24\)"),
    "too many cells": (lambda grids, shares: (np.ones((1, 20, 24)), shares), "grid_features of image 0: .*20 cells"),
    "other shares": (lambda grids, shares: (grids, shares[:, :3]), "segmentation_features of image 0: expected"),
    "other numbers": (lambda grids, shares: (grids, shares[:1]), "both need the same images"),
    "no image": (lambda grids, shares: (grids[:0], None), "grid_features holds no image"),
    "a path": (lambda grids, shares: ("image.jpg", None), "grid_features: expected numbers"),
    "a row": (lambda grids, shares: (grids[0][0], None), "grid_features: expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_those_of_the_processor(
    processor: DifnetProcessor, images: dict, model: DifnetRuntimeModel, name: str
) -> None:
    change, message = MISTAKES[name]
    given = change(images["grid_features"], images["segmentation_features"])
    with pytest.raises(ValueError, match=message):
        processor.feature_extractor(*given)
    with pytest.raises(ValueError, match=message):
        model.caption(*given)


GENERATE_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "one image": ({"grid_features": np.ones((12, 24))}, r"must have the shape \(batch, cells, 24\)"),
    "no segmentation": ({"segmentation_features": None}, "reads two flows"),
    "other classes": ({"segmentation_features": np.ones((2, 3, 3, 4))}, r"\(batch, 7, height, width\)"),
    "another grid": ({"segmentation_features": np.ones((2, 7, 3, 3))}, "the same images on the same grid"),
    "infinity": ({"grid_features": np.full((2, 12, 24), np.inf)}, "grid_features of image 0: expected finite numbers"),
    "a mask of another shape": ({"grid_attention_mask": np.ones((2, 3))}, "give one number for each cell"),
    "no beam": ({"num_beams": 0}, "`num_beams` must be from 1 to 50"),
    "more beams than words": ({"num_beams": 51}, "`num_beams` must be from 1 to 50"),
    "more captions than beams": ({"num_return_sequences": 6}, "`num_return_sequences` must be from 1 to `num_beams`"),
    "no token": ({"max_new_tokens": 0}, "`max_new_tokens`"),
    "too long": ({"max_new_tokens": 31}, "31 new tokens are asked for"),
    "prompts of other images": ({"decoder_input_ids": np.array([[2]])}, "one row for each of 2 images"),
    "words that are none": ({"decoder_input_ids": np.array([[2], [50]])}, "holds ids from 2 to 50"),
    "an empty prompt": ({"decoder_input_ids": np.array([[2], [1]])}, "Prompt 1 .* is padding throughout"),
    "a mask without a prompt": ({"decoder_attention_mask": np.ones((2, 1))}, "give both, or neither"),
}  # fmt: skip


@pytest.mark.parametrize("name", GENERATE_MISTAKES)
def test_what_generate_refuses(model: DifnetRuntimeModel, images: dict, name: str) -> None:
    changes, message = GENERATE_MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        model.generate(**{**images, **changes})


def test_tensors_are_taken_too(model: DifnetRuntimeModel, images: dict) -> None:
    tensors = {name: torch.from_numpy(each) for name, each in images.items()}
    assert np.array_equal(model.generate(**tensors), model.generate(**images))
