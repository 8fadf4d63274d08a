"""Exported captioners against the original's golden outputs and against `original_beam_search`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CASES, GoldenCase, golden_case, random_features, random_model, reference_weights

from difnet_transformers import DifnetRuntimeModel
from difnet_transformers.export import check_export, export_captioner
from difnet_transformers.runtime import BeamSearchOutput
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration, original_beam_search
from modeling_difnet.generation_difnet import default_generation_config
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

for package in ("onnx", "onnxruntime", "openvino"):
    pytest.importorskip(package)

FORMATS = ["onnx", "openvino", "numpy"]


def processor_of(config: DifnetConfig, grid_size: Any = (3, 4)) -> DifnetProcessor:
    """With words that are written together, and a word of white space."""
    special = ["<unk>", "<pad>", "<bos>", "<eos>", "'s", "n't", '"', "(", "  "]
    words = [*special, *(f"word{number}" for number in range(len(special), config.vocab_size))]
    extractor = DifnetFeatureExtractor(
        grid_size=grid_size,
        grid_feature_size=config.grid_feature_size,
        num_segmentation_classes=config.num_segmentation_classes,
    )
    return DifnetProcessor(extractor, DifnetTokenizer(vocab=words, model_max_length=config.max_position_embeddings))


def exported(
    model: DifnetForConditionalGeneration, folder: Path, format: str, precision: str = "fp32"
) -> DifnetRuntimeModel:
    if format == "numpy":  # the checkpoint as it is
        model.save_pretrained(folder)
        processor_of(model.config).save_pretrained(folder)
        return DifnetRuntimeModel.from_pretrained(folder)
    export_captioner(model, processor_of(model.config), folder, format=format, precision=precision)
    return DifnetRuntimeModel.from_pretrained(folder, num_threads=1)


def decisive_model(config: DifnetConfig, seed: int = 0, factor: float = 4.0) -> DifnetForConditionalGeneration:
    """With captions that differ and that end."""
    model = random_model(config, seed)
    model.lm_head.weight.data *= factor
    model.generation_config = default_generation_config(config)
    return model


@pytest.fixture(params=["two flows", "baseline"])
def config(tiny_config: DifnetConfig, request: pytest.FixtureRequest) -> DifnetConfig:
    tiny_config.use_segmentation = request.param == "two flows"
    return tiny_config


# --- The original's golden outputs -----------------------------------------------------------------------------------


def as_original(sequences: np.ndarray) -> np.ndarray:
    """`<bos> w1 .. <eos> <pad> ..` to the original's 20 tokens: no `<bos>`, and 0 after `<eos>`."""
    tokens = np.pad(sequences[:, 1:], ((0, 0), (0, 21 - sequences.shape[1])), constant_values=1)
    is_end = tokens == 3
    return np.where(is_end.cumsum(1) > is_end, 0, tokens)


def check_golden(
    model: DifnetRuntimeModel, inputs: dict, expected: dict, name: str, num_returned: int = 1, num_beams: int = 5
) -> None:
    output = model.generate(
        **{key: each.numpy() for key, each in inputs.items()},
        num_beams=num_beams,
        num_return_sequences=num_returned,
        max_new_tokens=20,
        return_dict_in_generate=True,
    )
    assert isinstance(output, BeamSearchOutput)
    tokens, log_probs = (expected[f"{name}_{kind}"].reshape(-1, 20).numpy() for kind in ("tokens", "log_probs"))
    assert np.array_equal(as_original(output.sequences), tokens), name
    found = np.pad(output.sequences_log_probs, ((0, 0), (0, 20 - output.sequences_log_probs.shape[1])))
    assert np.abs(found - log_probs).max() <= 1e-4 * np.abs(log_probs).max(), name
    np.testing.assert_allclose(output.sequences_scores, log_probs.sum(1), rtol=1e-4)


