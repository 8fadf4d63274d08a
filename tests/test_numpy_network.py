"""Checkpoints that `DifnetRuntimeModel` runs in NumPy: every weight is checked, and what does not fit is named.

That they caption as the original does is tested with the exported ones, in tests/test_runtime.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_features, random_model
from safetensors.torch import load_file, save_file
from test_runtime import compare, processor_of

from difnet_transformers import DifnetRuntimeModel
from difnet_transformers.runtime.numpy_network import NumpyConfig, highest_entries, weight_shapes
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from modeling_difnet.generation_difnet import default_generation_config

EMBEDDING = "model.decoder.embed_tokens.weight"


def save(config: DifnetConfig, folder: Path, **options) -> DifnetForConditionalGeneration:
    model = random_model(config)
    model.generation_config = default_generation_config(config)
    model.save_pretrained(folder, **options)
    processor_of(config).save_pretrained(folder)
    return model


@pytest.fixture
def folder(tiny_config: DifnetConfig, tmp_path: Path) -> Path:
    save(tiny_config, tmp_path / "difnet")
    return tmp_path / "difnet"


@pytest.mark.parametrize("use_segmentation", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_of_the_model(
    tiny_config: DifnetConfig, use_segmentation: bool, tied: bool
) -> None:
    tiny_config.use_segmentation, tiny_config.tie_word_embeddings = use_segmentation, tied
    state_dict = DifnetForConditionalGeneration(tiny_config).state_dict()
    found = weight_shapes(NumpyConfig.from_settings(tiny_config.to_dict()))
    assert found == {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


@pytest.mark.parametrize("kind", ["shards", "tied", "float16"])
def test_weights_in_every_form(tiny_config: DifnetConfig, kind: str, tmp_path: Path) -> None:
    tiny_config.tie_word_embeddings = kind == "tied"
    model = save(tiny_config, tmp_path, **({"max_shard_size": "20KB"} if kind == "shards" else {}))
    if kind == "shards":
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    elif kind == "tied":
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    else:
        model.half().save_pretrained(tmp_path)
        model.float()
    compare(model, DifnetRuntimeModel.from_pretrained(tmp_path), random_features(tiny_config, batch_size=2))


def test_what_is_said_of_the_model(folder: Path) -> None:
    manifest = DifnetRuntimeModel.from_pretrained(folder).manifest
    assert (manifest.format, manifest.precision) == ("numpy", "fp32")
    assert manifest.source == {"name": str(folder)}


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


def change_json(name: str, **changes) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value != "nothing"}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_weights(lambda weights: weights.pop(EMBEDDING)), f"1 weights are missing, the first is {EMBEDDING}"),
        (change_weights(lambda weights: weights.update(extra=torch.ones(2))), r"extra has the shape \(2,\), not noth"),
        (
            change_weights(lambda weights: weights.update({EMBEDDING: torch.ones(3, 4)})),
            r"embed_tokens.weight has the shape \(3, 4\), not \(50, 32\)",
        ),
        (change_weights(lambda weights: weights[EMBEDDING].fill_(torch.nan)), f"NaN or infinity in {EMBEDDING}"),
        (
            change_weights(lambda weights: weights.update({EMBEDDING: weights[EMBEDDING].bfloat16()})),
            f"{EMBEDDING} is of type BF16; NumPy reads F32 and F16: difnet export takes the others",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "model.safetensors: cannot be read"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "it has no manifest.json. Make one of a checkpoint with",
        ),
        (lambda folder: (folder / "vocab.json").write_text('{"a": 0}'), "vocab.json: has"),
        (lambda folder: (folder / "processor_config.json").unlink(), "its settings are incomplete"),
        (change_json("config.json", d_model="wide"), "config.json: `d_model` must be int, not wide"),
        (change_json("config.json", head_dim="nothing"), "config.json: `head_dim` must be int, not None"),
        (change_json("config.json", model_type="blip"), "runs captioners of the type difnet"),
        (change_json("config.json", quantization_config={}), "whose weights are not quantised"),
        (change_json("generation_config.json", repetition_penalty=2.0), "`repetition_penalty` .2.0.; remove it"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        DifnetRuntimeModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_the_highest_entries_are_those_of_a_stable_sort() -> None:
    values = np.random.default_rng(0).integers(0, 5, (4, 3, 40)).astype(np.float32)
    for number in (1, 7, 40):
        found, places = highest_entries(values, number)
        expected = np.argsort(-values, axis=-1, kind="stable")[..., :number]
        assert np.array_equal(places, expected)
        assert np.array_equal(found, np.take_along_axis(values, expected, -1))
