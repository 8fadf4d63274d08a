"""What users ask of `generate`: processors and scores beside the original's search, prompts, options, refusals."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_captions, random_features, random_model
from PIL import Image
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextStreamer
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_difnet import (
    DifnetConfig,
    DifnetEnsemble,
    DifnetFeatureExtractor,
    DifnetForConditionalGeneration,
    DifnetProcessor,
    DifnetTokenizer,
    original_beam_search,
)
from modeling_difnet.generation_difnet import default_generation_config
from modeling_difnet.pipeline_difnet import DifnetImageCaptioningPipeline

ORIGINAL = {"custom_generate": original_beam_search, "num_beams": 4, "max_new_tokens": 8}
NUM_IMAGES = 6
WORDS = ["<unk>", "<pad>", "<bos>", "<eos>", *(f"w{number}" for number in range(46))]


def captioner(config: DifnetConfig, factor: float = 5.0, seed: int = 0) -> DifnetForConditionalGeneration:
    """Random weights whose captions differ between images and end at different lengths."""
    model = random_model(config, seed)
    model.lm_head.weight.data *= factor
    return model


def short_captioner(config: DifnetConfig) -> DifnetForConditionalGeneration:
    """One whose images end one after another, so that the search leaves them out while others go on."""
    return captioner(config, factor=4.0, seed=4)


def member_or_ensemble(config: DifnetConfig, kind: str) -> DifnetForConditionalGeneration | DifnetEnsemble:
    if kind == "one model":
        return short_captioner(config)
    return DifnetEnsemble([short_captioner(config), captioner(config, factor=2.0, seed=7)])


def of_image(features: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    return {name: value[i : i + 1] for name, value in features.items()}


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
    return dataclasses.replace(tiny_config, vocab_size=8)


# --- processors beside the original's search -------------------------------------------------------------------------


@torch.no_grad()
def test_processors_see_every_row_of_the_batch_at_every_step(short_config: DifnetConfig) -> None:
    model, features = short_captioner(short_config), random_features(short_config, NUM_IMAGES)
    recorder = Recorder()
    sequences = model.generate(
        **features,
        **(ORIGINAL | {"max_new_tokens": 20, "num_return_sequences": 4}),
        logits_processor=LogitsProcessorList([recorder]),
    )
    lasts = (sequences == short_config.eos_token_id).float().argmax(1).view(NUM_IMAGES, 4).amax(1)
    assert len(set(lasts.tolist())) > 2, "a case in which no image ends before the others shows nothing"
    assert len(recorder.prefixes) == 20
    for step, prefixes in enumerate(recorder.prefixes):
        assert prefixes.shape == (NUM_IMAGES * 4, 1 + step)
    captions, shown = sequences.view(NUM_IMAGES, 4, -1), recorder.prefixes[-1].view(NUM_IMAGES, 4, -1)
    for image in (captions == short_config.eos_token_id).any(2).all(1).nonzero().flatten():
        assert torch.equal(shown[image], captions[image, :, :20]), "captions that are finished stay in their rows"


@pytest.mark.parametrize("kind", ["one model", "ensemble"])
@torch.no_grad()
def test_words_that_are_allowed_for_one_image_are_of_no_concern_to_others(
    short_config: DifnetConfig, kind: str
) -> None:
    model, features = member_or_ensemble(short_config, kind), random_features(short_config, NUM_IMAGES)
    allowed = [[3, 4 + i % 4, 4 + (i + 1) % 4] for i in range(NUM_IMAGES)]
    together = model.generate(**features, **ORIGINAL, prefix_allowed_tokens_fn=lambda image, words: allowed[image])
    for i in range(NUM_IMAGES):
        alone = model.generate(
            **of_image(features, i), **ORIGINAL, prefix_allowed_tokens_fn=lambda *_, i=i: allowed[i]
        )[0]
        assert torch.equal(together[i, : len(alone)], alone)
        assert set(together[i].tolist()) <= {1, 2, *allowed[i]}


@torch.no_grad()
def test_captions_from_a_list_for_each_image(short_config: DifnetConfig) -> None:
    """The function knows the beginnings of its captions alone: it is never asked about another open one."""
    model, features = short_captioner(short_config), random_features(short_config, 3)
    captions = [[[4, 5, 3], [6, 7, 6, 3]], [[7, 6, 5, 4, 3]], [[5, 3], [6, 6, 6, 6, 3]]]

    def next_words(image: int, words: torch.Tensor) -> list[int]:
        words = words.tolist()[1:]
        if 3 in words:
            return [short_config.pad_token_id]
        return sorted({caption[len(words)] for caption in captions[image] if caption[: len(words)] == words})

    sequences = model.generate(**features, **ORIGINAL, prefix_allowed_tokens_fn=next_words)
    for i, row in enumerate(sequences.tolist()):
        assert row[1 : row.index(3) + 1] in captions[i]


@torch.no_grad()
def test_processors_that_count_repetitions_do_not_mix_images(short_config: DifnetConfig) -> None:
    model, features = short_captioner(short_config), random_features(short_config, NUM_IMAGES)
    options = {"no_repeat_ngram_size": 1, "repetition_penalty": 1.7}
    together = model.generate(**features, **ORIGINAL, **options)
    for i in range(NUM_IMAGES):
        alone = model.generate(**of_image(features, i), **ORIGINAL, **options)[0]
        assert torch.equal(together[i, : len(alone)], alone)


@pytest.mark.parametrize("kind", ["one model", "ensemble"])
@pytest.mark.parametrize("num_returned", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=["plain", "processed"])
@torch.no_grad()
def test_transition_scores_of_the_original_search_add_up(
    short_config: DifnetConfig, kind: str, num_returned: int, options: dict
) -> None:
    model, features = member_or_ensemble(short_config, kind), random_features(short_config, NUM_IMAGES)
    search = {**features, **ORIGINAL, **options, "num_return_sequences": num_returned, "max_new_tokens": 20}
    output = model.generate(**search, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, model.generate(**search)), "asking for scores changes nothing"
    assert all(step.shape == (NUM_IMAGES * 4, 8) for step in output.scores)
    assert output.beam_indices.shape == output.sequences_log_probs.shape == output.sequences[:, 1:].shape
    rows = output.beam_indices // 4
    image = torch.arange(NUM_IMAGES).repeat_interleave(num_returned).unsqueeze(1)
    assert torch.equal(rows, image.expand_as(rows).masked_fill(output.beam_indices < 0, -1))
    transition_scores = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    torch.testing.assert_close(transition_scores, output.sequences_log_probs)
    torch.testing.assert_close(transition_scores.sum(1), output.sequences_scores)


@torch.no_grad()
def test_without_processors_and_scores_nothing_is_put_in_order(short_config: DifnetConfig) -> None:
    output = short_captioner(short_config).generate(
        **random_features(short_config), **ORIGINAL, return_dict_in_generate=True
    )
    assert output.scores is None
    assert output.beam_indices is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_prompts_of_different_lengths_in_the_original_search(
    tiny_config: DifnetConfig, side: str, attention: str
) -> None:
    model, features = captioner(tiny_config), random_features(tiny_config, 3)
    model.set_attn_implementation(attention)
    lengths = [4, 1, 2]
    prompts = random_captions(tiny_config, 3, length=4)
    padded, mask = torch.full((3, 4), tiny_config.pad_token_id), torch.zeros(3, 4, dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(4 - length, 4) if side == "left" else slice(0, length)
        padded[row, where], mask[row, where] = prompts[row, :length], 1
    together = model.generate(**features, **ORIGINAL, decoder_input_ids=padded, decoder_attention_mask=mask)
    for row, length in enumerate(lengths):
        assert torch.equal(together[row, 4 - length : 4], prompts[row, :length])  # padding moves to the left
        alone = model.generate(
            **of_image(features, row), **ORIGINAL, decoder_input_ids=prompts[row : row + 1, :length]
        )
        words = alone[0, length:]
        assert torch.equal(together[row, 4 : 4 + len(words)], words)


@torch.no_grad()
def test_a_prompt_with_pad_inside_in_a_batch_of_the_original_search(tiny_config: DifnetConfig) -> None:
    """Another image's prompt is padded, so that all of them get a mask."""
    for seed in range(3):
        model, features = captioner(tiny_config, seed=seed), random_features(tiny_config, 3)
        prompts = random_captions(tiny_config, 3, length=4, seed=seed)
        prompts[0, 2] = prompts[1, 1] = prompts[2, 3] = tiny_config.pad_token_id
        settings = {**ORIGINAL, "num_return_sequences": 2}
        together = model.generate(**features, **settings, decoder_input_ids=prompts)
        for row in range(2):
            alone = model.generate(**of_image(features, row), **settings, decoder_input_ids=prompts[row : row + 1])
            assert torch.equal(together[2 * row : 2 * row + 2, : alone.shape[1]], alone)


