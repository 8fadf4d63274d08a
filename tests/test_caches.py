"""Decoding with a cache equals decoding without one, on every version of Transformers that setup.cfg allows."""

import dataclasses
import warnings

import pytest
import torch
import transformers
from conftest import random_captions, random_features, random_model
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache

from modeling_difnet import DifnetConfig, DifnetEnsemble, DifnetForConditionalGeneration, original_beam_search
from modeling_difnet.cache_difnet import CACHE_NAME

pytestmark = pytest.mark.versions

DECODINGS = {
    "greedy": {"num_beams": 1},
    "sampling": {"num_beams": 1, "do_sample": True, "top_k": 0},
    "beams": {"num_beams": 4},
    "several of each": {"num_beams": 4, "num_return_sequences": 3},
}
CACHES = {"growing": {}, "fixed size": {"cache_implementation": "static"}}


@pytest.fixture(params=["two flows", "baseline"])
def config(tiny_config: DifnetConfig, request: pytest.FixtureRequest) -> DifnetConfig:
    return dataclasses.replace(tiny_config, use_segmentation=request.param == "two flows")


def captioner(config: DifnetConfig, seed: int = 0) -> DifnetForConditionalGeneration:
    """Large logits give captions that differ and that end."""
    model = random_model(config, seed)
    model.lm_head.weight.data *= 4
    return model


def ensemble(config: DifnetConfig) -> DifnetEnsemble:
    return DifnetEnsemble([captioner(config), captioner(dataclasses.replace(config, decoder_layers=1), seed=1)])


MODELS = {"captioner": captioner, "ensemble": ensemble}


def cache_of(output) -> Cache:
    return getattr(output, CACHE_NAME)


def image(features: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    return {name: value[index : index + 1] for name, value in features.items()}


def prompts_with_pad(config: DifnetConfig) -> dict[str, torch.Tensor]:
    """Prompts of two images: without padding, and with a `<pad>` at every place but the first."""
    prompts = {"<bos>": torch.full((2, 1), config.bos_token_id), "words": random_captions(config, length=4)}
    for place in (1, 2, 3):
        prompt = random_captions(config, length=4, seed=place)
        prompt[1, place] = config.pad_token_id
        prompts[f"<pad> in place {place}"] = prompt
    return prompts


# --- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("model_name", MODELS)
@torch.no_grad()
def test_no_cache_changes_a_caption(config: DifnetConfig, model_name: str, decoding: str) -> None:
    model, features = MODELS[model_name](config), random_features(config)
    for name, prompt in prompts_with_pad(config).items():
        captions = []
        for cache in ({"use_cache": False}, *CACHES.values()):
            torch.manual_seed(0)
            captions.append(
                model.generate(
                    **features, **DECODINGS[decoding], **cache, decoder_input_ids=prompt, max_new_tokens=6
                ).tolist()
            )
        assert captions[1] == captions[0], name
        assert captions[2] == captions[0], name


@torch.no_grad()
def test_a_generated_pad_is_hidden_from_later_words(tiny_config: DifnetConfig) -> None:
    """A vocabulary of six makes `<pad>` frequent."""
    config = dataclasses.replace(tiny_config, vocab_size=6)
    features, num_pads = random_features(config, batch_size=8), 0
    for seed in range(4):
        model = captioner(config, seed)
        settings = {"eos_token_id": None, "max_new_tokens": 8, "do_sample": True, "num_beams": 1, "top_k": 0}
        captions = []
        for cache in ({"use_cache": False}, *CACHES.values()):
            torch.manual_seed(seed)
            captions.append(model.generate(**features, **settings, **cache))
        assert torch.equal(captions[0], captions[1])
        assert torch.equal(captions[0], captions[2])
        num_pads += int((captions[0] == config.pad_token_id).sum())
    assert num_pads > 20


@pytest.mark.parametrize("model_name", MODELS)
@torch.no_grad()
def test_a_configuration_may_ask_for_tuples(config: DifnetConfig, model_name: str) -> None:
    model, features, captions = MODELS[model_name](config), random_features(config), random_captions(config)
    searches = ({"num_beams": 1}, {"num_beams": 3}, {"num_beams": 3, "custom_generate": original_beam_search})
    expected = [model.generate(**features, **search, max_new_tokens=4) for search in searches]
    loss = model(**features, labels=captions).loss
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.return_dict = False
    assert torch.equal(model(**features, labels=captions)[0], loss)
    assert torch.isfinite(model.sequence_log_probs(captions, **features)).all()
    for search, caption in zip(searches, expected, strict=True):
        assert torch.equal(model.generate(**features, **search, max_new_tokens=4), caption)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "<pad> alone"])
