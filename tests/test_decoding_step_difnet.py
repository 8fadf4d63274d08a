"""The fast decoding step: equal to the plain forward, up to date with the weights, and out of the way elsewhere."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import random_captions, random_features, random_model
from torch import nn

from difnet_transformers.training import make_optimizer
from difnet_transformers.training.regularization import WeightAverage, set_dropout
from modeling_difnet import DifnetConfig, DifnetEnsemble, DifnetForConditionalGeneration, original_beam_search
from modeling_difnet.beam_search_difnet import OriginalBeamSearchOutput
from modeling_difnet.decoding_step_difnet import (
    FastStep,
    ForwardStep,
    bits,
    decoding_step,
    projections_of_models,
)

NUM_BEAMS, NUM_STEPS = 3, 8
SETTINGS = {
    "custom_generate": original_beam_search,
    "num_beams": NUM_BEAMS,
    "num_return_sequences": NUM_BEAMS,
    "max_new_tokens": NUM_STEPS,
    "return_dict_in_generate": True,
}


@pytest.fixture(params=["two flows", "baseline"])
def config(tiny_config: DifnetConfig, request: pytest.FixtureRequest) -> DifnetConfig:
    return dataclasses.replace(tiny_config, use_segmentation=request.param == "two flows")


def captioner(config: DifnetConfig, seed: int = 0) -> DifnetForConditionalGeneration:
    """Random weights with logits so large that captions differ, and that they end."""
    model = random_model(config, seed)
    model.lm_head.weight.data *= 5
    return model


def search(model: nn.Module, features: dict[str, torch.Tensor], **settings: Any) -> OriginalBeamSearchOutput:
    return model.generate(**features, **SETTINGS, **settings)


def plain_search(model: nn.Module, features: dict[str, torch.Tensor], **settings: Any) -> OriginalBeamSearchOutput:
    """The search by the model's own forward, which a hook on it asks for."""
    hook = model.register_forward_pre_hook(lambda module, args: None)
    try:
        return search(model, features, **settings)
    finally:
        hook.remove()


def compare(found: OriginalBeamSearchOutput, expected: OriginalBeamSearchOutput, tolerance: float = 1e-5) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_log_probs, expected.sequences_log_probs, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def step_of(model: nn.Module, features: dict[str, torch.Tensor]) -> FastStep | ForwardStep:
    states = model.get_encoder()(**features).last_hidden_state
    return decoding_step(model, states, None, num_slots=9)


class TestEqualToTheForward:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_captions_and_log_probabilities(self, config: DifnetConfig, attention: str, seed: int) -> None:
        model, features = captioner(config, seed), random_features(config, 4, seed=seed)
        model.set_attn_implementation(attention)
        assert isinstance(step_of(model, features), FastStep)
        compare(search(model, features), plain_search(model, features))

    def test_in_float64(self, config: DifnetConfig) -> None:
        model = captioner(config).double()
        features = {name: value.double() for name, value in random_features(config, 3).items()}
        compare(search(model, features), plain_search(model, features), tolerance=1e-12)

    @pytest.mark.parametrize("vocab_size", [6, 8, 12])
    def test_where_images_end_early_and_words_are_padding(self, tiny_config: DifnetConfig, vocab_size: int) -> None:
        config = dataclasses.replace(tiny_config, vocab_size=vocab_size)
        for seed in range(4):
            model, features = captioner(config, seed), random_features(config, 5, seed=seed)
            compare(search(model, features), plain_search(model, features))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_masked_cells_and_prompts(self, config: DifnetConfig, side: str) -> None:
        model, features = captioner(config), random_features(config, 3)
        features["grid_attention_mask"] = torch.tensor([[1] * 12, [1] * 7 + [0] * 5, [1] + [0] * 11])
        prompts = random_captions(config, num_captions=3, length=4)
        mask = torch.ones_like(prompts)
        padded = {"left": slice(0, 2), "right": slice(2, 4)}[side]
        mask[1, padded] = 0
        prompts[1, padded] = config.pad_token_id
        prompts[2, 2] = config.pad_token_id  # a padding within
        inputs = {"decoder_input_ids": prompts, "decoder_attention_mask": mask}
        compare(search(model, features, **inputs), plain_search(model, features, **inputs))

    @pytest.mark.parametrize("dropout", [0.1, 0.0])
    def test_in_training_mode_dropout_falls_in_the_same_places(self, config: DifnetConfig, dropout: float) -> None:
        """With eager attention both draw the same random numbers."""
        model, features = captioner(config).train(), random_features(config, 3)
        model.set_attn_implementation("eager")
        set_dropout(model, dropout)
        torch.manual_seed(0)
        found = search(model, features)
        torch.manual_seed(0)
        compare(found, plain_search(model, features))
        assert torch.equal(found.sequences, search(model, features).sequences) == (dropout == 0)

    def test_under_autocast(self, config: DifnetConfig) -> None:
        """Projections in bfloat16, the states between them in float32: the difference is one of rounding."""
        model, features = captioner(config), random_features(config, 3)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            states = model.get_encoder()(**features).last_hidden_state
            fast, plain = decoding_step(model, states, None, 9), ForwardStep(model, states, None)
            assert isinstance(fast, FastStep)
            tokens = torch.tensor([[2, 8, 9]] * 3)
            torch.testing.assert_close(fast.logits(tokens), plain.logits(tokens), rtol=0.05, atol=0.3)

    def test_in_bfloat16(self, config: DifnetConfig) -> None:
        model = captioner(config).bfloat16()
        features = {name: value.bfloat16() for name, value in random_features(config, 3).items()}
        states = model.get_encoder()(**features).last_hidden_state.detach()
        with torch.no_grad():
            fast, plain = decoding_step(model, states, None, 9), ForwardStep(model, states, None)
            assert isinstance(fast, FastStep)
            tokens = torch.tensor([[2, 8, 9]] * 3)
            torch.testing.assert_close(fast.logits(tokens), plain.logits(tokens), rtol=0.05, atol=0.3)