def test_a_batch_of_the_pipeline_in_which_only_some_images_need_a_mask(tiny_config: DifnetConfig) -> None:
    model, features = captioner(tiny_config), random_features(tiny_config, 3, height=2, width=2)
    processor = DifnetProcessor(DifnetFeatureExtractor(2, 24, 7), DifnetTokenizer(vocab=WORDS))
    pipe = DifnetImageCaptioningPipeline(model=model, processor=processor)
    images = [{name: value[i] for name, value in features.items()} for i in range(3)]
    images[1]["grid_features"] = images[1]["grid_features"][:3]
    together = pipe(images, batch_size=3, num_beams=2, max_new_tokens=6)
    assert together == [pipe(image, num_beams=2, max_new_tokens=6) for image in images]


@torch.no_grad()
def test_a_prompt_of_the_processor_is_continued_as_it_is_alone(tiny_config: DifnetConfig) -> None:
    model, features = captioner(tiny_config), random_features(tiny_config, 2, height=2, width=2)
    processor = DifnetProcessor(DifnetFeatureExtractor(2, 24, 7), DifnetTokenizer(vocab=WORDS))
    together = model.generate(**processor(**features, prompt=["w5 w6 w7", "w8"]), **ORIGINAL)
    for row, (prompt, length) in enumerate([("w5 w6 w7", 4), ("w8", 2)]):
        alone = model.generate(**processor(**of_image(features, row), prompt=prompt), **ORIGINAL)[0]
        assert processor.decode(alone[1:length]) == prompt
        assert torch.equal(together[row, 4 - length : 4 - length + len(alone)], alone)