@pytest.mark.parametrize("decoding", ["greedy", "beams"])
@torch.no_grad()
def test_prompts_of_different_lengths_in_one_batch(
    config: DifnetConfig, decoding: str, with_mask: bool, side: str
) -> None:
    model, features = captioner(config), random_features(config, batch_size=4)
    lengths, longest = (5, 2, 1, 4), 5
    prompts = [random_captions(config, num_captions=1, length=length, seed=i) for i, length in enumerate(lengths)]
    prompts[3][0, 2] = config.pad_token_id  # between words, as in a caption alone
    settings = {**DECODINGS[decoding], "max_new_tokens": 6, "eos_token_id": None}
    alone = [model.generate(**image(features, i), **settings, decoder_input_ids=prompts[i])[0] for i in range(4)]

    batch = torch.full((4, longest), config.pad_token_id)
    mask = torch.zeros(4, longest, dtype=torch.long)
    for i, length in enumerate(lengths):
        columns = slice(longest - length, longest) if side == "left" else slice(0, length)
        batch[i, columns], mask[i, columns] = prompts[i][0], 1
    padded = {"decoder_input_ids": batch, **({"decoder_attention_mask": mask} if with_mask else {})}
    for cache in ({"use_cache": False}, *CACHES.values()):
        together = model.generate(**features, **settings, **padded, **cache)
        for i, length in enumerate(lengths):
            assert torch.equal(together[i, longest:], alone[i][length:])
            assert torch.equal(together[i, longest - length : longest], prompts[i][0])


@torch.no_grad()
def test_a_mask_hides_words_at_the_ends_of_a_prompt(config: DifnetConfig) -> None:
    model, features = captioner(config), random_features(config)
    prompt = random_captions(config, length=3)
    noise = torch.full((2, 2), 7)
    expected = model.generate(**features, decoder_input_ids=prompt, num_beams=3, max_new_tokens=6)
    for ids, mask in (
        (torch.cat([prompt, noise], dim=1), [1, 1, 1, 0, 0]),
        (torch.cat([noise, prompt], dim=1), [0, 0, 1, 1, 1]),
    ):
        masks = {"decoder_attention_mask": torch.tensor([mask, mask])}
        found = model.generate(**features, decoder_input_ids=ids, **masks, num_beams=3, max_new_tokens=6)
        assert torch.equal(found[:, 5:], expected[:, 3:])


