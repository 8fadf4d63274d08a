"""`original_beam_search` with `cache_implementation="static"`: the same captions, by steps that a compiler takes."""

import dataclasses
import shutil
from typing import Any

import pytest
import torch
from conftest import random_captions, random_features, random_model
from torch._dynamo.utils import counters
from transformers import CompileConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList

from modeling_difnet import DifnetConfig, DifnetEnsemble, DifnetForConditionalGeneration, original_beam_search
from modeling_difnet.beam_search_difnet import OriginalBeamSearchOutput
from modeling_difnet.static_search_difnet import CHECK_EVERY, compiled_searches, tensors

NUM_BEAMS, NUM_STEPS = 3, 8
SETTINGS = {
    "custom_generate": original_beam_search,
    "num_beams": NUM_BEAMS,
    "num_return_sequences": NUM_BEAMS,
    "max_new_tokens": NUM_STEPS,
    "return_dict_in_generate": True,
}
STATIC = {"cache_implementation": "static"}


def captioner(config: DifnetConfig, seed: int = 0) -> DifnetForConditionalGeneration:
    """Random weights with logits so large that captions differ, and that they end."""
    model = random_model(config, seed)
    model.lm_head.weight.data *= 5
    return model


def search(model: torch.nn.Module, features: dict[str, torch.Tensor], **settings: Any) -> OriginalBeamSearchOutput:
    return model.generate(**features, **SETTINGS, **settings)


def compiled(backend: str) -> dict[str, Any]:
    """Settings with which `generate` of Transformers compiles on a CPU, too."""
    config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True
    return {**STATIC, "compile_config": config}


