"""What users ask of `generate`: processors and scores beside the original's search, prompts, options, refusals."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from conftest import random_captions, random_model, random_pictures
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from modeling_difnet import DifnetConfig, DifnetEnsemble, DifnetForConditionalGeneration, original_beam_search

ORIGINAL = {"custom_generate": original_beam_search, "num_beams": 4, "max_new_tokens": 8}
NUM_IMAGES = 6


def captioner(config: DifnetConfig, factor: float = 5.0, seed: int = 0) -> DifnetForConditionalGeneration:
    """Random weights whose captions differ between images and end at different lengths."""
    model = random_model(config, seed)
    model.lm_head.weight.data *= factor
    return model


def member_or_ensemble(config: DifnetConfig, kind: str) -> DifnetForConditionalGeneration | DifnetEnsemble:
    if kind == "one model":
        return captioner(config)
    return DifnetEnsemble([captioner(config, seed=seed) for seed in (0, 1)])


def of_image(pictures: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    return {name: value[i : i + 1] for name, value in pictures.items()}


class Recorder(LogitsProcessor):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.prefixes: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        assert len(input_ids) == len(scores)
        self.prefixes.append(input_ids.clone())
        return scores


@pytest.fixture
def short_config(tiny_config: DifnetConfig) -> DifnetConfig:
    """Few words, so that hypotheses end early and images are left out."""
    return dataclasses.replace(tiny_config, vocab_size=12)


# --- processors beside the original's search -------------------------------------------------------------------------


@torch.no_grad()
def test_processors_see_every_row_of_the_batch_at_every_step(short_config: DifnetConfig) -> None:
    model, pictures = captioner(short_config), random_pictures(short_config, NUM_IMAGES)
    prompts = random_captions(short_config, NUM_IMAGES, length=3)
    recorder = Recorder()
    sequences = model.generate(
        **pictures,
        **(ORIGINAL | {"max_new_tokens": 20}),
        decoder_input_ids=prompts,
        logits_processor=LogitsProcessorList([recorder]),
    )
    ends = (sequences == short_config.eos_token_id).float().argmax(1)
    assert len(set(ends.tolist())) > 1, "a case in which no image ends before the others shows nothing"
    for step, prefixes in enumerate(recorder.prefixes):
        assert prefixes.shape == (NUM_IMAGES * 4, 3 + step)
        assert torch.equal(prefixes[:, :3], prompts.repeat_interleave(4, dim=0))


@pytest.mark.parametrize("kind", ["one model", "ensemble"])
@torch.no_grad()
def test_words_that_are_allowed_for_one_image_are_of_no_concern_to_others(
    short_config: DifnetConfig, kind: str
) -> None:
    model, pictures = member_or_ensemble(short_config, kind), random_pictures(short_config, NUM_IMAGES)
    allowed = [[3, 4 + i, 5 + i] for i in range(NUM_IMAGES)]
    together = model.generate(**pictures, **ORIGINAL, prefix_allowed_tokens_fn=lambda image, words: allowed[image])
    for i in range(NUM_IMAGES):
        alone = model.generate(**of_image(pictures, i), **ORIGINAL, prefix_allowed_tokens_fn=lambda *_: allowed[i])[0]
        assert torch.equal(together[i, : len(alone)], alone)
        assert set(together[i].tolist()) <= {1, 2, *allowed[i]}


@torch.no_grad()
def test_captions_from_a_list_for_each_image(short_config: DifnetConfig) -> None:
    """The function knows the beginnings of its captions alone: it is never asked about another open one."""
    model, pictures = captioner(short_config), random_pictures(short_config, 3)
    captions = [[[4, 5, 3], [6, 7, 8, 3]], [[9, 10, 11, 4, 3]], [[5, 3], [6, 6, 6, 6, 3]]]

    def next_words(image: int, words: torch.Tensor) -> list[int]:
        words = words.tolist()[1:]
        if 3 in words:
            return [short_config.pad_token_id]
        return sorted({caption[len(words)] for caption in captions[image] if caption[: len(words)] == words})

    sequences = model.generate(**pictures, **ORIGINAL, prefix_allowed_tokens_fn=next_words)
    for i, row in enumerate(sequences.tolist()):
        assert row[1 : row.index(3) + 1] in captions[i]


@torch.no_grad()
def test_processors_that_count_repetitions_do_not_mix_images(short_config: DifnetConfig) -> None:
    model, pictures = captioner(short_config), random_pictures(short_config, NUM_IMAGES)
    options = {"no_repeat_ngram_size": 1, "repetition_penalty": 1.7}
    together = model.generate(**pictures, **ORIGINAL, **options)
    for i in range(NUM_IMAGES):
        alone = model.generate(**of_image(pictures, i), **ORIGINAL, **options)[0]
        assert torch.equal(together[i, : len(alone)], alone)


@pytest.mark.parametrize("kind", ["one model", "ensemble"])
@pytest.mark.parametrize("num_returned", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=["plain", "processed"])
@torch.no_grad()
def test_transition_scores_of_the_original_search_add_up(
    short_config: DifnetConfig, kind: str, num_returned: int, options: dict
) -> None:
    model, pictures = member_or_ensemble(short_config, kind), random_pictures(short_config, NUM_IMAGES)
    search = {**pictures, **ORIGINAL, **options, "num_return_sequences": num_returned, "max_new_tokens": 20}
    output = model.generate(**search, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, model.generate(**search)), "asking for scores changes nothing"
    assert all(step.shape == (NUM_IMAGES * 4, 12) for step in output.scores)
    assert output.beam_indices.shape == output.sequences_log_probs.shape == output.sequences[:, 1:].shape
    rows = output.beam_indices // 4
    image = torch.arange(NUM_IMAGES).repeat_interleave(num_returned).unsqueeze(1)
    assert torch.equal(rows, image.expand_as(rows).masked_fill(output.beam_indices < 0, -1))
    transition_scores = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    torch.testing.assert_close(transition_scores, output.sequences_log_probs)
    torch.testing.assert_close(transition_scores.sum(1), output.sequences_scores)


@torch.no_grad()
def test_without_processors_and_scores_nothing_is_put_in_order(short_config: DifnetConfig) -> None:
    output = captioner(short_config).generate(
        **random_pictures(short_config), **ORIGINAL, return_dict_in_generate=True
    )
    assert output.scores is None and output.beam_indices is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_prompts_of_different_lengths_in_the_original_search(
    tiny_config: DifnetConfig, side: str, attention: str
) -> None:
    model, pictures = captioner(tiny_config), random_pictures(tiny_config, 3)
    model.set_attn_implementation(attention)
    lengths = [4, 1, 2]
    prompts = random_captions(tiny_config, 3, length=4)
    padded, mask = torch.full((3, 4), tiny_config.pad_token_id), torch.zeros(3, 4, dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(4 - length, 4) if side == "left" else slice(0, length)
        padded[row, where], mask[row, where] = prompts[row, :length], 1
    together = model.generate(**pictures, **ORIGINAL, decoder_input_ids=padded, decoder_attention_mask=mask)
    assert torch.equal(together[:, :4], padded)
    for row, length in enumerate(lengths):
        alone = model.generate(
            **of_image(pictures, row), **ORIGINAL, decoder_input_ids=prompts[row : row + 1, :length]
        )
        words = alone[0, length:]
        assert torch.equal(together[row, 4 : 4 + len(words)], words)