# Of the full sizes one is enough each time; the modes of one name are the same network.
GOLDEN_CASES = [name if name.endswith("small") else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


def check_all_beams(case: GoldenCase, folder: Path, format: str) -> None:
    model = exported(case.model(), folder, format)
    check_golden(model, case.features(), case.outputs, "greedy", num_beams=1)
    check_golden(model, case.features(), case.outputs, "beam5_out5", num_returned=5)
    check_golden(model, case.features(), case.outputs, "beam5_out1")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_all_golden_beams(name: str, format: str, tmp_path: Path) -> None:
    check_all_beams(golden_case(name), tmp_path / "exported", format)


def test_all_golden_beams_at_full_size(tmp_path: Path) -> None:
    check_all_beams(golden_case("difnet_lrp_full"), tmp_path / "exported", "onnx")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_beams_of_masked_cells(name: str, format: str, tmp_path: Path) -> None:
    case = golden_case(name)
    inputs = reference_weights.zero_cells(case.inputs)
    masks = {
        "grid_attention_mask": (inputs["images"].abs().sum(-1) > 0).long(),
        "segmentation_attention_mask": (inputs["pixels"].flatten(2).abs().sum(1) > 0).long(),
    }
    weights = reference_weights.zero_sum_embedding(case.state_dict)
    model = exported(case.model(weights), tmp_path / "exported", format)
    check_golden(model, case.features(inputs) | masks, case.outputs, "masked_cells_beam5")


# --- `original_beam_search` ------------------------------------------------------------------------------------------


def compare(
    model: DifnetForConditionalGeneration, runtime_model: DifnetRuntimeModel, inputs: dict, **options: Any
) -> BeamSearchOutput:
    """Both must give the same tokens and scores."""
    with torch.no_grad():
        expected = model.generate(
            **inputs, **options, custom_generate=original_beam_search, return_dict_in_generate=True
        )
    arrays = {name: each.numpy() for name, each in inputs.items()}
    found = runtime_model.generate(**arrays, **options, return_dict_in_generate=True)
    assert isinstance(found, BeamSearchOutput)
    assert np.array_equal(found.sequences, expected.sequences.numpy())
    for name in ("sequences_scores", "sequences_log_probs"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name).numpy(), atol=1e-4, rtol=1e-4)
    if options.get("output_scores"):
        assert np.array_equal(found.beam_indices, expected.beam_indices.numpy())
        assert len(found.scores) == len(expected.scores)
        for step, rows in enumerate(found.beam_indices.T):
            ours, reference = found.scores[step][rows[rows >= 0]], expected.scores[step].numpy()[rows[rows >= 0]]
            np.testing.assert_allclose(ours, reference, atol=1e-4, rtol=1e-4)
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_captions_as_the_checkpoint(config: DifnetConfig, format: str, tmp_path: Path) -> None:
    model = decisive_model(config)
    runtime_model = exported(model, tmp_path / "exported", format)
    inputs = random_features(config, batch_size=5)
    found = compare(model, runtime_model, inputs)
    assert found.sequences.shape[0] == 5
    compare(model, runtime_model, inputs, num_beams=3, num_return_sequences=2, max_new_tokens=8, output_scores=True)
    compare(model, runtime_model, inputs, num_beams=1, max_new_tokens=1)
    compare(model, runtime_model, inputs, num_beams=4, num_return_sequences=4, max_new_tokens=29)


@pytest.mark.parametrize(("vocab_size", "seed"), [(20, 3), (20, 5)])
def test_where_one_image_ends_before_the_others(
    tiny_config: DifnetConfig, vocab_size: int, seed: int, tmp_path: Path
) -> None:
    tiny_config.vocab_size = vocab_size
    model = decisive_model(tiny_config, seed)
    # After `<pad>` all words are equally likely, and equal ones have no order.
    model.lm_head.weight.data[tiny_config.pad_token_id] = 0
    runtime_model = exported(model, tmp_path / "exported", "onnx")
    inputs = random_features(tiny_config, batch_size=5)
    found = compare(model, runtime_model, inputs, num_beams=2, num_return_sequences=2)
    assert len(set((found.sequences != tiny_config.pad_token_id).sum(1).tolist())) > 2, "a case that shows nothing"


def test_any_number_of_cells_and_masks(config: DifnetConfig, tmp_path: Path) -> None:
    model = decisive_model(config)
    runtime_model = exported(model, tmp_path / "exported", "onnx")
    for height, width in ((1, 1), (5, 2)):
        inputs = random_features(config, batch_size=3, height=height, width=width)
        compare(model, runtime_model, inputs)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[1, 6:] = 0
    masks = {"grid_attention_mask": mask}
    if config.use_segmentation:
        masks["segmentation_attention_mask"] = mask.flip(1)
    compare(model, runtime_model, inputs | masks)


PROMPTS = {
    "equal lengths": [[2, 5, 6], [2, 7, 8], [2, 9, 10]],
    "padded on the left": [[1, 2, 5], [2, 6, 7], [1, 1, 2]],
    "padded on the right": [[2, 5, 1], [2, 6, 7], [2, 1, 1]],
    "without a start token": [[5, 6, 7], [8, 9, 10], [2, 11, 12]],
    "padding inside": [[2, 1, 6], [2, 7, 8], [2, 9, 1]],
    "empty columns": [[1, 1, 2], [1, 1, 2], [1, 1, 2]],
}


@pytest.fixture(scope="module")
def with_prompts(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[DifnetForConditionalGeneration, DifnetRuntimeModel]:
    config = DifnetConfig(
        vocab_size=40, grid_feature_size=6, num_segmentation_classes=5, d_model=16, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, head_dim=8, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=12,
    )  # fmt: skip
    model = decisive_model(config)
    return model, exported(model, tmp_path_factory.mktemp("prompts") / "exported", "onnx")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(with_prompts: tuple, name: str, masked: bool) -> None:
    model, runtime_model = with_prompts
    prompts = {"decoder_input_ids": torch.tensor(PROMPTS[name])}
    if masked:
        prompts["decoder_attention_mask"] = (prompts["decoder_input_ids"] != 1).long()
    inputs = random_features(model.config, batch_size=3) | prompts
    compare(model, runtime_model, inputs, num_beams=3, num_return_sequences=3, max_new_tokens=6)
    compare(model, runtime_model, inputs)


# --- Precisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "precision", "tolerance"),
    [("openvino", "bf16", 0.2), ("openvino", "int8", 0.2), ("onnx", "int8", 0.2)],
)
def test_lower_precisions_are_near(
    tiny_config: DifnetConfig, format: str, precision: str, tolerance: float, tmp_path: Path
) -> None:
    if (format, precision) == ("openvino", "int8"):
        pytest.importorskip("nncf")
    model = decisive_model(tiny_config, factor=1.0)
    runtime_model = exported(model, tmp_path / "exported", format, precision)
    assert runtime_model.manifest.precision == precision
    check = check_export(model, processor_of(tiny_config), runtime_model)
    assert check.num_captions == 40
    assert 0 < check.log_prob_difference < tolerance