def compare(found: OriginalBeamSearchOutput, expected: OriginalBeamSearchOutput) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("sequences_log_probs", "sequences_scores"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


class TestWithoutACompiler:
    @pytest.mark.parametrize("use_segmentation", [True, False])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_captions_and_log_probabilities(
        self, tiny_config: DifnetConfig, attention: str, use_segmentation: bool
    ) -> None:
        config = dataclasses.replace(tiny_config, use_segmentation=use_segmentation)
        for seed in range(3):
            model, features = captioner(config, seed), random_features(config, 4, seed=seed)
            model.set_attn_implementation(attention)
            compare(search(model, features, **STATIC), search(model, features))
        assert model not in compiled_searches, "a CPU compiles only when it is told to"

    @pytest.mark.parametrize("vocab_size", [6, 8, 12])
    def test_where_images_end_early_and_words_are_padding(self, tiny_config: DifnetConfig, vocab_size: int) -> None:
        config = dataclasses.replace(tiny_config, vocab_size=vocab_size)
        for seed in range(4):
            model, features = captioner(config, seed), random_features(config, 5, seed=seed)
            compare(search(model, features, **STATIC), search(model, features))

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("length", [2, 4])
    def test_masked_cells_and_prompts(self, tiny_config: DifnetConfig, side: str, length: int) -> None:
        """Of fewer tokens than there are beams, and of more."""
        model, features = captioner(tiny_config), random_features(tiny_config, 3)
        features["grid_attention_mask"] = torch.tensor([[1] * 12, [1] * 7 + [0] * 5, [1] + [0] * 11])
        prompts = random_captions(tiny_config, num_captions=3, length=length)
        mask = torch.ones_like(prompts)
        padded = {"left": slice(0, 1), "right": slice(length - 1, length)}[side]
        mask[1, padded] = 0
        prompts[1, padded] = tiny_config.pad_token_id
        inputs = {"decoder_input_ids": prompts, "decoder_attention_mask": mask}
        compare(search(model, features, **inputs, **STATIC), search(model, features, **inputs))

    def test_in_bfloat16(self, tiny_config: DifnetConfig) -> None:
        model = captioner(tiny_config).bfloat16()
        features = {name: value.bfloat16() for name, value in random_features(tiny_config, 3).items()}
        found = search(model, features, **STATIC)
        assert found.sequences.shape[0] == 3 * NUM_BEAMS
        assert found.sequences_scores.isfinite().all()

    def test_what_it_does_not_serve_is_searched_as_before(self, tiny_config: DifnetConfig) -> None:
        """Processors, scores of all words, ensembles, hooks; and training, where dropout falls in the same places."""
        features = random_features(tiny_config)
        model = captioner(tiny_config)
        processors = LogitsProcessorList([ForbidWord(9)])
        ensemble = DifnetEnsemble([model, captioner(tiny_config, seed=1)])
        hooked = captioner(tiny_config, seed=2)
        hooked.model.decoder.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
        requests: list[tuple[torch.nn.Module, dict[str, Any]]] = [
            (model, {"logits_processor": processors}),
            (model, {"output_scores": True}),
            (ensemble, {}),
            (hooked, {}),
            (captioner(tiny_config).train(), {}),
        ]
        for searched, settings in requests:
            torch.manual_seed(0)
            expected = search(searched, features, **settings)
            torch.manual_seed(0)
            found = search(searched, features, **settings, **compiled("eager"))
            assert torch.equal(found.sequences, expected.sequences)
            assert torch.equal(found.sequences_scores, expected.sequences_scores)
            assert searched not in compiled_searches


class ForbidWord(LogitsProcessor):
    def __init__(self, word: int) -> None:
        self.word = word

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, self.word] = -torch.inf
        return scores


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    """`fullgraph=True`: a step that a compiler has to leave would be an error."""

    @pytest.mark.parametrize(
        "backend",
        [
            "aot_eager",
            pytest.param(
                "inductor",
                marks=[
                    pytest.mark.slow,
                    pytest.mark.skipif(shutil.which("g++") is None, reason="it needs a C++ compiler for the CPU"),
                ],
            ),
        ],
    )
    def test_captions_and_log_probabilities(self, tiny_config: DifnetConfig, backend: str) -> None:
        model, features = captioner(tiny_config), random_features(tiny_config, 4)
        expected, settings = search(model, features), compiled(backend)
        compare(search(model, features, **settings), expected)
        assert num_graphs() == 2, "one of the prompt, and one of all other steps"
        compare(search(model, features, **settings), expected)
        others = random_features(tiny_config, 4, seed=1)
        compare(search(model, others, **settings), search(model, others))
        assert num_graphs() == 2

    def test_searches_of_the_same_shapes_share_their_memory(self, tiny_config: DifnetConfig) -> None:
        model, settings = captioner(tiny_config), compiled("eager")
        addresses = []
        for seed in range(2):
            search(model, random_features(tiny_config, seed=seed), **settings)
            addresses.append([tensor.data_ptr() for tensor in tensors(compiled_searches[model].state)])
        assert addresses[0] == addresses[1]

    @pytest.mark.slow
    def test_other_numbers_of_images(self, tiny_config: DifnetConfig) -> None:
        model, settings = captioner(tiny_config), compiled("eager")
        for batch_size in (2, 3, 2, 1):
            features = random_features(tiny_config, batch_size)
            compare(search(model, features, **settings), search(model, features))

    def test_weights_that_change_are_seen(self, tiny_config: DifnetConfig) -> None:
        model, features = captioner(tiny_config), random_features(tiny_config)
        before = search(model, features, **compiled("eager"))
        model.lm_head.weight.data.mul_(1.5)
        found = search(model, features, **compiled("eager"))
        compare(found, search(model, features))
        assert not torch.equal(found.sequences_scores, before.sequences_scores)
        assert num_graphs() == 2

    def test_what_a_search_returns_stays_when_the_next_one_runs(self, tiny_config: DifnetConfig) -> None:
        model = captioner(tiny_config)
        first = search(model, random_features(tiny_config), **compiled("eager"))
        kept = first.sequences.clone(), first.sequences_log_probs.clone()
        search(model, random_features(tiny_config, seed=1), **compiled("eager"))
        assert torch.equal(first.sequences, kept[0])
        assert torch.equal(first.sequences_log_probs, kept[1])

    def test_it_ends_when_all_captions_have(self, tiny_config: DifnetConfig) -> None:
        model, features = captioner(tiny_config), random_features(tiny_config)
        settings = {"eos_token_id": list(range(4, tiny_config.vocab_size)), **compiled("eager")}
        search(model, features, **settings)
        assert compiled_searches[model].state.num_tokens.item() == CHECK_EVERY < NUM_STEPS

    def test_a_generation_config_asks_for_it_too(self, tiny_config: DifnetConfig) -> None:
        model, features = captioner(tiny_config), random_features(tiny_config)
        expected = search(model, features)
        model.generation_config = GenerationConfig(**model.generation_config.to_diff_dict(), **compiled("eager"))
        compare(search(model, features), expected)
        assert model in compiled_searches

    def test_disable_compile(self, tiny_config: DifnetConfig) -> None:
        model, features = captioner(tiny_config), random_features(tiny_config)
        compare(search(model, features, **compiled("eager"), disable_compile=True), search(model, features))
        assert model not in compiled_searches
