"""Captions: every mode of `generate`, the original's beam search, log-probabilities of captions."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import random_captions, random_features, random_model
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration, original_beam_search, sequence_log_probs


@pytest.fixture(params=["two flows", "baseline"])
def config(tiny_config: DifnetConfig, request: pytest.FixtureRequest) -> DifnetConfig:
    return dataclasses.replace(tiny_config, use_segmentation=request.param == "two flows")


def decisive(model: DifnetForConditionalGeneration, factor: float = 4.0) -> DifnetForConditionalGeneration:
    """Random weights give all words nearly the same chance; larger logits give captions that differ and that end."""
    model.lm_head.weight.data *= factor
    return model


def total_log_probs(model: DifnetForConditionalGeneration, sequences: torch.Tensor, **features) -> torch.Tensor:
    return sequence_log_probs(model, sequences, **features).sum(-1)


# --- `generate` of Transformers --------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_search_takes_the_likeliest_word_each_time(config: DifnetConfig) -> None:
    model, features = decisive(random_model(config)), random_features(config, batch_size=3)
    sequences = model.generate(**features, max_new_tokens=8, num_beams=1, eos_token_id=None)
    expected = torch.full((3, 1), config.bos_token_id)
    for _ in range(8):
        word = model(**features, decoder_input_ids=expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, word], dim=1)
    assert torch.equal(sequences, expected)


MODES = {
    "greedy": {"num_beams": 1},
    "sampling": {"num_beams": 1, "do_sample": True, "top_k": 0},
    "beams": {"num_beams": 4},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several of each": {"num_beams": 4, "num_return_sequences": 3},
    "several samples": {"num_beams": 1, "do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_caches_do_not_change_captions(config: DifnetConfig, mode: str) -> None:
    """Without a cache, with the growing one and with the fixed-size one: the same captions."""
    model, features = decisive(random_model(config)), random_features(config)
    captions = []
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        captions.append(model.generate(**features, **MODES[mode], **cache, max_new_tokens=8))
    assert captions[0].shape[0] == 2 * MODES[mode].get("num_return_sequences", 1)
    assert torch.equal(captions[0], captions[1])
    assert torch.equal(captions[0], captions[2])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_image_gets_the_same_caption_alone_and_in_a_batch(config: DifnetConfig, attention: str) -> None:
    model, features = decisive(random_model(config)), random_features(config, batch_size=3)
    model.set_attn_implementation(attention)
    together = model.generate(**features, num_beams=3, max_new_tokens=8)
    for i in range(3):
        alone = model.generate(
            **{name: value[i : i + 1] for name, value in features.items()}, num_beams=3, max_new_tokens=8
        )
        assert torch.equal(together[i, : alone.shape[1]], alone[0])


@torch.no_grad()
def test_masks_reach_every_step(config: DifnetConfig) -> None:
    model, features = decisive(random_model(config)), random_features(config, height=1, width=8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[:, 5:] = 0
    masks = {"grid_attention_mask": mask}
    if config.use_segmentation:
        masks["segmentation_attention_mask"] = mask
    shorter = {name: value[:, :5] if value.ndim == 3 else value[..., :5] for name, value in features.items()}
    for search in ({"num_beams": 3}, {"num_beams": 3, "custom_generate": original_beam_search}):
        masked = model.generate(**features, **masks, **search, max_new_tokens=8)
        assert torch.equal(masked, model.generate(**shorter, **search, max_new_tokens=8))


@pytest.mark.parametrize("mode", ["greedy", "beams", "several of each"])
@torch.no_grad()
def test_scores_are_the_log_probabilities_of_the_captions(config: DifnetConfig, mode: str) -> None:
    model, features = decisive(random_model(config)), random_features(config)
    model.generation_config.length_penalty = 0.0
    output = model.generate(
        **features, **MODES[mode], max_new_tokens=8, output_scores=True, return_dict_in_generate=True
    )
    transition_scores = model.compute_transition_scores(
        output.sequences, output.scores, output.get("beam_indices"), normalize_logits=mode == "greedy"
    )
    is_word = output.sequences[:, 1:] != config.pad_token_id
    log_probs = sequence_log_probs(model, output.sequences, **features)
    torch.testing.assert_close(transition_scores[is_word], log_probs[is_word], atol=1e-4, rtol=1e-4)
    if mode != "greedy":
        torch.testing.assert_close(output.sequences_scores, log_probs.sum(-1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_outputs_of_all_steps(tiny_config: DifnetConfig) -> None:
    model, features = random_model(tiny_config), random_features(tiny_config)
    model.set_attn_implementation("eager")
    output = model.generate(
        **features,
        num_beams=3,
        max_new_tokens=4,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_attentions=True,
        output_hidden_states=True,
        output_logits=True,
    )
    assert len(output.cross_attentions) == len(output.decoder_hidden_states) == len(output.logits) == 4
    assert [tuple(weights.shape) for weights in output.cross_attentions[2]] == [(6, 2, 1, 12)] * 2
    assert len(output.encoder_attentions) == 3


@pytest.mark.parametrize("drafter", ["the model itself", "a smaller model", "the caption so far"])
@torch.no_grad()
def test_assisted_generation_gives_the_greedy_caption(config: DifnetConfig, drafter: str) -> None:
    model, features = decisive(random_model(config)), random_features(config, batch_size=1)
    assistant = {
        "the model itself": lambda: {"assistant_model": model},
        "a smaller model": lambda: {
            "assistant_model": decisive(random_model(dataclasses.replace(config, decoder_layers=1), seed=1))
        },
        "the caption so far": lambda: {"prompt_lookup_num_tokens": 2},
    }[drafter]()
    greedy = model.generate(**features, num_beams=1, max_new_tokens=12)
    assert torch.equal(model.generate(**features, **assistant, num_beams=1, max_new_tokens=12), greedy)


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@torch.no_grad()
def test_streaming_gives_the_words_as_they_come(config: DifnetConfig) -> None:
    model, features, streamer = decisive(random_model(config)), random_features(config, batch_size=1), Collector()
    sequences = model.generate(**features, num_beams=1, max_new_tokens=8, streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == sequences[0].tolist()


@torch.no_grad()
def test_a_callable_of_ones_own_gets_the_prepared_inputs(config: DifnetConfig) -> None:
    def two_words(model, input_ids, logits_processor, stopping_criteria, generation_config, word, **model_kwargs):
        assert model_kwargs["encoder_outputs"].last_hidden_state.shape[0] == 4
        return torch.cat([input_ids, torch.full((len(input_ids), 2), word)], dim=1)

    model, features = random_model(config), random_features(config)
    sequences = model.generate(**features, num_beams=2, custom_generate=two_words, word=7)
    assert sequences.tolist() == [[2, 7, 7]] * 4


@torch.no_grad()
def test_continuing_from_a_returned_cache(config: DifnetConfig) -> None:
    """Transformers cuts off the words that are in the cache where `decoder_attention_mask` covers all of them."""
    model, features = decisive(random_model(config)), random_features(config)
    settings = {"num_beams": 1, "eos_token_id": None, "return_dict_in_generate": True}
    whole = model.generate(**features, **settings, max_new_tokens=8)
    first = model.generate(**features, **settings, max_new_tokens=3)
    rest = model.generate(
        **features,
        **settings,
        max_new_tokens=5,
        decoder_input_ids=first.sequences,
        decoder_attention_mask=torch.ones_like(first.sequences),
        past_key_values=first.past_key_values,
    )
    assert torch.equal(rest.sequences, whole.sequences)


@pytest.mark.parametrize("search", ["transformers", "original"])
@torch.no_grad()
def test_a_prompt_is_continued(config: DifnetConfig, search: str) -> None:
    custom = {"custom_generate": original_beam_search} if search == "original" else {}
    model, features = decisive(random_model(config)), random_features(config)
    prompt = random_captions(config, length=4)
    sequences = model.generate(**features, **custom, decoder_input_ids=prompt, num_beams=3, max_new_tokens=5)
    assert torch.equal(sequences[:, :4], prompt)
    assert 4 < sequences.shape[1] <= 9


@torch.no_grad()
def test_an_encoded_image_needs_no_features(config: DifnetConfig) -> None:
    model, features = decisive(random_model(config)), random_features(config)
    encoder_outputs = model.get_encoder()(**features)
    for search in ({"num_beams": 1}, {"num_beams": 3}, {"num_beams": 3, "custom_generate": original_beam_search}):
        encoded = model.generate(encoder_outputs=encoder_outputs, **search, max_new_tokens=6)
        assert torch.equal(encoded, model.generate(**features, **search, max_new_tokens=6))


@torch.no_grad()
def test_settings_saved_with_a_model_are_its_defaults(tiny_config: DifnetConfig, tmp_path: Path) -> None:
    model, features = decisive(random_model(tiny_config)), random_features(tiny_config)
    settings = {"num_beams": 3, "max_new_tokens": 7, "length_penalty": 0.0, "early_stopping": "never"}
    expected = model.generate(**features, **settings)
    model.generation_config.update(**settings)
    model.save_pretrained(tmp_path)
    assert torch.equal(DifnetForConditionalGeneration.from_pretrained(tmp_path).generate(**features), expected)


@pytest.mark.parametrize("custom", [None, original_beam_search])
@torch.no_grad()
def test_captions_may_fill_the_position_table_and_not_more(tiny_config: DifnetConfig, custom: Callable | None) -> None:
    model, features = random_model(tiny_config), random_features(tiny_config)
    settings = {"num_beams": 2, "eos_token_id": None, "custom_generate": custom}
    assert model.generate(**features, **settings, max_new_tokens=30).shape == (2, 31)
    with pytest.raises(ValueError, match=r"position table of this model ends at 30\. Ask for `max_new_tokens=30`"):
        model.generate(**features, **settings, max_new_tokens=31)
    with pytest.raises(ValueError, match="`max_new_tokens=26`"):
        model.generate(
            **features, **settings, max_new_tokens=27, decoder_input_ids=random_captions(tiny_config, length=5)
        )


# --- the original's beam search --------------------------------------------------------------------------------------


class Tilt(LogitsProcessor):
    """Adds a number of its own to each token, so that no two continuations tie: the order of ties is not defined."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores + torch.linspace(0, 0.01, scores.shape[-1]).sqrt()


