"""The original's beam search as a `custom_generate` function, and log-probabilities of given captions.

Original files: `models/beam_search/beam_search.py` and `models/captioning_model.py`, both from Meshed-Memory
Transformer. The same tokens and scores come out; what differs is what happens inside a step. The original keeps one
copy of the picture and of all keys and values for each beam, gathers all of them at every step, projects the picture
anew in every layer and sorts beams x vocabulary scores. Here a picture's beams are the tokens of a tree: the decoder
reads one new token of each beam as `num_beams` positions of one sequence, whose keys and values stay where they were
written, and a mask tells each beam which of them are its own past. Nothing is moved between beams.
"""

import functools
import inspect
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import (
    EosTokenCriteria,
    GenerateBeamEncoderDecoderOutput,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .modeling_difnet import DifnetForConditionalGeneration

    # Nothing here needs it, but a saved model takes along the files that its own files name.
    from .pipeline_difnet import DifnetImageCaptioningPipeline  # noqa: F401


@dataclass
class OriginalBeamSearchOutput(GenerateBeamEncoderDecoderOutput):
    """What `original_beam_search` returns with `return_dict_in_generate=True`.

    Args:
        sequences (`(B * num_return_sequences, L)`): `<bos> w1 .. wn <eos> <pad> ..`, a picture's best first.
        sequences_scores (`(B * num_return_sequences,)`): sums of the words' and `<eos>`'s log-probabilities.
        sequences_log_probs (`(B * num_return_sequences, L - prompt)`): the addends; 0 after `<eos>`.
        scores (one `(B * num_beams, vocab_size)` for each step): with `output_scores=True`, the log-probabilities
            after the processors. Rows of hypotheses that are finished say nothing.
        beam_indices (`(B * num_return_sequences, L - prompt)`): with `output_scores=True`, the row of `scores` that
            each token comes from; -1 after `<eos>`. For `model.compute_transition_scores`.
    """

    sequences_log_probs: torch.FloatTensor | None = None


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


def original_beam_search(
    model: "DifnetForConditionalGeneration",
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs,
) -> torch.LongTensor | OriginalBeamSearchOutput:
    r"""The original's beam search: `model.generate(..., custom_generate=original_beam_search)`.

    A finished caption stays among the `num_beams` hypotheses of its picture and takes up a place, with its score,
    until better ones push it out; the library's own beam search moves it to a separate list instead. No length
    normalisation. The search ends when all hypotheses are finished or have `max_length` tokens, with the result of
    the original's fixed number of steps; images whose hypotheses are all finished are left out once they are many.

    Args:
        model: a `DifnetForConditionalGeneration`, with eager or SDPA attention.
        input_ids (`(B * num_beams, prompt)`): as `generate` prepares them, each prompt once for each beam.
        logits_processor: applied to the log-probabilities of each step, before they are added up. At every step it is
            given all `B * num_beams` rows, row `i * num_beams + k` being of image `i`. In place of a hypothesis that
            is finished, or impossible (log-probability -inf), it is shown an open one of the image, if there is one.
        stopping_criteria: `max_length` and `eos_token_id` alone; others raise.
        generation_config: `num_beams`, `num_return_sequences`, `max_length`, `eos_token_id`, `pad_token_id`,
            `return_dict_in_generate`, `output_scores` count.
        model_kwargs: `encoder_outputs`, `grid_attention_mask` and `decoder_attention_mask`, one row for each beam, as
            `generate` prepares them.

    Returns:
        Sequences `(B * num_return_sequences, L)`, as long as the longest of them, or an `OriginalBeamSearchOutput`.

    Raises:
        ValueError: sampling, a stopping criterion or an output that this search does not know, flash attention.
    """
    check_arguments(model, stopping_criteria, generation_config, model_kwargs)
    num_beams = generation_config.num_beams
    pad_token_id = model.config.pad_token_id
    eos_token_ids = generation_config._eos_token_tensor
    if eos_token_ids is None:
        eos_token_ids = input_ids.new_zeros(0)

    prompts = input_ids = input_ids[::num_beams]  # (B, prompt): one row an image from here on
    encoder_states = model_kwargs["encoder_outputs"].last_hidden_state[::num_beams]  # (B, N, d_model)
    encoder_outputs = BaseModelOutput(encoder_states)
    grid_attention_mask = model_kwargs.get("grid_attention_mask")
    if grid_attention_mask is not None:
        grid_attention_mask = grid_attention_mask[::num_beams]
    (batch_size, prompt_length), device = input_ids.shape, input_ids.device
    num_steps = generation_config.max_length - prompt_length
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    lengths = torch.full((batch_size, 1), prompt_length, device=device)  # words count from 1, padding does not
    prompt_mask = model_kwargs.get("decoder_attention_mask")
    step_0 = {}
    if prompt_mask is None:
        visible = input_ids != pad_token_id  # (B, prompt)
    else:
        # `generate` has moved padding to the left, so that all captions go on at the same slot. `<pad>` between words
        # is hidden, and takes up a position, as it does without a mask.
        visible = (prompt_mask[::num_beams] != 0) & (input_ids != pad_token_id)
        num_leading = (visible.cumsum(1) == 0).sum(1, keepdim=True)  # (B, 1)
        lengths = lengths - num_leading
        if not lengths.all():
            image = int((lengths == 0).nonzero()[0, 0])
            raise ValueError(
                f"`decoder_attention_mask` hides the whole prompt of image {image}: `<bos>` is no padding."
            )
        positions = torch.arange(1, prompt_length + 1, device=device) - num_leading
        step_0 = {"decoder_attention_mask": visible.long(), "decoder_position_ids": positions.clamp(min=0)}

    with_scores = bool(generation_config.return_dict_in_generate and generation_config.output_scores)
    step_scores: list[torch.Tensor] = []

    # Results of all images, and the images that are still searched.
    all_tokens = input_ids.new_full((batch_size, num_beams, num_steps), pad_token_id)
    images = torch.arange(batch_size, device=device)
    rows = images.unsqueeze(1)  # (B, 1)

    # Step 0: one hypothesis an image.
    logits = model(
        decoder_input_ids=input_ids,
        encoder_outputs=encoder_outputs,
        grid_attention_mask=grid_attention_mask,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **step_0,
    ).logits[:, -1:]  # (B, 1, V)
    scores = logits.new_zeros(batch_size, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
    finished = torch.zeros_like(scores, dtype=torch.bool)
    log_probs = logits.to(scores.dtype).log_softmax(-1)
    if logits_processor or with_scores:
        history = input_ids.new_zeros(batch_size, 1, 0)
        log_probs, processed = process_all_rows(
            logits_processor, prompts, all_tokens, images, history, log_probs, scores, finished
        )
        step_scores.append(processed)
    scores, beams, tokens, token_log_probs = best_continuations(log_probs, scores, finished, num_beams)
    finished = (tokens.unsqueeze(-1) == eos_token_ids).any(-1)  # (B, beams)
    history = tokens.unsqueeze(-1)  # (B, beams, steps so far)
    sequences_log_probs = token_log_probs.unsqueeze(-1)  # (B, beams, steps so far)
    # The row of the scores that each token comes from, (B, beams, steps so far).
    origins = (rows * num_beams + beams).unsqueeze(-1) if with_scores else None
    # visible[b, k, s]: whether hypothesis k of image b looks at slot s of the cache. Slots: the prompt, then
    # `num_beams` for each step.
    visible = visible.unsqueeze(1).expand(-1, num_beams, -1)  # (B, beams, slots so far)
    own_slot = torch.eye(num_beams, dtype=torch.bool, device=device)

    all_log_probs = scores.new_zeros(batch_size, num_beams, num_steps)
    all_origins = input_ids.new_full((batch_size, num_beams, num_steps), -1) if with_scores else None
    all_scores = scores.clone()

    for step in range(1, num_steps):
        # Leaving images out copies the caches of the others, which pays when there are enough of them.
        is_closed = finished.all(dim=1)  # (B,)
        if is_closed.sum() >= 0.25 * len(images):
            all_tokens[images, :, :step], all_log_probs[images, :, :step] = history, sequences_log_probs
            all_scores[images] = scores
            kept = (~is_closed).nonzero().squeeze(1)
            rows = rows[: len(kept)]
            if with_scores:
                all_origins[images, :, :step] = origins
                origins = origins[kept]
            images, lengths, history = images[kept], lengths[kept], history[kept]
            sequences_log_probs = sequences_log_probs[kept]
            scores, finished, visible = scores[kept], finished[kept], visible[kept]
            encoder_outputs = BaseModelOutput(encoder_outputs.last_hidden_state[kept])
            grid_attention_mask = grid_attention_mask[kept] if grid_attention_mask is not None else None
            if len(kept) == 0:
                break
            cache.batch_select_indices(kept)

        # A hypothesis looks at its own newest token, unless that is <pad>, which the original hides.
        tokens = history[:, :, -1]  # (B, beams)
        visible = torch.cat([visible, own_slot & (tokens != pad_token_id).unsqueeze(-1)], dim=2)
        logits = model(
            decoder_input_ids=tokens,
            decoder_attention_mask=visible.unsqueeze(1),  # (B, 1, beams, slots)
            decoder_position_ids=lengths + step,
            encoder_outputs=encoder_outputs,
            grid_attention_mask=grid_attention_mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).logits  # (B, beams, V)
        log_probs = logits.to(scores.dtype).log_softmax(-1)
        if logits_processor or with_scores:
            log_probs, processed = process_all_rows(
                logits_processor, prompts, all_tokens, images, history, log_probs, scores, finished
            )
            step_scores += [processed] if with_scores else []
        scores, beams, tokens, token_log_probs = best_continuations(log_probs, scores, finished, num_beams)
        finished = finished.gather(1, beams)
        if with_scores:
            origin = (images.unsqueeze(1) * num_beams + beams).masked_fill(finished, -1)
            origins = torch.cat([origins[rows, beams], origin.unsqueeze(-1)], dim=2)
        tokens = tokens.masked_fill(finished, pad_token_id)
        finished = finished | (tokens.unsqueeze(-1) == eos_token_ids).any(-1)
        visible = visible[rows, beams]
        history = torch.cat([history[rows, beams], tokens.unsqueeze(-1)], dim=2)
        sequences_log_probs = torch.cat([sequences_log_probs[rows, beams], token_log_probs.unsqueeze(-1)], dim=2)

    length = history.shape[2]
    all_tokens[images, :, :length], all_log_probs[images, :, :length] = history, sequences_log_probs
    all_scores[images] = scores
    if with_scores:
        all_origins[images, :, :length] = origins

    num_returned = generation_config.num_return_sequences
    found = all_tokens[:, :num_returned, :length].flatten(0, 1)  # (B * returned, steps)
    # Hypotheses that are not returned may have gone on for longer.
    is_end = (found.unsqueeze(-1) == eos_token_ids).any(-1)
    is_after_end = is_end.cumsum(1) > is_end.long()
    length = int((~is_after_end).sum(1).max())
    if generation_config._pad_token_tensor is not None:
        found = torch.where(is_after_end, generation_config._pad_token_tensor, found)
    prompts = prompts.repeat_interleave(num_returned, dim=0)  # (B * returned, prompt)
    sequences = torch.cat([prompts, found[:, :length]], dim=1)
    if not generation_config.return_dict_in_generate:
        return sequences
    return OriginalBeamSearchOutput(
        sequences=sequences,
        sequences_scores=all_scores[:, :num_returned].flatten(),
        sequences_log_probs=all_log_probs[:, :num_returned, :length].flatten(0, 1),
        scores=tuple(step_scores) if with_scores else None,
        beam_indices=all_origins[:, :num_returned, :length].flatten(0, 1) if with_scores else None,
    )


def process_all_rows(
    logits_processor: LogitsProcessorList,
    prompts: torch.LongTensor,  # (all images, prompt)
    all_tokens: torch.LongTensor,  # (all images, beams, steps): the captions of images that are left out
    images: torch.LongTensor,  # (B,) the images that are searched
    history: torch.LongTensor,  # (B, k, steps so far)
    log_probs: torch.Tensor,  # (B, k, V)
    scores: torch.Tensor,  # (B, k)
    finished: torch.Tensor,  # (B, k) bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shows processors all rows of the batch, as many an image as there are beams, in the caller's order.

    Processors find out by the number of a row which image it belongs to, as `prefix_allowed_tokens_fn` does.

    Returns:
        The processed log-probabilities of the images that are searched, (B, k, V), and of all rows,
        (all images * beams, V).
    """
    num_beams, num_hypotheses, vocab_size = all_tokens.shape[1], *log_probs.shape[1:]
    # What a finished or impossible hypothesis would get is not used, and its words may be none that a processor has an
    # answer for, such as a function that allows the words of certain captions.
    kind = (
        finished.long() + 2 * (~finished & (scores > -float("inf"))).long()
    )  # (B, k) 2: open, 1: finished, 0: neither
    most, first = kind.max(1, keepdim=True)
    own = torch.arange(num_hypotheses, device=images.device).expand_as(kind)
    shown = torch.where(kind == most, own, first)
    history = history.gather(1, shown.unsqueeze(-1).expand_as(history))

    words = all_tokens[:, :, : history.shape[2]].clone()
    words[images] = history.expand(-1, num_beams, -1)
    prefixes = torch.cat([prompts.unsqueeze(1).expand(-1, num_beams, -1), words], dim=2)
    processed = log_probs.new_full((len(prompts), num_beams, vocab_size), -math.log(vocab_size))
    processed[images] = log_probs.expand(-1, num_beams, -1)
    processed = logits_processor(prefixes.flatten(0, 1), processed.flatten(0, 1))
    return processed.view(-1, num_beams, vocab_size)[images, :num_hypotheses], processed


def check_arguments(
    model: "DifnetForConditionalGeneration",
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict,
) -> None:
    """Refuses what `original_beam_search` would have to ignore."""
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
                "library's own search."
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


def best_continuations(
    log_probs: torch.Tensor,  # (B, k, V)
    scores: torch.Tensor,  # (B, k)
    finished: torch.Tensor,  # (B, k) bool
    num_beams: int,
) -> tuple[torch.Tensor, torch.LongTensor, torch.LongTensor, torch.Tensor]:
    """The `num_beams` best continuations of each image: scores, hypotheses, tokens and tokens' log-probabilities.

    A finished hypothesis has one continuation, at log-probability 0 (the caller sets its token); its others have the
    total score -999. Equal to sorting `scores + log_probs` over all `k * V` continuations, as the original does: the
    best of an image are among the `num_beams` best of each hypothesis. All results are (B, num_beams).
    """
    token_log_probs, tokens = log_probs.topk(num_beams)  # (B, k, num_beams)
    finished = finished.unsqueeze(-1)
    token_log_probs = token_log_probs.masked_fill(finished, 0)
    totals = scores.unsqueeze(-1) + token_log_probs  # (B, k, num_beams)
    totals[:, :, 1:].masked_fill_(finished, -999)
    scores, best = totals.flatten(1).topk(num_beams)  # (B, num_beams)
    return scores, best // num_beams, tokens.flatten(1).gather(1, best), token_log_probs.flatten(1).gather(1, best)


# Arguments that other models' `generate` takes, and what to do instead.
FOREIGN_ARGUMENTS = {
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


def check_tensors(**inputs) -> None:
    """ValueError, saying what to do, for inputs that are neither tensors nor None."""
    for name, value in inputs.items():
        if value is None or isinstance(value, torch.Tensor):
            continue
        given = type(value).__name__
        items = value[:1] if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, str | bytes | os.PathLike) or hasattr(item, "getbands") for item in items):
            raise ValueError(
                f"`{name}` must be a tensor of features, not images ({given}): "
                '`pipeline("image-captioning", model=.., grid_backbone=..)` captions images, and '
                "scripts/extract_features.py makes features of them."
            )
        raise ValueError(
            f"`{name}` must be a tensor, not {given}: let the processor make it, "
            '`processor(.., return_tensors="pt")`, or `torch.as_tensor`.'
        )


def check_request(inputs: object, arguments: dict, vocab_size: int) -> None:
    """Refuses what `generate` would have to ignore or would fail on without saying why.

    Args:
        inputs: the first argument of `generate`.
        arguments: the others.
        vocab_size: of the model.
    """
    for name, remedy in FOREIGN_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ValueError(f"`generate` of this model takes no `{name}`: {remedy}.")
    # `Seq2SeqTrainer` hands over whole evaluation batches, and, as hardly anybody else does, says `synced_gpus`.
    if arguments.get("labels") is not None and arguments.get("synced_gpus") is None:
        raise ValueError(
            "`generate` does not read `labels`. To go on from a text, give it to the processor as `prompt=` instead "
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
    if cells is None:
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
    """Refuses masks and prompts that do not belong to the features."""
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
    """Refuses settings that need what this model does not have."""
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
    """Refuses what works word by word where there are several hypotheses."""
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
    """Refuses drafts of several words that could not be taken back, and those of an ensemble's first layers."""
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


class StopWordsCriteria(StoppingCriteria):
    """Ends a caption after certain words.

    The library's own criterion for `stop_strings` wants a tokenizer that can spell any string.

    Args:
        stop_strings: one or several words each, such as `"dog"` or `"on a table"`.
        tokenizer: a `DifnetTokenizer`.

    Raises:
        ValueError: a string has no word, or one that is not in the vocabulary.
    """

    def __init__(self, stop_strings: str | list[str], tokenizer: "PreTrainedTokenizerBase") -> None:
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        self.endings = tokenizer.encode_captions([string.strip() for string in strings])
        for string, ids in zip(strings, self.endings, strict=True):
            if not ids or tokenizer.unk_token_id in ids:
                raise ValueError(
                    f"`stop_strings`: {string[:60]!r} is not made of words of the vocabulary, so no caption ever "
                    "contains it. Words are lower-case and without punctuation marks."
                )

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for ending in self.endings:
            if len(ending) <= input_ids.shape[1]:
                done |= (input_ids[:, -len(ending) :] == input_ids.new_tensor(ending)).all(1)
        return done


class CheckedGenerationMixin(GenerationMixin):
    """The library's `generate`, which says what to do where it would fail or ignore something without a word."""

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        check_request(args[0] if args else kwargs.get("inputs"), kwargs, self.config.vocab_size)
        return super().generate(*args, **kwargs)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs
    ) -> tuple[GenerationConfig, dict]:
        """The length that a caller sets counts, be it `max_length` or `max_new_tokens` that the checkpoint stores."""
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        names = ("max_length", "max_new_tokens")
        for said in (kwargs, vars(generation_config) if generation_config is not None else {}):
            is_said = [said.get(name) is not None for name in names]
            if any(is_said):
                if not all(is_said):
                    setattr(prepared, names[is_said.index(False)], None)
                break
        check_settings(prepared)
        return prepared, model_kwargs

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs) -> None:
        streamer, assistant_model = map(generation_mode_kwargs.get, ("streamer", "assistant_model"))
        check_beams(generation_config, streamer, assistant_model)
        check_drafts(generation_config, assistant_model, is_captioner=hasattr(self, self.base_model_prefix))
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _get_stopping_criteria(
        self,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> StoppingCriteriaList:
        stop_strings = generation_config.stop_strings
        if stop_strings is None:
            return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)
        if tokenizer is None:
            raise ValueError(
                "`stop_strings` needs `tokenizer=processor.tokenizer` in the call of `generate`, and a search of the "
                "library: `original_beam_search` does not know it."
            )
        generation_config.stop_strings = None  # of the copy that this call works with
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)
        criteria.append(StopWordsCriteria(stop_strings, getattr(tokenizer, "tokenizer", tokenizer)))
        return criteria