def multiply(model: DifnetForConditionalGeneration) -> None:
    with torch.no_grad():
        model.model.decoder.layers[1].self_attn.k_proj.weight.mul_(3)


def multiply_data(model: DifnetForConditionalGeneration) -> None:
    """PyTorch does not count what is written through `.data`."""
    model.model.decoder.layers[0].feed_forward.fc2.bias.data.add_(1)


def swap_rows(model: DifnetForConditionalGeneration) -> None:
    """A sum of the bits stays what it was."""
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))


def replace_parameter(model: DifnetForConditionalGeneration) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.flip(0))


def train_one_step(model: DifnetForConditionalGeneration) -> None:
    """The fused optimizer, whose changes PyTorch does not count."""
    optimizer = make_optimizer(model, (0.9, 0.98), 0.05)
    model.sequence_log_probs(random_captions(model.config), **random_features(model.config)).sum().backward()
    optimizer.step()


def load_weights(model: DifnetForConditionalGeneration) -> None:
    model.load_state_dict(captioner(model.config, seed=7).state_dict())


def round_to_half(model: DifnetForConditionalGeneration) -> None:
    """To another type and back."""
    model.bfloat16().float()


def average_weights(model: DifnetForConditionalGeneration) -> None:
    average = WeightAverage(model, 0.9)
    for weight in average.weights.values():
        weight.mul_(1.5)
    model.context = average.applied()  # which ends where nothing refers to it
    model.context.__enter__()


CHANGES = [
    *(multiply, multiply_data, swap_rows, replace_parameter, train_one_step, load_weights, round_to_half),
    average_weights,
]


