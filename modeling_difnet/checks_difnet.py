"""Checks of arguments: what the model or `generate` would ignore or fail on is a `ValueError` that says what to do.

The original has no counterpart: its programs know the shapes of their data.
"""

import inspect
import os

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_difnet import DifnetConfig

# Inputs of the model's `forward` methods


def check_tensors(**inputs) -> None:
    """Raises `ValueError` for inputs that are neither tensors nor None."""
    for name, value in inputs.items():
        if value is None or isinstance(value, torch.Tensor):
            continue
        given = type(value).__name__
        items = value[:1] if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, str | bytes | os.PathLike) or hasattr(item, "getbands") for item in items):
            raise ValueError(
                f"`{name}` must be a tensor of features, not images ({given}): "
                '`pipeline("image-captioning", model=.., grid_backbone=..)` captions images, and '
                "`difnet extract` makes features of them."
            )
        raise ValueError(
            f"`{name}` must be a tensor, not {given}: let the processor make it, "
            '`processor(.., return_tensors="pt")`, or `torch.as_tensor`.'
        )


def check_features(
    config: DifnetConfig, grid_features: torch.Tensor, segmentation_features: torch.Tensor | None
) -> None:
    """Raises `ValueError` when the shapes of the two flows do not match the configuration or each other."""
    if grid_features.ndim != 3 or grid_features.shape[2] != config.grid_feature_size:
        raise ValueError(
            f"`grid_features` must have the shape (batch, cells, {config.grid_feature_size}), "
            f"got {tuple(grid_features.shape)}."
        )
    if not config.use_segmentation:
        return
    if segmentation_features is None:
        raise ValueError(
            "`segmentation_features` are missing: this model reads two flows (`use_segmentation=True`). Pass the "
            f"(batch, {config.num_segmentation_classes}, height, width) class shares of the same images, "
            "or load a model with `use_segmentation=False`."
        )
    if segmentation_features.ndim != 4 or segmentation_features.shape[1] != config.num_segmentation_classes:
        raise ValueError(
            "`segmentation_features` must have the shape (batch, "
            f"{config.num_segmentation_classes}, height, width), got {tuple(segmentation_features.shape)}."
        )
    num_cells = segmentation_features.shape[2] * segmentation_features.shape[3]
    if segmentation_features.shape[0] != grid_features.shape[0] or num_cells != grid_features.shape[1]:
        raise ValueError(
            "The two flows must show the same images on the same grid: `grid_features` has "
            f"{grid_features.shape[0]} images of {grid_features.shape[1]} cells, `segmentation_features` "
            f"{segmentation_features.shape[0]} of {num_cells} ({segmentation_features.shape[2]} x "
            f"{segmentation_features.shape[3]})."
        )


def check_kwargs(module: nn.Module, kwargs: dict) -> dict:
    """Checks the further arguments of a `forward`, which it would ignore silently.

    Args:
        module: whose `forward` is called.
        kwargs: what it is given beside its named arguments.

    Returns:
        `kwargs` without those that are None, which PEFT passes for text models.

    Raises:
        ValueError: an unknown argument holds a tensor or a cache.
    """
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor | Cache):
            names = ", ".join(known for known in inspect.signature(module.forward).parameters if known != "kwargs")
            raise ValueError(f"{type(module).__name__} does not know the argument `{name}`. It takes {names}.")
    return {name: value for name, value in kwargs.items() if value is not None}


def check_length(num_tokens: int, num_positions: int) -> None:
    """Raises `ValueError` for more tokens, those in the cache included, than the position table has rows."""
    if num_tokens > num_positions:
        raise ValueError(
            f"The decoder is given {num_tokens} tokens, but the position table of this model ends at {num_positions} "
            "(`max_position_embeddings`). Shorten the captions (`truncation=True, max_length=...` in the processor)."
        )


def check_num_captions(num_captions: int, num_images: int) -> None:
    """Raises `ValueError` unless there are equally many captions of each image."""
    if num_captions % num_images:
        raise ValueError(
            f"The decoder is given {num_captions} captions for {num_images} images: pass one caption, or the same "
            "number of captions one after another, for every image."
        )


# Requests to `generate`

# Arguments of other models' `generate`, and what to do instead.
UNSUPPORTED_ARGUMENTS = {
    "input_ids": "the beginning of a caption is `decoder_input_ids`, which `processor(.., prompt=text)` makes",
    "inputs_embeds": "the beginning of a caption is `decoder_input_ids`, which `processor(.., prompt=text)` makes",
    "decoder_inputs_embeds": "pass `decoder_input_ids`",
    "decoder_position_ids": "it counts the words itself; `decoder_attention_mask` says which of them are padding",
    "position_ids": "it counts the words itself; `decoder_attention_mask` says which of them are padding",
    "attention_mask": "cells are masked by `grid_attention_mask`, words of a prompt by `decoder_attention_mask`",
    "prompt": "give it to the processor, `processor(.., prompt=text)`, and pass on what that returns",
    "text": "give it to the processor, `processor(.., prompt=text)`, and pass on what that returns",
    "negative_prompt_ids": "this model has no unconditional mode to be guided away from",
    "negative_prompt_attention_mask": "this model has no unconditional mode to be guided away from",
    "pixel_values": 'it takes features; `pipeline("image-captioning", model=.., grid_backbone=..)` takes images',
    "images": 'it takes features; `pipeline("image-captioning", model=.., grid_backbone=..)` takes images',
}


