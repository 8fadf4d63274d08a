"""The network in plain PyTorch equals the model."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import GoldenCase, golden_case

specification = importlib.util.spec_from_file_location(
    "nano_difnet", Path(__file__).parent.parent / "examples" / "nano_difnet.py"
)
nano_difnet = importlib.util.module_from_spec(specification)
specification.loader.exec_module(nano_difnet)


@pytest.fixture
def case() -> GoldenCase:
    return golden_case("difnet_small")


@pytest.fixture
def nano(case: GoldenCase, tmp_path: Path) -> torch.nn.Module:
    case.model().save_pretrained(tmp_path)
    return nano_difnet.NanoDifnet.from_folder(tmp_path)


@torch.no_grad()
def test_a_converted_checkpoint_gives_the_original_log_probabilities(case: GoldenCase, nano: torch.nn.Module) -> None:
    captions, positions = case.inputs["captions"], case.meta["log_prob_positions"]
    log_probs = nano(captions, nano.encoder(*case.features().values())).log_softmax(-1)[:, positions]
    is_word = captions[:, positions] != nano.config.pad_token_id  # no loss, and no later word, depends on padding
    ours, reference = log_probs[is_word], case.outputs["log_probs"][is_word]
    assert is_word.sum() > 20
    assert (ours - reference).abs().max() / reference.abs().max() <= 1e-5


def test_the_loss_and_its_gradients_equal_the_model_s(case: GoldenCase, nano: torch.nn.Module) -> None:
    captions, model = case.inputs["captions"], case.model()
    loss = nano.loss(*case.features().values(), captions)
    labels = captions[:, 1:].masked_fill(captions[:, 1:] == model.config.pad_token_id, -100)
    expected = model(**case.features(), labels=labels, decoder_input_ids=captions[:, :-1]).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    ours = nano.get_parameter("encoder.flow_layers.0.self_attn.q_proj.weight").grad
    theirs = model.get_parameter("model.encoder.flow_layers.0.self_attn.q_proj.weight").grad
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_greedy_captions_equal_generate(case: GoldenCase, nano: torch.nn.Module) -> None:
    tokens = nano.caption(*case.features().values(), max_new_tokens=12)
    expected = case.model().generate(**case.features(), num_beams=1, do_sample=False, max_new_tokens=12)
    expected = torch.nn.functional.pad(expected, (0, tokens.shape[1] - expected.shape[1]), value=1)
    assert torch.equal(tokens, expected)
