"""Shared by the tests: the golden models of the original, built from their seeds."""

import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convert_checkpoint import convert_state_dict
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration

GOLDEN = Path(__file__).parent / "golden" / "model"
CASES = [f"{mode}_{size}" for mode in ("base", "base_lrp", "difnet", "difnet_lrp") for size in ("small", "full")]

specification = importlib.util.spec_from_file_location("reference_weights", GOLDEN / "reference_weights.py")
reference_weights = importlib.util.module_from_spec(specification)
specification.loader.exec_module(reference_weights)


@dataclass
class GoldenCase:
    """One mode and size of the original: its weights, its inputs and what it computed from them."""

    name: str
    meta: dict
    state_dict: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def model(self, state_dict: dict[str, torch.Tensor] | None = None) -> DifnetForConditionalGeneration:
        """Our network with the case's weights (or others under the original's names), in eval mode."""
        sizes = self.meta["config"]
        return convert_state_dict(
            state_dict or self.state_dict,
            num_heads=sizes["h"],
            fusion_layers=sizes.get("Lf", 1),
            fusion_iterations=sizes.get("T", 2),
        ).model()

    def features(self, inputs: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The keyword arguments that show the model the case's pictures."""
        inputs = inputs or self.inputs
        return {"grid_features": inputs["images"], "segmentation_features": inputs["pixels"]}


@cache
def golden_case(name: str) -> GoldenCase:
    folder = GOLDEN / name
    meta = json.loads((folder / "meta.json").read_text())
    state_dict = reference_weights.reference_state_dict(
        json.loads((folder / "keys.json").read_text()), **meta["weights"]
    )
    inputs = reference_weights.reference_inputs(**meta["inputs"])
    assert reference_weights.fingerprint(state_dict) == meta["weights_fingerprint"]
    assert reference_weights.fingerprint(inputs) == meta["inputs_fingerprint"]
    return GoldenCase(name, meta, state_dict, inputs, load_file(folder / "outputs.safetensors"))


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest) -> GoldenCase:
    return golden_case(request.param)


@pytest.fixture
def tiny_config() -> DifnetConfig:
    """A network that runs in milliseconds, with sizes that are all different."""
    return DifnetConfig(
        vocab_size=50,
        grid_feature_size=24,
        num_segmentation_classes=7,
        d_model=32,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        head_dim=10,
        encoder_ffn_dim=40,
        decoder_ffn_dim=48,
        max_position_embeddings=30,
    )
