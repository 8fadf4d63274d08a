"""Log-probabilities of tokens, mean and entropy over the vocabulary, by blocks: equal to those of the whole matrix."""

import copy

import pytest
import torch
from conftest import random_captions, random_features, random_model
from torch import nn

from modeling_difnet import DifnetConfig, token_log_probs_difnet
from modeling_difnet.token_log_probs_difnet import (
    BlockedLogProbs,
    TokenLogProbs,
    plain_token_log_probs,
    token_log_probs,
)

NUM_TOKENS, WIDTH, NUM_WORDS = 7, 5, 23
ASKED = [(False, False), (True, False), (False, True), (True, True)]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lm_head = nn.Linear(WIDTH, NUM_WORDS, bias=False, dtype=dtype)
    lm_head.weight.data = torch.randn(NUM_WORDS, WIDTH, generator=generator, dtype=dtype)
    states = torch.randn(NUM_TOKENS, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    # Words at both ends of a block of four, and at the last, shorter block.
    targets = torch.tensor([0, 3, 4, 7, 20, 22, 3])
    return lm_head, states, targets


def gradients(found: TokenLogProbs, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of a sum in which every number of the result has a weight of its own."""
    total = 0.0
    for i, values in enumerate(found):
        if values is not None:
            total = total + (values * torch.linspace(-1, 2 + i, len(values), dtype=values.dtype)).sum()
    return torch.autograd.grad(total, of)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of at least four words, of which there are six here."""
    monkeypatch.setattr(token_log_probs_difnet, "MAX_LOGITS", 1)
    monkeypatch.setattr(token_log_probs_difnet, "MIN_BLOCK", 4)


@pytest.mark.parametrize(("with_mean", "with_entropy"), ASKED)
def test_blocks_equal_the_whole_matrix(small_blocks: None, with_mean: bool, with_entropy: bool) -> None:
    lm_head, states, targets = inputs()
    found = token_log_probs(lm_head, states, targets, with_mean, with_entropy)
    expected = plain_token_log_probs(lm_head, states, targets, with_mean, with_entropy)
    assert [each is None for each in found] == [False, not with_mean, not with_entropy]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    of = (states, lm_head.weight)
    torch.testing.assert_close(gradients(found, *of), gradients(expected, *of), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_a_temperature_divides_the_logits(small_blocks: None, bias: bool) -> None:
    lm_head, states, targets = inputs()
    if bias:  # is applied as a whole
        lm_head = nn.Linear(WIDTH, NUM_WORDS, dtype=states.dtype)
    found = token_log_probs(lm_head, states, targets, True, True, temperature=0.6)
    vocabulary = (lm_head(states) / 0.6).log_softmax(-1)  # (T, V)
    log_probs = vocabulary.gather(1, targets.unsqueeze(1)).squeeze(1)
    expected = TokenLogProbs(log_probs, vocabulary.mean(-1), -(vocabulary.exp() * vocabulary).sum(-1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    of = (states, lm_head.weight)
    torch.testing.assert_close(gradients(found, *of), gradients(expected, *of), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block_size", [1, 4, 23, 100])
def test_gradients_are_those_of_finite_differences(block_size: int) -> None:
    lm_head, states, targets = inputs()

    def function(states: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return BlockedLogProbs.apply(states, weight, targets, block_size, True, True)

    assert torch.autograd.gradcheck(function, (states, lm_head.weight))


@pytest.mark.parametrize("frozen", ["states", "weight"])
def test_what_is_frozen_gets_no_gradient(small_blocks: None, frozen: str) -> None:
    lm_head, states, targets = inputs()
    {"states": states, "weight": lm_head.weight}[frozen].requires_grad_(False)
    token_log_probs(lm_head, states, targets).log_probs.sum().backward()
    assert (states.grad is None) == (frozen == "states")
    assert (lm_head.weight.grad is None) == (frozen == "weight")


def test_mean_or_entropy_alone_may_be_differentiated(small_blocks: None) -> None:
    lm_head, states, targets = inputs()
    for name in ("means", "entropies"):
        found, expected = (
            getattr(function(lm_head, states, targets, True, True), name).sum()
            for function in (token_log_probs, plain_token_log_probs)
        )
        of = (states, lm_head.weight)
        torch.testing.assert_close(torch.autograd.grad(found, of), torch.autograd.grad(expected, of))


@pytest.mark.parametrize(("with_mean", "with_entropy"), ASKED)
def test_under_autocast_as_the_whole_matrix_is(small_blocks: None, with_mean: bool, with_entropy: bool) -> None:
    lm_head, states, targets = inputs(torch.float32)
    results = []
    for function in (token_log_probs, plain_token_log_probs):
        with torch.autocast("cpu", torch.bfloat16):
            found = function(lm_head, states, targets, with_mean, with_entropy)
        assert found.log_probs.dtype == torch.float32
        results.append((*found, *gradients(found, states, lm_head.weight)))
    assert results[0][-1].dtype == lm_head.weight.dtype
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0], results[1], rtol=0.02, atol=0.02)


def test_a_batch_without_a_token() -> None:
    lm_head, states, targets = inputs()
    found = token_log_probs(lm_head, states[:0], targets[:0], True, True)
    assert [each.shape for each in found] == [(0,)] * 3
    found.log_probs.sum().backward()
    assert not lm_head.weight.grad.any()


@pytest.mark.parametrize("change", ["bias", "hook", "other class"])
def test_another_projection_is_applied_as_it_is(change: str) -> None:
    lm_head, states, targets = inputs()
    if change == "bias":
        weight = lm_head.weight
        lm_head = nn.Linear(WIDTH, NUM_WORDS, dtype=weight.dtype)
        lm_head.weight = weight
    elif change == "hook":
        lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    else:
        lm_head = nn.Sequential(lm_head, nn.Tanh())
    expected = lm_head(states).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(token_log_probs(lm_head, states, targets).log_probs, expected)


def test_the_largest_tensors_are_one_block(small_blocks: None) -> None:
    """Neither the forward nor the backward pass holds (tokens, words)."""
    lm_head, states, targets = inputs()
    saved = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_log_probs(lm_head, states, targets, True, True)
    assert max(tensor.numel() for tensor in saved) == lm_head.weight.numel() < NUM_TOKENS * NUM_WORDS


def test_a_tied_projection_sums_its_gradients(tiny_config: DifnetConfig, small_blocks: None) -> None:
    config = copy.copy(tiny_config)
    config.tie_word_embeddings = True
    model = random_model(config).double()
    features = {name: value.double() for name, value in random_features(config).items()}
    captions = random_captions(config)
    model.sequence_log_probs(captions, **features).sum().backward()
    found = model.lm_head.weight.grad.clone()
    model.zero_grad()
    logits = model(**features, decoder_input_ids=captions[:, :-1]).logits
    logits.log_softmax(-1).gather(-1, captions[:, 1:, None]).sum().backward()
    torch.testing.assert_close(found, model.lm_head.weight.grad)