def check_request(inputs: object, arguments: dict, vocab_size: int) -> None:
    """Checks the arguments of `generate`.

    Args:
        inputs: the first argument of `generate`.
        arguments: the others.
        vocab_size: of the model.

    Raises:
        ValueError: with what to do instead.
    """
    for name, remedy in UNSUPPORTED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ValueError(f"`generate` of this model takes no `{name}`: {remedy}.")
    # `Seq2SeqTrainer` hands over whole evaluation batches, and, as hardly anybody else does, says `synced_gpus`.
    if arguments.get("labels") is not None and arguments.get("synced_gpus") is None:
        raise ValueError(
            "`generate` does not read `labels`. To continue a text, give it to the processor as `prompt=` instead "
            'of `text=`; to caption images whose captions are known, leave them out (`del batch["labels"]`), and the '
            "`decoder_input_ids` that a collator has made of them."
        )
    names = ("grid_features", "segmentation_features", "grid_attention_mask", "segmentation_attention_mask")
    check_tensors(
        inputs=inputs,
        **{name: arguments.get(name) for name in (*names, "decoder_input_ids", "decoder_attention_mask")},
    )
    if not isinstance(arguments.get("encoder_outputs"), ModelOutput | None):
        raise ValueError(
            "`encoder_outputs` is what `model.get_encoder()(..)` returns with `return_dict=True`, not one of its "
            "tensors, a tuple or a dict of them."
        )
    cells = inputs if inputs is not None else arguments.get("grid_features")
    if arguments.get("encoder_outputs") is not None:
        cells = arguments["encoder_outputs"][0]  # as many images and cells as there are of features
    if not isinstance(cells, torch.Tensor):
        raise ValueError("`generate` needs `grid_features`, which the processor makes, or `encoder_outputs`.")
    check_shapes(cells, arguments, vocab_size)
    if arguments.get("cache_implementation") == "paged":
        raise ValueError('`cache_implementation="paged"` is for models that continue texts: leave it out.')

    search = arguments.get("custom_generate")
    if not callable(search):
        return
    for name in ("streamer", "assistant_model"):
        if arguments.get(name) is not None and name not in inspect.signature(search).parameters:
            raise ValueError(
                f"`{getattr(search, '__name__', 'custom_generate')}` takes no `{name}`: leave out `custom_generate` "
                "and pass `num_beams=1`."
            )
    if getattr(search, "__name__", None) == "original_beam_search":
        for name, neutral in (("length_penalty", 0.0), ("early_stopping", "never")):
            if arguments.get(name) not in (None, False, neutral):
                raise ValueError(
                    f"`original_beam_search` does nothing with `{name}`: it ranks captions by their log-probability "
                    "and never stops early. Leave it out, or `custom_generate`."
                )


def check_shapes(grid_features: torch.Tensor, arguments: dict, vocab_size: int) -> None:
    """Raises `ValueError` for masks and prompts whose shapes do not match the features."""
    prompt, mask = arguments.get("decoder_input_ids"), arguments.get("decoder_attention_mask")
    if prompt is not None:
        if prompt.ndim != 2 or prompt.is_floating_point():
            raise ValueError(
                "`decoder_input_ids` must be ids of shape (images, length), `<bos> w1 ..`, not "
                f"{prompt.dtype} of shape {tuple(prompt.shape)}."
            )
        if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < vocab_size:
            raise ValueError(
                f"`decoder_input_ids` holds ids from {int(prompt.min())} to {int(prompt.max())}; those of this model "
                f"are 0 to {vocab_size - 1}."
            )
    if mask is not None and (prompt is None or mask.shape != prompt.shape):
        raise ValueError(
            f"`decoder_attention_mask` has shape {tuple(mask.shape)} and `decoder_input_ids` "
            f"{'is missing' if prompt is None else f'{tuple(prompt.shape)}'}: give both, one number for each token."
        )
    if grid_features.ndim != 3:
        return  # the encoder says what is wrong
    if len(grid_features) == 0:
        raise ValueError("`generate` is given no image: the batch is empty.")
    if prompt is not None and len(prompt) != len(grid_features):
        raise ValueError(
            f"`decoder_input_ids` has {len(prompt)} rows for {len(grid_features)} images: give one prompt for each "
            "image."
        )
    for name in ("grid_attention_mask", "segmentation_attention_mask"):
        cells = arguments.get(name)
        if cells is not None and cells.shape != grid_features.shape[:2]:
            raise ValueError(
                f"`{name}` has shape {tuple(cells.shape)}, but the features have {tuple(grid_features.shape[:2])} "
                "(images, cells): give one number for each cell."
            )


