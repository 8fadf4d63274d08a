"""The original's beam search as a `custom_generate` function, and log-probabilities of given captions.

Original files: `models/beam_search/beam_search.py` and `models/captioning_model.py`, both from Meshed-Memory
Transformer. The same tokens and scores come out; what differs is what happens inside a step. The original keeps one
copy of the picture and of all keys and values for each beam, gathers all of them at every step, projects the picture
anew in every layer and sorts beams x vocabulary scores. Here a picture's beams are the tokens of a tree: the decoder
reads one new token of each beam as `num_beams` positions of one sequence, whose keys and values stay where they were
written, and a mask tells each beam which of them are its own past. Nothing is moved between beams.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import (
    EosTokenCriteria,
    GenerateBeamEncoderDecoderOutput,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import BaseModelOutput

if TYPE_CHECKING:
    from .modeling_difnet import DifnetForConditionalGeneration


@dataclass
class OriginalBeamSearchOutput(GenerateBeamEncoderDecoderOutput):
    """What `original_beam_search` returns with `return_dict_in_generate=True`.

    Args:
        sequences (`(B * num_return_sequences, L)`): `<bos> w1 .. wn <eos> <pad> ..`, a picture's best first.
        sequences_scores (`(B * num_return_sequences,)`): sums of the words' and `<eos>`'s log-probabilities.
        sequences_log_probs (`(B * num_return_sequences, L - prompt)`): the addends; 0 after `<eos>`.
    """

    sequences_log_probs: torch.FloatTensor | None = None


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
    the original's fixed number of steps; pictures whose hypotheses are all finished are left out once they are many.

    Args:
        model: a `DifnetForConditionalGeneration`, with eager or SDPA attention.
        input_ids (`(B * num_beams, prompt)`): as `generate` prepares them, each prompt once for each beam.
        logits_processor: applied to the log-probabilities of each step, before they are added up.
        stopping_criteria: `max_length` and `eos_token_id` alone; others raise.
        generation_config: `num_beams`, `num_return_sequences`, `max_length`, `eos_token_id`, `pad_token_id`,
            `return_dict_in_generate` count.
        model_kwargs: `encoder_outputs` and `grid_attention_mask`, one row for each beam, as `generate` prepares them.

    Returns:
        Sequences `(B * num_return_sequences, L)`, or an `OriginalBeamSearchOutput`.

    Raises:
        ValueError: sampling, a stopping criterion or an output that this search does not know, flash attention.
    """
    check_arguments(model, stopping_criteria, generation_config, model_kwargs)
    num_beams = generation_config.num_beams
    pad_token_id = model.config.pad_token_id
    eos_token_ids = generation_config._eos_token_tensor
    if eos_token_ids is None:
        eos_token_ids = input_ids.new_zeros(0)

    prompts = input_ids = input_ids[::num_beams]  # (B, prompt): one row a picture from here on
    encoder_states = model_kwargs["encoder_outputs"].last_hidden_state[::num_beams]  # (B, N, d_model)
    encoder_outputs = BaseModelOutput(encoder_states)
    grid_attention_mask = model_kwargs.get("grid_attention_mask")
    if grid_attention_mask is not None:
        grid_attention_mask = grid_attention_mask[::num_beams]
    (batch_size, prompt_length), device = input_ids.shape, input_ids.device
    num_steps = generation_config.max_length - prompt_length
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    # Step 0: one hypothesis a picture.
    logits = model(
        decoder_input_ids=input_ids,
        encoder_outputs=encoder_outputs,
        grid_attention_mask=grid_attention_mask,
        past_key_values=cache,
        use_cache=True,
    ).logits[:, -1:]  # (B, 1, V)
    scores = logits.new_zeros(batch_size, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
    finished = torch.zeros_like(scores, dtype=torch.bool)
    history = input_ids.new_zeros(batch_size, 1, 0)
    scores, _, tokens, token_log_probs = best_continuations(
        logits, scores, finished, num_beams, logits_processor, input_ids, history
    )
    finished = (tokens.unsqueeze(-1) == eos_token_ids).any(-1)  # (B, beams)
    history = tokens.unsqueeze(-1)  # (B, beams, steps so far)
    log_probs = token_log_probs.unsqueeze(-1)  # (B, beams, steps so far)
    # visible[b, k, s]: whether hypothesis k of picture b looks at slot s of the cache. Slots: the prompt, then
    # `num_beams` for each step.
    visible = (input_ids != pad_token_id).unsqueeze(1).expand(-1, num_beams, -1)  # (B, beams, slots so far)
    own_slot = torch.eye(num_beams, dtype=torch.bool, device=device)
    position_ids = torch.arange(prompt_length, prompt_length + num_steps, device=device).unsqueeze(0)  # (1, steps)

    # Results of all pictures, and the pictures that are still searched.
    all_tokens = input_ids.new_full((batch_size, num_beams, num_steps), pad_token_id)
    all_log_probs = scores.new_zeros(batch_size, num_beams, num_steps)
    all_scores = scores.clone()
    pictures = torch.arange(batch_size, device=device)
    rows = pictures.unsqueeze(1)  # (B, 1)

    for step in range(1, num_steps):
        # Leaving pictures out copies the caches of the others, which pays when there are enough of them.
        is_closed = finished.all(dim=1)  # (B,)
        if is_closed.sum() >= 0.25 * len(pictures):
            all_tokens[pictures, :, :step], all_log_probs[pictures, :, :step] = history, log_probs
            all_scores[pictures] = scores
            kept = (~is_closed).nonzero().squeeze(1)
            rows = rows[: len(kept)]
            pictures, input_ids, history, log_probs = pictures[kept], input_ids[kept], history[kept], log_probs[kept]
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
            decoder_position_ids=position_ids[:, step : step + 1],
            encoder_outputs=encoder_outputs,
            grid_attention_mask=grid_attention_mask,
            past_key_values=cache,
            use_cache=True,
        ).logits  # (B, beams, V)
        scores, beams, tokens, token_log_probs = best_continuations(
            logits, scores, finished, num_beams, logits_processor, input_ids, history
        )
        finished = finished.gather(1, beams)
        tokens = tokens.masked_fill(finished, pad_token_id)
        finished = finished | (tokens.unsqueeze(-1) == eos_token_ids).any(-1)
        visible = visible[rows, beams]
        history = torch.cat([history[rows, beams], tokens.unsqueeze(-1)], dim=2)
        log_probs = torch.cat([log_probs[rows, beams], token_log_probs.unsqueeze(-1)], dim=2)

    length = history.shape[2]
    all_tokens[pictures, :, :length], all_log_probs[pictures, :, :length] = history, log_probs
    all_scores[pictures] = scores

    num_returned = generation_config.num_return_sequences
    prompts = prompts.repeat_interleave(num_returned, dim=0)  # (B * returned, prompt)
    sequences = torch.cat([prompts, all_tokens[:, :num_returned, :length].flatten(0, 1)], dim=1)
    if not generation_config.return_dict_in_generate:
        return sequences
    return OriginalBeamSearchOutput(
        sequences=sequences,
        sequences_scores=all_scores[:, :num_returned].flatten(),
        sequences_log_probs=all_log_probs[:, :num_returned, :length].flatten(0, 1),
    )


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
    for criterion in stopping_criteria:
        if not isinstance(criterion, MaxLengthCriteria | EosTokenCriteria):
            raise ValueError(
                "`original_beam_search` ends at `max_new_tokens` or when all hypotheses are finished; it does not "
                f"know {type(criterion).__name__}."
            )
    for name in ("decoder_attention_mask", "decoder_position_ids", "decoder_inputs_embeds"):
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
    logits: torch.Tensor,  # (B, k, V)
    scores: torch.Tensor,  # (B, k)
    finished: torch.Tensor,  # (B, k) bool
    num_beams: int,
    logits_processor: LogitsProcessorList,
    prompt: torch.LongTensor,  # (B, prompt)
    history: torch.LongTensor,  # (B, k, steps so far)
) -> tuple[torch.Tensor, torch.LongTensor, torch.LongTensor, torch.Tensor]:
    """The `num_beams` best continuations of each picture: scores, hypotheses, tokens and tokens' log-probabilities.

    A finished hypothesis has one continuation, at log-probability 0 (the caller sets its token); its others have the
    total score -999. Equal to sorting `scores + log_softmax(logits)` over all `k * V` continuations, as the original
    does: the best of a picture are among the `num_beams` best of each hypothesis. All results are (B, num_beams).
    """
    log_probs = logits.to(scores.dtype).log_softmax(-1)  # (B, k, V)
    if logits_processor:
        prefix = torch.cat([prompt.unsqueeze(1).expand(-1, logits.shape[1], -1), history], dim=2)
        log_probs = logits_processor(prefix.flatten(0, 1), log_probs.flatten(0, 1)).view_as(log_probs)
    token_log_probs, tokens = log_probs.topk(num_beams)  # (B, k, num_beams)
    finished = finished.unsqueeze(-1)
    token_log_probs = token_log_probs.masked_fill(finished, 0)
    totals = scores.unsqueeze(-1) + token_log_probs  # (B, k, num_beams)
    totals[:, :, 1:].masked_fill_(finished, -999)
    scores, best = totals.flatten(1).topk(num_beams)  # (B, num_beams)
    return scores, best // num_beams, tokens.flatten(1).gather(1, best), token_log_probs.flatten(1).gather(1, best)


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
        **model_kwargs,
    ).last_hidden_state  # (B * K, L - 1, d_model)
    is_token = targets != model.config.pad_token_id
    logits = model.lm_head(states[is_token])  # (tokens, V): padding is not projected
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = logits.new_zeros(targets.shape)  # (B * K, L - 1)
    log_probs[is_token] = -nn.functional.cross_entropy(logits, targets[is_token], reduction="none")
    return log_probs.view(*sequences.shape[:-1], -1)
