"""`torch.compile` traces what training differentiates, and what it decodes; values and gradients stay."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import random_captions, random_features, random_model
from transformers import CompileConfig

from difnet_transformers.training import (
    SequenceLogProbs,
    cross_entropy_loss,
    decode_for_scst,
    self_critical_loss,
)
from difnet_transformers.training.regularization import set_dropout
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from modeling_difnet.token_log_probs_difnet import token_log_probs


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.fixture
def model(tiny_config: DifnetConfig) -> DifnetForConditionalGeneration:
    """In training mode. Compiled dropout draws other random numbers, so there is none."""
    model = random_model(dataclasses.replace(tiny_config, encoder_layers=2, decoder_layers=1)).train()
    set_dropout(model, 0)
    return model


def compare(loss: Callable[[], torch.Tensor], model: torch.nn.Module, **how: Any) -> None:
    """A compiled loss and its gradients beside the plain ones."""
    values, gradients = [], []
    for function in (loss, torch.compile(loss, **how)):
        model.zero_grad()
        values.append(function())
        values[-1].backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_cross_entropy_by_the_forward(model: DifnetForConditionalGeneration) -> None:
    features, labels = random_features(model.config), random_captions(model.config)[:, 1:]
    compare(lambda: model(**features, labels=labels).loss, model, backend="aot_eager", fullgraph=True)


def test_log_probabilities_of_tokens(model: DifnetForConditionalGeneration) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(7, model.config.d_model, generator=generator)
    targets = torch.randint(model.config.vocab_size, (7,), generator=generator)
    compare(
        lambda: sum(map(torch.sum, token_log_probs(model.lm_head, states, targets, True, True))),
        model,
        backend="aot_eager",
        fullgraph=True,
    )


@pytest.mark.parametrize("stage", [pytest.param("cross-entropy", marks=pytest.mark.slow), "self-critical"])
def test_the_losses_of_the_trainer(model: DifnetForConditionalGeneration, stage: str) -> None:
    """The number of tokens, padding left out, is not known to a compiler, which makes a second graph behind it."""
    features, sequences = random_features(model.config), random_captions(model.config, num_captions=6).view(2, 3, -1)
    sequences[0, 1, 4:] = model.config.pad_token_id
    log_probs, advantages = SequenceLogProbs(model), torch.linspace(-1, 1, 6).view(2, 3)

    def loss() -> torch.Tensor:
        if stage == "cross-entropy":
            values, means = log_probs(sequences, with_vocabulary_mean=True, **features)
            return cross_entropy_loss(values, 28, means, label_smoothing=0.1)
        return self_critical_loss(log_probs(sequences, **features), advantages, 20, 6)

    compare(loss, model, backend="eager")


@pytest.mark.parametrize("samples", ["sample", "greedy", "beam"])
def test_captions_of_self_critical_training(model: DifnetForConditionalGeneration, samples: str) -> None:
    """In a cache of fixed size, as `generate` of Transformers compiles its decoding."""
    config = CompileConfig(backend="eager", mode="default")
    config._compile_all_devices = True
    number = 1 if samples == "greedy" else 3
    captions = []
    for settings in ({}, {"cache_implementation": "static", "compile_config": config}):
        torch.manual_seed(0)
        captions.append(decode_for_scst(model, random_features(model.config), samples, number, 6, **settings))
    assert torch.equal(*captions)