# --- lengths that the caller sets and lengths that a checkpoint stores -----------------------------------------------


@pytest.mark.parametrize("stored", [{"max_length": 21}, {"max_new_tokens": 20}], ids=["now", "older checkpoints"])
@pytest.mark.parametrize(
    ("asked", "length"),
    [
        ({}, 21),
        ({"max_length": 10}, 10),
        ({"max_new_tokens": 10}, 11),
        ({"max_new_tokens": 25}, 26),
        ({"generation_config": GenerationConfig(max_length=10)}, 10),
        ({"generation_config": GenerationConfig(max_new_tokens=10)}, 11),
    ],
)
@torch.no_grad()
def test_the_length_that_a_caller_sets_counts(
    tiny_config: DifnetConfig, stored: dict, asked: dict, length: int
) -> None:
    model = random_model(tiny_config)
    model.generation_config.update(eos_token_id=None, **stored)
    assert model.generate(**random_features(tiny_config), num_beams=1, **asked).shape == (2, length)


def test_a_checkpoint_stores_a_length_that_leaves_both_ways_open(
    tiny_config: DifnetConfig,
) -> None:
    model = random_model(tiny_config)
    model.generation_config = default_generation_config(tiny_config)
    assert (model.generation_config.max_length, model.generation_config.max_new_tokens) == (21, None)
    short = dataclasses.replace(tiny_config, max_position_embeddings=9)
    assert default_generation_config(short).max_length == 10
    with CaptureLogger(logging.get_logger("transformers.generation.utils")) as said:
        model.generate(**random_features(tiny_config), max_new_tokens=5)
    assert "seem to have been set" not in said.out


# --- stop strings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
@torch.no_grad()
def test_stop_strings_end_a_caption_after_their_words(tiny_config: DifnetConfig, num_beams: int) -> None:
    model, features = captioner(tiny_config), random_features(tiny_config, 1)
    settings = {"num_beams": num_beams, "eos_token_id": None, "length_penalty": 0.0, "early_stopping": True}
    tokenizer = DifnetTokenizer(vocab=WORDS)
    whole = model.generate(**features, **settings, max_new_tokens=8)
    stop = tokenizer.decode(whole[0, 1:3])
    stopped = model.generate(
        **features, **settings, max_new_tokens=8, stop_strings=[stop, "w1 w2 w3 w4 w5"], tokenizer=tokenizer
    )
    assert tokenizer.decode(stopped[0]).endswith(stop)
    if num_beams == 1:
        assert torch.equal(stopped, whole[:, :3])