@torch.no_grad()
def plain_beam_search(
    model: DifnetForConditionalGeneration, features: dict, prompts: torch.Tensor, num_beams: int, num_steps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The original's search as it is defined: no cache, one image at a time, a full sort, all steps.

    Returns tokens and log-probabilities (B, num_beams, num_steps), where 0 follows `<eos>`, and scores (B, num_beams).
    """
    results = []
    for i in range(len(prompts)):
        image_features = {name: value[i : i + 1] for name, value in features.items()}
        hypotheses = [(0.0, prompts[i].tolist(), [], False)]  # score, tokens, log-probabilities, finished
        for _ in range(num_steps):
            candidates = []
            for score, tokens, log_probs, finished in hypotheses:
                if finished:  # one real candidate: token 0 with log-probability 0
                    candidates.append((score, [*tokens, 0], [*log_probs, 0.0], True))
                    continue
                logits = model(**image_features, decoder_input_ids=torch.tensor([tokens]), use_cache=False).logits[
                    0, -1
                ]
                for token, log_prob in enumerate(Tilt()(None, logits.log_softmax(-1)).tolist()):
                    candidates.append((score + log_prob, [*tokens, token], [*log_probs, log_prob], token == 3))
            hypotheses = sorted(candidates, key=lambda candidate: -candidate[0])[:num_beams]
        results.append(hypotheses)
    prompt_length = prompts.shape[1]
    return (
        torch.tensor([[tokens[prompt_length:] for _, tokens, _, _ in hypotheses] for hypotheses in results]),
        torch.tensor([[log_probs for _, _, log_probs, _ in hypotheses] for hypotheses in results]),
        torch.tensor([[score for score, _, _, _ in hypotheses] for hypotheses in results]),
    )


def compare_with_plain_search(config, seed, factor, batch_size, num_beams, prompts=None, masked=False, num_steps=20):
    model = decisive(random_model(config, seed), factor)
    features = random_features(config, batch_size, seed=seed)
    if masked:
        mask = torch.ones(batch_size, 12, dtype=torch.long)
        mask[-1, 4:] = 0
        features["grid_attention_mask"] = mask
    if prompts is None:
        prompts = torch.full((batch_size, 1), config.bos_token_id)
    tokens, log_probs, scores = plain_beam_search(model, features, prompts, num_beams, num_steps)
    output = model.generate(
        **features,
        decoder_input_ids=prompts,
        custom_generate=original_beam_search,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=num_steps,
        logits_processor=LogitsProcessorList([Tilt()]),
        return_dict_in_generate=True,
    )
    sequences = output.sequences.view(batch_size, num_beams, -1)
    length = sequences.shape[2] - prompts.shape[1]
    after_eos = (tokens == 3).cumsum(-1) - (tokens == 3).long() > 0
    expected = tokens.masked_fill(after_eos, config.pad_token_id)
    assert torch.equal(sequences[:, :, : prompts.shape[1]], prompts.unsqueeze(1).expand(-1, num_beams, -1))
    assert torch.equal(sequences[:, :, prompts.shape[1] :], expected[:, :, :length])
    assert after_eos[:, :, length:].all(), "the search ends early only when all hypotheses are finished"
    found = output.sequences_log_probs.view(batch_size, num_beams, -1)
    torch.testing.assert_close(found, log_probs[:, :, :length], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.sequences_scores.view(batch_size, num_beams), scores, atol=1e-4, rtol=1e-4)
    return expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_beams", "batch_size"), [(1, 2), (2, 3), (5, 4)])
def test_original_beam_search_equals_the_plain_search(
    config: DifnetConfig, seed: int, num_beams: int, batch_size: int
) -> None:
    compare_with_plain_search(config, seed, factor=4.0, batch_size=batch_size, num_beams=num_beams, num_steps=12)


@pytest.mark.parametrize("factor", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_with_hypotheses_that_end_or_emit_pad_early(tiny_config: DifnetConfig, seed: int, factor: float) -> None:
    """A vocabulary of six makes `<eos>` and `<pad>` frequent. A generated `<pad>` is hidden from later words."""
    config = dataclasses.replace(tiny_config, vocab_size=6)
    found = compare_with_plain_search(config, seed, factor, batch_size=3, num_beams=4)
    ended = (found == config.eos_token_id).any(-1)
    assert ended.any(), "a case that shows nothing"


@pytest.mark.parametrize("seed", range(2))
def test_with_masked_cells_and_prompts(config: DifnetConfig, seed: int) -> None:
    prompts = random_captions(config, num_captions=3, length=4, seed=seed)
    prompts[1, 2] = config.pad_token_id
    compare_with_plain_search(config, seed, 3.0, 3, num_beams=3, prompts=prompts, masked=True, num_steps=10)


@pytest.mark.parametrize(("vocab_size", "seed"), [(8, 4), (12, 3)])
def test_where_one_image_ends_before_the_others(tiny_config: DifnetConfig, vocab_size: int, seed: int) -> None:
    """Images whose hypotheses are all finished are no longer computed: the others must not notice."""
    config = dataclasses.replace(tiny_config, vocab_size=vocab_size)
    found = compare_with_plain_search(config, seed, 4.0, batch_size=5, num_beams=2)
    lengths = {int((image_features != config.pad_token_id).any(0).sum()) for image_features in found}
    assert len(lengths) > 2, "a case that shows nothing"


@torch.no_grad()
def test_fewer_sequences_are_the_best_ones(config: DifnetConfig) -> None:
    model, features = decisive(random_model(config)), random_features(config)
    best, all_five = (
        model.generate(
            **features,
            custom_generate=original_beam_search,
            num_beams=5,
            num_return_sequences=count,
            max_new_tokens=20,
        )
        for count in (1, 5)
    )
    width = best.shape[1]
    assert torch.equal(all_five[::5, :width], best)


@torch.no_grad()
def test_the_search_can_be_reached_from_the_class(config: DifnetConfig) -> None:
    """So that a checkpoint that brings its own code brings its beam search along."""
    model, features = decisive(random_model(config)), random_features(config)
    settings = {"num_beams": 3, "max_new_tokens": 8}
    reached = model.generate(**features, **settings, custom_generate=model.original_beam_search)
    assert torch.equal(reached, model.generate(**features, **settings, custom_generate=original_beam_search))


@torch.no_grad()
def test_scores_of_the_original_search_are_log_probabilities(config: DifnetConfig) -> None:
    model, features = decisive(random_model(config)), random_features(config)
    output = model.generate(
        **features,
        custom_generate=original_beam_search,
        num_beams=5,
        num_return_sequences=5,
        max_new_tokens=20,
        return_dict_in_generate=True,
    )
    log_probs = sequence_log_probs(model, output.sequences, **features)
    torch.testing.assert_close(output.sequences_log_probs, log_probs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.sequences_scores, log_probs.sum(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"do_sample": True}, "does not sample"),
        (
            {"output_attentions": True, "return_dict_in_generate": True},
            "does not return what `output_attentions=True`",
        ),
        ({"output_logits": True, "return_dict_in_generate": True}, "`output_logits=True`"),
        ({"max_time": 1.0}, "does not know MaxTimeCriteria"),
        ({"decoder_position_ids": torch.ones(2, 4, dtype=torch.long)}, "takes no `decoder_position_ids`"),
    ],
)
def test_what_the_original_search_would_have_to_ignore_is_refused(
    tiny_config: DifnetConfig, arguments: dict, message: str
) -> None:
    model, features = random_model(tiny_config), random_features(tiny_config)
    with pytest.raises(ValueError, match=message):
        model.generate(
            **features,
            decoder_input_ids=random_captions(tiny_config, length=4),
            custom_generate=original_beam_search,
            num_beams=2,
            max_new_tokens=8,
            **arguments,
        )


def test_the_original_search_starts_from_an_empty_cache(tiny_config: DifnetConfig) -> None:
    model, features = random_model(tiny_config), random_features(tiny_config)
    captions = random_captions(tiny_config)
    cache = model(**features, decoder_input_ids=captions, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="takes no filled `past_key_values`"):
        model.generate(
            **features,
            decoder_input_ids=captions,
            past_key_values=cache,
            custom_generate=original_beam_search,
            num_beams=1,
            max_new_tokens=8,
        )


# --- log-probabilities of given captions -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["flat", "by image"])
def test_sequence_log_probs_are_the_log_softmax_of_the_forward(config: DifnetConfig, shape: str) -> None:
    model, features = random_model(config), random_features(config)
    sequences = random_captions(config, num_captions=6, length=7)
    sequences[1, 4] = config.eos_token_id
    sequences[1, 5:] = config.pad_token_id
    logits = model(**features, decoder_input_ids=sequences[:, :-1]).logits
    targets = sequences[:, 1:]
    expected = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    expected = expected.masked_fill(targets == config.pad_token_id, 0)
    given = sequences if shape == "flat" else sequences.view(2, 3, 7)
    found = sequence_log_probs(model, given, **features)
    assert found.shape == (*given.shape[:-1], 6)
    torch.testing.assert_close(found.flatten(0, -2), expected)
    assert torch.equal(found, model.sequence_log_probs(given, **features))


def test_gradients_of_sequence_log_probs_equal_those_of_repeated_images(config: DifnetConfig) -> None:
    model, features = random_model(config), random_features(config)
    features["grid_attention_mask"] = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
    sequences = random_captions(config, num_captions=6, length=7)
    rewards = torch.randn(6, generator=torch.Generator().manual_seed(0))
    repeated = {name: value.repeat_interleave(3, dim=0) for name, value in features.items()}
    results = []
    for shown in (features, repeated):
        model.zero_grad()
        (total_log_probs(model, sequences, **shown) * rewards).sum().backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert results[0]["model.encoder.grid_embedding.projection.weight"].abs().max() > 0
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], atol=1e-4, rtol=1e-4, msg=name)


def test_sequence_log_probs_of_an_encoded_image(config: DifnetConfig) -> None:
    model, features, sequences = random_model(config), random_features(config), random_captions(config)
    found = sequence_log_probs(model, sequences, encoder_outputs=model.get_encoder()(**features))
    assert torch.equal(found, sequence_log_probs(model, sequences, **features))