def check_settings(generation_config: GenerationConfig) -> None:
    """Raises `ValueError` for settings that need what this model does not have."""
    num_beams = generation_config.num_beams
    if num_beams is not None and num_beams < 1:
        raise ValueError(f"`num_beams` must be at least 1, got {num_beams}.")
    for name, reason in (
        ("token_healing", "the tokens of this model are whole words, which need no healing"),
        ("prefill_chunk_size", "prompts of captions are read at once"),
    ):
        if getattr(generation_config, name, None):
            raise ValueError(f"`{name}` does nothing here: {reason}. Leave it out.")
    if generation_config.guidance_scale not in (None, 1):
        raise ValueError(
            "`guidance_scale` needs a model that also writes without an image, which this one does not: leave it out."
        )
    for name, neutral in (("encoder_no_repeat_ngram_size", 0), ("encoder_repetition_penalty", 1.0)):
        if getattr(generation_config, name) not in (None, neutral):
            raise ValueError(
                f"`{name}` compares with the encoder's words, and the encoder of this model reads an image: use "
                f"`{name.removeprefix('encoder_')}`."
            )


def check_beams(generation_config: GenerationConfig, streamer: object | None, assistant_model: object | None) -> None:
    """Raises `ValueError` for what needs a single hypothesis where there are several."""
    num_beams = generation_config.num_beams
    if num_beams in (None, 1):
        return
    settings = ("prompt_lookup_num_tokens", "assistant_early_exit", "dola_layers")
    wanted = {"streamer": streamer, "assistant_model": assistant_model}
    wanted |= {name: getattr(generation_config, name, None) for name in settings}
    for name, value in wanted.items():
        if value is not None:
            raise ValueError(
                f"`{name}` needs one hypothesis whose words stay as they are, but `num_beams` is {num_beams} (in the "
                "call, or stored with the checkpoint): pass `num_beams=1`."
            )


def check_drafts(generation_config: GenerationConfig, assistant_model: object | None, is_captioner: bool) -> None:
    """Raises `ValueError` for assisted decoding that this model or its cache cannot do."""
    drafters = {"assistant_model": assistant_model}
    drafters |= {
        name: getattr(generation_config, name, None) for name in ("prompt_lookup_num_tokens", "assistant_early_exit")
    }
    name = next((name for name, value in drafters.items() if value is not None), None)
    if name is None:
        return
    if generation_config.cache_implementation in ("static", "offloaded_static"):
        raise ValueError(
            f"`{name}` needs a cache that words can be taken from again: leave out "
            f"`cache_implementation={generation_config.cache_implementation!r}`."
        )
    if drafters["assistant_early_exit"] is not None and not is_captioner:
        raise ValueError("`assistant_early_exit` leaves out layers of one network, and an ensemble has several.")


# The original's beam search

# Settings of `generate` that choose another search than beams, with the values that choose nothing.
IGNORED_BY_ORIGINAL_BEAM_SEARCH = {
    "assistant_early_exit": None,
    "constraints": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "force_words_ids": None,
    "low_memory": False,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "prompt_lookup_num_tokens": None,
    "use_mtp": False,
}


def check_original_beam_search(
    model: PreTrainedModel,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict,
) -> None:
    """Raises `ValueError` for what `original_beam_search` would have to ignore."""
    if generation_config.do_sample:
        raise ValueError("`original_beam_search` does not sample: leave out `do_sample=True`, or `custom_generate`.")
    if model.config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            "`original_beam_search` needs an attention that takes a mask for each beam: call "
            f'`model.set_attn_implementation("sdpa")` (it is "{model.config._attn_implementation}" now).'
        )
    for name in ("output_logits", "output_attentions", "output_hidden_states"):
        if getattr(generation_config, name):
            raise ValueError(f"`original_beam_search` does not return what `{name}=True` asks for.")
    if generation_config.num_beams > model.config.vocab_size:
        raise ValueError(
            f"`original_beam_search` has no {generation_config.num_beams} first words to start from: `num_beams` is "
            f"at most {model.config.vocab_size}, the size of the vocabulary."
        )
    for name, neutral in IGNORED_BY_ORIGINAL_BEAM_SEARCH.items():
        value = getattr(generation_config, name, None)
        if value is not None and value != neutral:
            raise ValueError(
                f"`original_beam_search` does nothing with `{name}`: leave it out, or `custom_generate` to have the "
                "search of Transformers."
            )
    for criterion in stopping_criteria:
        if not isinstance(criterion, MaxLengthCriteria | EosTokenCriteria):
            raise ValueError(
                "`original_beam_search` ends at `max_new_tokens` or when all hypotheses are finished; it does not "
                f"know {type(criterion).__name__}."
            )
    for name in ("decoder_position_ids", "decoder_inputs_embeds"):
        if model_kwargs.get(name) is not None:
            raise ValueError(
                f"`original_beam_search` takes no `{name}`: pass `decoder_input_ids`, where `<pad>` is padding."
            )
    # Transformers calls it `cache` from 5.24 on.
    for cache in (model_kwargs.get("past_key_values"), model_kwargs.get("cache")):
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "`original_beam_search` starts from `decoder_input_ids`; it takes no filled `past_key_values`."
            )