class TestWeightsThatChange:
    def test_they_are_packed_once(self, config: DifnetConfig) -> None:
        model, features = captioner(config), random_features(config)
        search(model, features)
        kept = projections_of_models[model]
        search(model, features)
        assert projections_of_models[model] is kept

    @pytest.mark.parametrize("change", CHANGES)
    def test_every_change_is_seen(self, tiny_config: DifnetConfig, change: Callable) -> None:
        model, features = captioner(tiny_config), random_features(tiny_config)
        before = search(model, features)
        change(model)
        found = search(model, features)
        compare(found, plain_search(model, features))
        assert not torch.equal(found.sequences_scores, before.sequences_scores), "a change that shows nothing"

    def test_other_precisions_of_one_model_take_turns(self, tiny_config: DifnetConfig) -> None:
        model, features = captioner(tiny_config), random_features(tiny_config)
        before = search(model, features)
        with torch.autocast("cpu", torch.bfloat16):
            search(model, features)
            assert projections_of_models[model].dtype == torch.bfloat16
        compare(search(model, features), before, tolerance=0)

    def test_none_are_kept_in_training(self, tiny_config: DifnetConfig) -> None:
        model, features = captioner(tiny_config), random_features(tiny_config)
        search(model, features)
        search(model.train(), features)
        assert model not in projections_of_models

    def test_they_go_with_their_model(self, tiny_config: DifnetConfig) -> None:
        model, features = captioner(tiny_config), random_features(tiny_config)
        search(model, features)
        number = len(projections_of_models)
        del model
        assert len(projections_of_models) == number - 1

    def test_a_copied_model_has_its_own(self, tiny_config: DifnetConfig) -> None:
        model, features = captioner(tiny_config), random_features(tiny_config)
        before = search(model, features)
        other = copy.deepcopy(model)
        multiply(other)
        compare(search(other, features), plain_search(other, features))
        compare(search(model, features), before, tolerance=0)

    def test_weights_of_inference_mode_are_not_counted_and_still_seen(self, tiny_config: DifnetConfig) -> None:
        features = random_features(tiny_config)
        with torch.inference_mode():
            model = captioner(tiny_config)
            before = search(model, features)
            model.model.decoder.layers[0].feed_forward.fc2.weight.mul_(3)
            found = search(model, features)
            compare(found, plain_search(model, features))
        assert not torch.equal(found.sequences_scores, before.sequences_scores)

    @pytest.mark.parametrize("offset", [0, 1])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_a_tensor_as_integers(self, dtype: torch.dtype, offset: int) -> None:
        tensor = torch.arange(12, dtype=dtype)[offset : offset + 10].view(2, 5)
        changed = tensor.clone()
        changed[1, 2] = 40
        assert bits(tensor).sum() != bits(changed).sum()


def lora(model: DifnetForConditionalGeneration) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj", "fc1"]), model)


class Doubled(nn.Linear):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(states)


def other_layer(model: DifnetForConditionalGeneration) -> nn.Module:
    old = model.model.decoder.layers[0].feed_forward.fc1
    model.model.decoder.layers[0].feed_forward.fc1 = new = Doubled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    return model


def hook_on_a_layer(model: DifnetForConditionalGeneration) -> nn.Module:
    model.model.decoder.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
    return model


def own_forward(model: DifnetForConditionalGeneration) -> nn.Module:
    layer = model.model.decoder.layers[0].self_attn.out_proj
    layer.forward = lambda states: 2 * type(layer).forward(layer, states)
    return model


def parametrization(model: DifnetForConditionalGeneration) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


def ensemble(model: DifnetForConditionalGeneration) -> nn.Module:
    return DifnetEnsemble([model, captioner(model.config, seed=1)])


def subclass(model: DifnetForConditionalGeneration) -> nn.Module:
    class Sharper(DifnetForConditionalGeneration):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    sharper = Sharper(model.config).eval()
    sharper.load_state_dict(model.state_dict())
    return sharper


OTHERS = [lora, other_layer, hook_on_a_layer, own_forward, parametrization, ensemble, subclass]


class TestOtherModels:
    @pytest.mark.parametrize("change", OTHERS)
    def test_they_keep_their_own_forward(self, tiny_config: DifnetConfig, change: Callable) -> None:
        features = random_features(tiny_config)
        model = change(captioner(tiny_config))
        assert isinstance(step_of(model, features), ForwardStep)
        compare(search(model, features), plain_search(model, features), tolerance=0)

    def test_a_hook_on_all_modules_of_the_process(self, tiny_config: DifnetConfig) -> None:
        model, features = captioner(tiny_config), random_features(tiny_config)
        hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
        try:
            assert isinstance(step_of(model, features), ForwardStep)
        finally:
            hook.remove()

    def test_with_a_graph(self, tiny_config: DifnetConfig) -> None:
        model, features = captioner(tiny_config), random_features(tiny_config)
        states = model.get_encoder()(**features).last_hidden_state
        assert isinstance(decoding_step(model, states, None, 9), ForwardStep)

    def test_with_a_bias_of_the_projection(self, tiny_config: DifnetConfig) -> None:
        model, features = captioner(tiny_config), random_features(tiny_config)
        weight = model.lm_head.weight
        model.lm_head = nn.Linear(*reversed(weight.shape))
        model.lm_head.weight = weight
        assert isinstance(step_of(model, features), FastStep)
        compare(search(model, features), plain_search(model, features))