@pytest.mark.parametrize("decoding", ["greedy", "beams", "original"])
@pytest.mark.parametrize("with_bos", [(0, 2), (1,), (), (0, 1, 2)], ids=str)
@torch.no_grad()
def test_each_prompt_of_a_batch_begins_with_bos(
    tiny_config: DifnetConfig, with_bos: tuple[int, ...], decoding: str
) -> None:
    """As it does alone, be there others that have or lack it."""
    model, features = captioner(tiny_config), random_features(tiny_config, batch_size=3)
    settings = {"num_beams": 3, "custom_generate": original_beam_search} if decoding == "original" else {}
    settings = {**DECODINGS.get(decoding, settings), "eos_token_id": None, "max_new_tokens": 5}
    prompts = [[9, 8], [9, 7, 8], [9]]
    prompts = [[tiny_config.bos_token_id] * (i in with_bos) + prompt for i, prompt in enumerate(prompts)]
    longest = max(map(len, prompts))
    padded = torch.tensor([[tiny_config.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    together = model.generate(**features, **settings, decoder_input_ids=padded)
    for i, prompt in enumerate(prompts):
        alone = model.generate(**image(features, i), **settings, decoder_input_ids=torch.tensor([prompt]))[0]
        assert together[i, -len(alone) :].tolist() == alone.tolist()


def test_prompts_that_cannot_be_padded_are_refused(tiny_config: DifnetConfig) -> None:
    model, features = captioner(tiny_config), random_features(tiny_config)
    prompt = random_captions(tiny_config, length=3)
    with pytest.raises(
        ValueError, match=r"`decoder_attention_mask` has shape \(2, 4\) and `decoder_input_ids` \(2, 3\)"
    ):
        model.generate(**features, decoder_input_ids=prompt, decoder_attention_mask=torch.ones(2, 4))
    prompt[1] = tiny_config.pad_token_id
    with pytest.raises(ValueError, match="Prompt 1 of `decoder_input_ids` is padding throughout"):
        model.generate(**features, decoder_input_ids=prompt)


@pytest.mark.parametrize("drafter", ["the model itself", "another model", "the caption so far"])
@torch.no_grad()
def test_assisted_decoding_of_a_padded_prompt(config: DifnetConfig, drafter: str) -> None:
    model, features = captioner(config), random_features(config, batch_size=1)
    assistant = {
        "the model itself": {"assistant_model": model},
        "another model": {"assistant_model": captioner(config, seed=1)},
        "the caption so far": {"prompt_lookup_num_tokens": 2},
    }[drafter]
    prompt = torch.tensor([[1, 1, 2, 9, 1, 8]])
    settings = {"decoder_input_ids": prompt, "num_beams": 1, "max_new_tokens": 8}
    expected = model.generate(**features, **settings, use_cache=False)
    assert torch.equal(model.generate(**features, **settings, **assistant), expected)


@torch.no_grad()
def test_drafts_may_go_on_behind_the_position_table(config: DifnetConfig) -> None:
    model, features = captioner(config), random_features(config, batch_size=1)
    for prompt in ([2], [1, 2, 9, 8, 9, 8]):
        settings = {"decoder_input_ids": torch.tensor([prompt]), "num_beams": 1, "eos_token_id": None}
        settings["max_new_tokens"] = config.max_position_embeddings + 1 - len(prompt)
        expected = model.generate(**features, **settings)
        assert torch.equal(model.generate(**features, **settings, prompt_lookup_num_tokens=4), expected)


@torch.no_grad()
def test_the_original_search_equals_its_own_search_without_cached_steps(config: DifnetConfig) -> None:
    """One beam is the greedy caption."""
    model, features = captioner(config), random_features(config, batch_size=3)
    greedy = model.generate(**features, num_beams=1, max_new_tokens=8, use_cache=False)
    found = model.generate(**features, num_beams=1, max_new_tokens=8, custom_generate=original_beam_search)
    assert torch.equal(found, greedy)


# --- the model's own calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(1, 1, 1, 1, 1, 1), (4, 2), (2, 3, 1)])
@pytest.mark.parametrize("model_name", MODELS)
@torch.no_grad()
def test_the_cache_keeps_the_padding(config: DifnetConfig, model_name: str, steps: tuple[int, ...]) -> None:
    model, features, captions = MODELS[model_name](config), random_features(config), random_captions(config)
    captions[0, 2] = captions[1, 3] = captions[1, 0] = config.pad_token_id
    is_word = captions != config.pad_token_id
    at_once = model(**features, decoder_input_ids=captions, use_cache=False).logits
    encoder_outputs, cache, logits = model.get_encoder()(**features), None, []
    for tokens in captions.split(steps, dim=1):
        output = model(encoder_outputs=encoder_outputs, decoder_input_ids=tokens, cache=cache, use_cache=True)
        cache = cache_of(output)
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1)[is_word], at_once[is_word], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["words", "both"], ids=lambda kind: f"{kind} of a fixed size")
@pytest.mark.parametrize("model_name", MODELS)
@torch.no_grad()
def test_a_cache_of_fixed_size_keeps_the_padding(tiny_config: DifnetConfig, model_name: str, kind: str) -> None:
    model, features, captions = (
        MODELS[model_name](tiny_config),
        random_features(tiny_config),
        random_captions(tiny_config),
    )
    captions[0, 2] = tiny_config.pad_token_id
    is_word = captions != tiny_config.pad_token_id
    at_once = model(**features, decoder_input_ids=captions, use_cache=False).logits
    image_cache = DynamicCache() if kind == "words" else StaticCache(model.config, max_cache_len=12)
    cache = EncoderDecoderCache(StaticCache(model.config, max_cache_len=20), image_cache)
    logits = [model(**features, decoder_input_ids=tokens, cache=cache).logits for tokens in captions.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1)[is_word], at_once[is_word], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_embedded_words_do_not_look_at_padding_in_the_cache(tiny_config: DifnetConfig) -> None:
    model, features, captions = captioner(tiny_config), random_features(tiny_config), random_captions(tiny_config)
    captions[0, 0] = captions[1, 2] = tiny_config.pad_token_id
    expected = model(**features, decoder_input_ids=captions).logits[:, 4:]
    cache = cache_of(model(**features, decoder_input_ids=captions[:, :4], use_cache=True))
    embeddings = model.get_input_embeddings()(captions[:, 4:])
    logits = model(**features, decoder_inputs_embeds=embeddings, cache=cache).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make_cache", [DynamicCache, tuple])
@pytest.mark.parametrize("model_name", MODELS)
@torch.no_grad()
def test_a_cache_of_another_kind_is_refused(tiny_config: DifnetConfig, model_name: str, make_cache: type) -> None:
    model, inputs = MODELS[model_name](tiny_config), random_features(tiny_config)
    inputs |= {"decoder_input_ids": random_captions(tiny_config), "past_key_values": make_cache()}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=f"is an `EncoderDecoderCache`, not {make_cache.__name__}"):
            call(**inputs)