def sequence_log_probs(
    model: "DifnetForConditionalGeneration",
    sequences: torch.LongTensor,
    grid_features: torch.Tensor | None = None,
    segmentation_features: torch.Tensor | None = None,
    **model_kwargs,
) -> torch.Tensor:
    r"""Log-probability of each token of given captions, teacher-forced, with gradient.

    One pass for all captions of a picture; the encoder runs once a picture. It is what self-critical training
    differentiates: `sequence_log_probs(...).sum(-1)` is `sequences_scores` of a beam search, with a graph.

    Args:
        model: a `DifnetForConditionalGeneration`.
        sequences (`(B, K, L)` or `(B * K, L)`): K captions of each picture, one picture's after another: `<bos> w1 ..
            wn <eos> <pad> ..`, as `generate` returns them.
        grid_features (`(B, N, 2048)`), segmentation_features (`(B, 133, H, W)`): the pictures; or `encoder_outputs=`.
        model_kwargs: further arguments of the model's `forward`, such as `grid_attention_mask`.

    Returns:
        `(B, K, L - 1)` or `(B * K, L - 1)`: entry `t` belongs to token `t + 1`; 0 at `<pad>`.

    Raises:
        ValueError: as the model's `forward`.
    """
    flat = sequences.reshape(-1, sequences.shape[-1])  # (B * K, L)
    targets = flat[:, 1:]
    states = model.model(
        grid_features,
        segmentation_features,
        decoder_input_ids=flat[:, :-1],
        use_cache=False,
        return_dict=True,
        **model_kwargs,
    ).last_hidden_state  # (B * K, L - 1, d_model)
    is_token = targets != model.config.pad_token_id
    logits = model.lm_head(states[is_token])  # (tokens, V): padding is not projected
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = logits.new_zeros(targets.shape)  # (B * K, L - 1)
    log_probs[is_token] = -nn.functional.cross_entropy(logits, targets[is_token], reduction="none")
    return log_probs.view(*sequences.shape[:-1], -1)