@pytest.mark.parametrize("stop_string", [".", "zebra", ""])
def test_a_stop_string_that_no_caption_holds_is_refused(tiny_config: DifnetConfig, stop_string: str) -> None:
    with pytest.raises(ValueError, match=f"`stop_strings`: '{stop_string}' is not made of words of the vocabulary"):
        random_model(tiny_config).generate(
            **random_features(tiny_config), stop_strings=stop_string, tokenizer=DifnetTokenizer(vocab=WORDS)
        )


# --- what cannot be done is refused with what to do ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.ones(2, 3, dtype=torch.long)}, "does not read `labels`.* as `prompt=`"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, r"no `input_ids`: .*`processor\(.., prompt=text\)`"),
        ({"inputs_embeds": torch.ones(2, 3, 32)}, "no `inputs_embeds`: .*prompt"),
        ({"decoder_inputs_embeds": torch.ones(2, 3, 32)}, "no `decoder_inputs_embeds`: pass `decoder_input_ids`"),
        ({"attention_mask": torch.ones(2, 12)}, "no `attention_mask`: cells are masked by `grid_attention_mask`"),
        ({"pixel_values": torch.ones(2, 3, 8, 8)}, r"no `pixel_values`: .*pipeline\(\"image-captioning\""),
        ({"prompt": "a dog"}, "no `prompt`: give it to the processor"),
        ({"negative_prompt_ids": torch.ones(2, 3)}, "no `negative_prompt_ids`"),
        ({"guidance_scale": 2.0}, "`guidance_scale` needs a model that also writes without an image"),
        ({"encoder_no_repeat_ngram_size": 2}, "use `no_repeat_ngram_size`"),
        ({"encoder_repetition_penalty": 1.5}, "use `repetition_penalty`"),
        ({"stop_strings": "w1"}, "`stop_strings` needs `tokenizer=processor.tokenizer`"),
        ({"prompt_lookup_num_tokens": 2}, "but `num_beams` is 5 .*pass `num_beams=1`"),
        ({"decoder_input_ids": [[2, 5], [2, 5]]}, r"`decoder_input_ids` must be a tensor, not list: .*return_tensors"),
        ({"max_length": 32}, "position table of this model ends at 30"),
        ({"decoder_input_ids": torch.full((3, 2), 2)}, "3 rows for 2 images"),
        ({"decoder_input_ids": torch.full((2,), 2)}, r"must be ids of shape \(images, length\)"),
        ({"decoder_input_ids": torch.ones(2, 2)}, r"not torch\.float32 of shape \(2, 2\)"),
        ({"decoder_input_ids": torch.tensor([[2, 5], [2, 50]])}, "ids from 2 to 50; those of this model are 0 to 49"),
        ({"decoder_attention_mask": torch.ones(2, 3)}, "`decoder_input_ids` is missing: give both"),
        ({"grid_attention_mask": torch.ones(2, 11)}, r"\(2, 11\), but the features have \(2, 12\)"),
        ({"encoder_outputs": torch.ones(2, 12, 32)}, r"is what `model\.get_encoder\(\)\(\.\.\)` returns"),
        ({"encoder_outputs": (torch.ones(2, 12, 32),)}, r"is what `model\.get_encoder\(\)\(\.\.\)` returns"),
        ({"cache_implementation": "paged"}, "is for models that continue texts"),
        ({"prefill_chunk_size": 1}, "`prefill_chunk_size` does nothing here"),
        ({"token_healing": True}, "`token_healing` does nothing here: the tokens of this model are whole words"),
        ({"num_beams": 0}, "`num_beams` must be at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_generate_cannot_do(tiny_config: DifnetConfig, arguments: dict, message: str) -> None:
    model = random_model(tiny_config)
    model.generation_config = default_generation_config(tiny_config)
    with pytest.raises(ValueError, match=message):
        model.generate(**random_features(tiny_config), **arguments)


@pytest.mark.parametrize("search", [{}, {"do_sample": True}, {"custom_generate": original_beam_search}])
@pytest.mark.parametrize("helper", ["streamer", "assistant_model"])
def test_word_by_word_and_several_hypotheses(tiny_config: DifnetConfig, search: dict, helper: str) -> None:
    """With the original's search a streamer would never hear of the end, and its reader would wait for ever."""
    model = random_model(tiny_config)
    model.generation_config = default_generation_config(tiny_config)
    value = TextStreamer(DifnetTokenizer(vocab=WORDS)) if helper == "streamer" else random_model(tiny_config)
    with pytest.raises(ValueError, match=f"`{helper}`.*pass `num_beams=1`"):
        model.generate(**random_features(tiny_config, 1), **search, **{helper: value})


def test_as_many_prompts_as_encoded_images_and_at_least_one(tiny_config: DifnetConfig) -> None:
    model, features = random_model(tiny_config), random_features(tiny_config)
    with pytest.raises(ValueError, match="`decoder_input_ids` has 6 rows for 2 images"):
        model.generate(
            encoder_outputs=model.get_encoder()(**features), decoder_input_ids=random_captions(tiny_config, 6)
        )
    with pytest.raises(ValueError, match="is given no image"):
        model.generate(**{name: value[:0] for name, value in features.items()})
    with pytest.raises(ValueError, match="needs `grid_features`"):
        model.generate(num_beams=2)


@pytest.mark.parametrize("drafter", ["assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"])
def test_drafts_cannot_be_taken_back_from_a_cache_of_fixed_size(tiny_config: DifnetConfig, drafter: str) -> None:
    model = random_model(tiny_config)
    value = model if drafter == "assistant_model" else 1
    with pytest.raises(
        ValueError, match=f"`{drafter}` needs a cache that .* leave out `cache_implementation='static'`"
    ):
        model.generate(
            **random_features(tiny_config, 1), num_beams=1, cache_implementation="static", **{drafter: value}
        )


def test_the_first_layers_of_an_ensemble_are_no_assistant(tiny_config: DifnetConfig) -> None:
    ensemble = DifnetEnsemble([random_model(tiny_config)])
    with pytest.raises(ValueError, match="`assistant_early_exit` leaves out layers of one network"):
        ensemble.generate(**random_features(tiny_config, 1), num_beams=1, assistant_early_exit=1)


@pytest.mark.parametrize(
    "option",
    [{"length_penalty": 1.0}, {"early_stopping": True}, {"penalty_alpha": 0.6}],
    ids=lambda option: next(iter(option)),
)
def test_options_that_the_original_search_would_ignore(tiny_config: DifnetConfig, option: dict) -> None:
    with pytest.raises(ValueError, match=f"`original_beam_search` does nothing with `{next(iter(option))}`"):
        random_model(tiny_config).generate(**random_features(tiny_config), **ORIGINAL, **option)


def test_more_beams_than_words(tiny_config: DifnetConfig) -> None:
    with pytest.raises(ValueError, match="`num_beams` is at most 50"):
        random_model(tiny_config).generate(**random_features(tiny_config), **(ORIGINAL | {"num_beams": 51}))


@torch.no_grad()
def test_the_original_search_pads_with_the_token_that_is_asked_for(short_config: DifnetConfig) -> None:
    model, features = short_captioner(short_config), random_features(short_config, NUM_IMAGES)
    search = {**features, **(ORIGINAL | {"num_return_sequences": 4, "max_new_tokens": 20})}
    usual, other = model.generate(**search), model.generate(**search, pad_token_id=0)
    is_after_end = (usual == 3).cumsum(1) > (usual == 3).long()
    assert is_after_end.any()
    assert torch.equal(other, usual.masked_fill(is_after_end, 0))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.ones((2, 12, 24)), "must be a tensor, not ndarray"),
        ([[1.0]], "must be a tensor, not list"),
        ("photo.jpg", r"must be a tensor of features, not images \(str\): .*pipeline"),
        ([b"\xff\xd8"], r".*not images \(list\)"),
        (Path("photo.jpg"), r".*not images \(PosixPath\)"),
        (Image.new("RGB", (8, 8)), r".*not images \(Image\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_features_are_tensors(tiny_config: DifnetConfig, features: object, message: str) -> None:
    model = random_model(tiny_config)
    with pytest.raises(ValueError, match=f"`grid_features` {message}"):
        model.generate(grid_features=features)
    with pytest.raises(ValueError, match=f"`inputs` {message}"):
        model.generate(features)
    with pytest.raises(ValueError, match=f"`grid_features` {message}"):
        model(grid_features=features, decoder_input_ids=torch.tensor([[2]]))


def test_labels_are_a_tensor(tiny_config: DifnetConfig) -> None:
    with pytest.raises(ValueError, match=r"`labels` must be a tensor, not list: .*return_tensors=\"pt\""):
        random_model(tiny_config)(**random_features(tiny_config), labels=[[4, 3], [5, 3]])