@torch.no_grad()
def test_padding_before_a_caption_changes_nothing(config: DifnetConfig) -> None:
    model, features, captions = captioner(config), random_features(config), random_captions(config)
    expected = model(**features, decoder_input_ids=captions).logits
    padded = torch.nn.functional.pad(captions, (3, 0), value=config.pad_token_id)
    for mask in ({}, {"decoder_attention_mask": (padded != config.pad_token_id).long()}):
        logits = model(**features, decoder_input_ids=padded, **mask).logits[:, 3:]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_mask_that_does_not_cover_the_cache_is_refused(tiny_config: DifnetConfig) -> None:
    model, features, captions = captioner(tiny_config), random_features(tiny_config), random_captions(tiny_config)
    cache = cache_of(model(**features, decoder_input_ids=captions, use_cache=True))
    with pytest.raises(ValueError, match="has 1 columns, but there are 6 tokens in the cache and 1 new ones"):
        model(
            **features,
            decoder_input_ids=captions[:, :1],
            decoder_attention_mask=torch.ones(2, 1),
            cache=cache,
            use_cache=True,
        )


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("model_name", MODELS)
@torch.no_grad()
def test_the_cache_has_two_names(config: DifnetConfig, model_name: str, name: str) -> None:
    model, features, captions = MODELS[model_name](config), random_features(config), random_captions(config)
    at_once = model(**features, decoder_input_ids=captions).logits
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    model(**features, decoder_input_ids=captions[:, :4], **{name: cache})
    assert cache.get_seq_length() == 4
    logits = model(**features, decoder_input_ids=captions[:, 4:], **{name: cache}).logits
    torch.testing.assert_close(logits, at_once[:, 4:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(**features, decoder_input_ids=captions, cache=cache, past_key_values=cache)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_generate_takes_the_cache_under_both_names(config: DifnetConfig, name: str) -> None:
    model, features = captioner(config), random_features(config)
    settings = {"num_beams": 1, "eos_token_id": None, "return_dict_in_generate": True}
    whole = model.generate(**features, **settings, max_new_tokens=8)
    first = model.generate(**features, **settings, max_new_tokens=3)
    cache = {name: cache_of(first)}
    rest = model.generate(**features, **settings, max_new_tokens=5, decoder_input_ids=first.sequences, **cache)
    assert torch.equal(rest.sequences, whole.sequences)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("past", EncoderDecoderCache(DynamicCache(), DynamicCache())),
        ("past_key_value", DynamicCache()),
        ("input_ids", torch.ones(2, 3, dtype=torch.long)),
        ("attention_mask", torch.ones(2, 3)),
        ("pixel_values", torch.ones(2, 3)),
    ],
)
@pytest.mark.parametrize("part", ["captioner", "network", "encoder", "ensemble"])
def test_unknown_tensors_and_caches_are_refused(
    tiny_config: DifnetConfig, part: str, name: str, value: torch.Tensor | Cache
) -> None:
    model, inputs = captioner(tiny_config), random_features(tiny_config)
    if part != "encoder":
        inputs["decoder_input_ids"] = random_captions(tiny_config)
    called = {"captioner": model, "network": model.model, "encoder": model.get_encoder()}.get(part)
    called = ensemble(tiny_config) if called is None else called
    with pytest.raises(ValueError, match=f"does not know the argument `{name}`. It takes grid_features"):
        called(**inputs, **{name: value})
    assert called(**inputs, **{name: None}) is not None


@torch.no_grad()
def test_generate_warns_of_nothing(
    tiny_config: DifnetConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logger of Transformers says each deprecation once a process: what it says is let through each time."""
    logger = transformers.utils.logging.get_logger("transformers")
    monkeypatch.setattr(type(logger), "warning_once", type(logger).warning, raising=False)
    model, features = captioner(tiny_config), random_features(tiny_config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in (*DECODINGS.values(), {"num_beams": 2, "custom_generate": original_beam_search}):
            model.generate(**features, **settings, max_new_tokens=4)
        ensemble(tiny_config).generate(**features, num_beams=2, max_new_tokens=4)
    assert not [record for record in caplog.records if "deprecated" in record.getMessage()]
