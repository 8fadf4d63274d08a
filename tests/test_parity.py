"""The rebuilt network against the original: every golden output of its four modes and two sizes.

The largest differences are printed as a table at the end of the run (conftest.py).
"""

import json
from collections.abc import Callable

import pytest
import torch
from conftest import CASES, GOLDEN, GoldenCase, golden_case, reference_weights
from torch import nn

from convert_checkpoint import key_pairs
from modeling_difnet import original_beam_search, sequence_log_probs

Compare = Callable[[GoldenCase, str, float, float], None]


@pytest.fixture
def within(record_property: Callable) -> Compare:
    """Asserts that a difference is small enough, and notes it for the table under a column's name."""

    def assert_within(case: GoldenCase, column: str, difference: float, tolerance: float) -> None:
        record_property("parity", (case.name, column, float(difference)))
        assert difference <= tolerance, f"{case.name}, {column}: {difference:.1e} > {tolerance:.0e}"

    return assert_within


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference over the largest reference value."""
    assert ours.shape == reference.shape
    reference = reference.double()
    return ((ours.detach().double() - reference).abs().max() / reference.abs().max()).item()


def log_probs_of(case: GoldenCase, model: nn.Module, inputs: dict, **masks: torch.Tensor) -> torch.Tensor:
    logits = model(**case.features(inputs), decoder_input_ids=inputs["captions"], **masks).logits
    return logits.log_softmax(-1)


def as_original(sequences: torch.Tensor) -> torch.Tensor:
    """`<bos> w1 .. <eos> <pad> ..` to the original's 20 tokens: no `<bos>`, and 0 after `<eos>`."""
    tokens = nn.functional.pad(sequences[:, 1:], (0, 21 - sequences.shape[1]), value=1)
    return tokens.masked_fill((tokens == 3).cumsum(-1) - (tokens == 3).long() > 0, 0)


def beam_search(case: GoldenCase, model: nn.Module, inputs: dict, num_beams: int, num_returned: int, **masks):
    output = model.generate(
        **case.features(inputs),
        **masks,
        custom_generate=original_beam_search,
        num_beams=num_beams,
        num_return_sequences=num_returned,
        max_new_tokens=20,
        do_sample=False,
        return_dict_in_generate=True,
    )
    log_probs = output.sequences_log_probs
    return as_original(output.sequences), nn.functional.pad(log_probs, (0, 20 - log_probs.shape[1]))


@pytest.mark.versions
@torch.no_grad()
def test_log_probs(golden: GoldenCase, within: Compare) -> None:
    log_probs = log_probs_of(golden, golden.model(), golden.inputs)
    positions = golden.meta["log_prob_positions"]
    within(golden, "log-probabilities", relative(log_probs[:, positions], golden.outputs["log_probs"]), 1e-5)
    assert torch.equal(log_probs.argmax(-1)[:, positions], golden.outputs["argmax"][:, positions])
    targets = golden.inputs["captions"][:, 1:].unsqueeze(-1)
    target_log_probs = log_probs[:, :-1].gather(-1, targets).squeeze(-1)
    within(golden, "log-probabilities", relative(target_log_probs, golden.outputs["target_log_probs"]), 1e-5)


@pytest.mark.versions
@torch.no_grad()
def test_encoder_states(golden: GoldenCase, within: Compare) -> None:
    states = golden.model().get_encoder()(**golden.features()).last_hidden_state
    within(golden, "encoder", relative(states[:, ::6, ::8], golden.outputs["encoder_output"]), 1e-5)
    within(golden, "encoder", relative(states.sum(-1), golden.outputs["encoder_output_sum"]), 1e-5)


@torch.no_grad()
def test_every_call_of_an_encoder_layer(golden: GoldenCase, within: Compare) -> None:
    """The original calls a flow layer T times for each flow, in turn; the outputs are those of the final norms."""
    calls = []
    model = golden.model()
    for name, module in model.get_encoder().named_modules():
        if isinstance(module, nn.LayerNorm) and "final_layer_norm" in name:
            module.register_forward_hook(lambda module, args, output: calls.append(output[:, ::6, ::8]))
    model.get_encoder()(**golden.features())
    within(golden, "encoder", relative(torch.stack(calls), golden.outputs["encoder_layer_calls"]), 1e-5)


@torch.no_grad()
def test_empty_cells_are_cells_unless_masked(golden: GoldenCase, within: Compare) -> None:
    inputs = reference_weights.zero_cells(golden.inputs)
    positions = golden.meta["log_prob_positions"]
    log_probs = log_probs_of(golden, golden.model(), inputs)[:, positions]
    within(golden, "log-probabilities", relative(log_probs, golden.outputs["zero_cells_log_probs"]), 1e-5)

    model = golden.model(reference_weights.zero_sum_embedding(golden.state_dict))
    masks = {
        "grid_attention_mask": (inputs["images"].abs().sum(-1) > 0).long(),
        "segmentation_attention_mask": (inputs["pixels"].flatten(2).abs().sum(1) > 0).long(),
    }
    log_probs = log_probs_of(golden, model, inputs, **masks)[:, positions]
    within(golden, "log-probabilities", relative(log_probs, golden.outputs["masked_cells_log_probs"]), 1e-5)
    tokens, log_probs = beam_search(golden, model, inputs, 5, 1, **masks)
    assert torch.equal(tokens, golden.outputs["masked_cells_beam5_tokens"])
    within(golden, "beams", relative(log_probs, golden.outputs["masked_cells_beam5_log_probs"]), 1e-4)


@pytest.mark.versions
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_beams_token_for_token(golden: GoldenCase, attention: str, within: Compare) -> None:
    model = golden.model()
    model.set_attn_implementation(attention)
    batch_size = golden.inputs["images"].shape[0]
    for num_beams, num_returned, name in ((1, 1, "greedy"), (5, 1, "beam5_out1"), (5, 5, "beam5_out5")):
        tokens, log_probs = beam_search(golden, model, golden.inputs, num_beams, num_returned)
        reference = golden.outputs[f"{name}_tokens"].reshape(batch_size * num_returned, 20)
        reference_log_probs = golden.outputs[f"{name}_log_probs"].reshape(batch_size * num_returned, 20)
        assert torch.equal(tokens, reference), name
        within(golden, "beams", relative(log_probs, reference_log_probs), 1e-4)


@pytest.mark.versions
@torch.no_grad()
def test_greedy_generate_gives_the_original_tokens(golden: GoldenCase) -> None:
    sequences = golden.model().generate(**golden.features(), num_beams=1, do_sample=False, max_new_tokens=20)
    assert torch.equal(as_original(sequences), golden.outputs["greedy_tokens"])


def xe_loss(case: GoldenCase, model: nn.Module, features: dict) -> torch.Tensor:
    labels = case.inputs["captions"][:, 1:]
    return model(**features, labels=labels.masked_fill(labels == 1, -100)).loss


def scst_loss(case: GoldenCase, model: nn.Module, features: dict) -> torch.Tensor:
    """The original's loss on its own five beams, differentiated through one teacher-forced pass."""
    tokens = case.outputs["beam5_out5_tokens"]  # (B, 5, 20), 0 after <eos>
    after_eos = (tokens == 3).cumsum(-1) - (tokens == 3).long() > 0
    sequences = nn.functional.pad(tokens.masked_fill(after_eos, 1), (1, 0), value=2)
    log_probs = sequence_log_probs(model, sequences, **features)
    rewards = reference_weights.reference_rewards(**case.meta["rewards"]).to(log_probs.dtype)
    return (-log_probs.mean(-1) * (rewards - rewards.mean(-1, keepdim=True))).mean()


@pytest.mark.parametrize(("stage", "loss_function"), [("xe", xe_loss), ("scst", scst_loss)])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_losses_and_gradients(
    golden: GoldenCase, stage: str, loss_function: Callable, precision: str, within: Compare
) -> None:
    dtype, tolerance = getattr(torch, precision), {"float32": 1e-4, "float64": 1e-9}[precision]
    model = golden.model().to(dtype)
    features = {name: value.to(dtype) for name, value in golden.features().items()}
    loss = loss_function(golden, model, features)
    reference = golden.meta[f"{stage}_loss_float64"]
    assert loss.item() == pytest.approx(reference, rel={"float32": 1e-4, "float64": 1e-9}[precision])
    loss.backward()

    gradients = json.loads((GOLDEN / golden.name / "grads.json").read_text())[stage]
    parameters = dict(model.named_parameters())
    pairs = key_pairs(model.config)
    largest = 0.0
    for original_key, expected in gradients.items():
        if expected is None or original_key in golden.meta["gradients_mathematically_zero"]:
            continue
        gradient = parameters[pairs[original_key]].grad.double()
        largest = max(largest, abs(gradient.norm().item() / expected["norm"] - 1))
        # A sum may cancel: it is compared on the scale that a sum of this many such entries has.
        scale = expected["norm"] * gradient.numel() ** 0.5
        largest = max(largest, abs(gradient.sum().item() - expected["sum"]) / scale)
    within(golden, f"{stage.upper()} gradients, {precision}", largest, tolerance)
    trained = {pairs[key] for key, expected in gradients.items() if expected is not None}
    assert trained == set(parameters), "every parameter has a gradient, and the original's alike"


def test_training_curve() -> None:
    """30 Adam steps on three batches, without dropout: losses, then all weights and the beams."""
    case = golden_case("difnet_small")
    curve = json.loads((GOLDEN / case.name / "training_curve.json").read_text())
    batches = [reference_weights.reference_inputs(**arguments) for arguments in curve["batches"]]
    model = case.model().double()
    optimizer = torch.optim.Adam(
        model.parameters(), **{name: value for name, value in curve["optimizer"].items() if name != "name"}
    )
    losses = []
    for step in range(curve["steps"]):
        batch = batches[step % 3]
        labels = batch["captions"][:, 1:]
        features = {name: value.double() for name, value in case.features(batch).items()}
        loss = model(**features, labels=labels.masked_fill(labels == 1, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(curve["losses_float64"], rel=1e-6)

    state = model.state_dict()
    for original_key, key in key_pairs(model.config).items():
        assert state[key].norm().item() == pytest.approx(curve["final_norms_float64"][original_key], rel=1e-6), key
    tokens, _ = beam_search(case, model.float(), batches[0], 5, 1)
    assert tokens.tolist() == curve["final_beam5_tokens_batch0"]


def test_all_cases_are_there() -> None:
    assert sorted(CASES) == sorted(
        path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name != "__pycache__"
    )
