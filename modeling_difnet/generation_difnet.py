"""Decoding: `generate` for DIFNet, the original's beam search, and log-probabilities of given captions.

- `default_generation_config`: the settings of the original's evaluation.
- `original_beam_search`: a `custom_generate` function. Original files: `models/beam_search/beam_search.py` and
  `models/captioning_model.py`, both from Meshed-Memory Transformer.
- `DifnetGenerationMixin`: what `generate` of Transformers must know of this model.
- `sequence_log_probs`: teacher forcing with gradient, for self-critical training.

The original's beam search and this one return the same tokens and scores. The original keeps a copy of the image and
of all keys and values for each beam, gathers them at every step, projects the image again in every layer, and sorts
beams x vocabulary scores. Here the beams of an image are branches of one sequence in the cache: the decoder reads the
newest token of every beam as `num_beams` positions of this sequence, keys and values stay where they were written, and
a mask tells each beam which of them are its own past.
"""

import functools
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import (
    GenerateBeamEncoderDecoderOutput,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .cache_difnet import CACHE_NAME, add_start_tokens, count_leading_padding, move_padding_left, resolve_cache
from .checks_difnet import check_beams, check_drafts, check_original_beam_search, check_request, check_settings
from .configuration_difnet import DifnetConfig
from .token_log_probs_difnet import TokenLogProbs, token_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .decoding_step_difnet import FastStep, ForwardStep
    from .modeling_difnet import DifnetForConditionalGeneration

    # Nothing here needs it, but a saved model takes along the files that its own files name.
    from .pipeline_difnet import DifnetImageCaptioningPipeline  # noqa: F401


def default_generation_config(config: DifnetConfig) -> GenerationConfig:
    """The settings of the original's evaluation: five beams, 20 tokens, ranked by their log-probability."""
    return GenerationConfig(
        num_beams=5,
        # With `<bos>`. A stored `max_new_tokens` would win over the `max_length` of a caller.
        max_length=1 + min(20, config.max_position_embeddings),
        length_penalty=0.0,
        early_stopping="never",
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
    )


# The original's beam search


@dataclass
class OriginalBeamSearchOutput(GenerateBeamEncoderDecoderOutput):
    """What `original_beam_search` returns with `return_dict_in_generate=True`.

    Args:
        sequences (`(B * num_return_sequences, L)`): `<bos> w1 .. wn <eos> <pad> ..`, an image's best first.
        sequences_scores (`(B * num_return_sequences,)`): sums of the log-probabilities of the words and `<eos>`.
        sequences_log_probs (`(B * num_return_sequences, L - prompt)`): the addends; 0 after `<eos>`.
        scores (one `(B * num_beams, vocab_size)` for each step): with `output_scores=True`, the log-probabilities
            after the processors. Rows of finished hypotheses mean nothing.
        beam_indices (`(B * num_return_sequences, L - prompt)`): with `output_scores=True`, the row of `scores` that
            each token comes from; -1 after `<eos>`. For `model.compute_transition_scores`.
    """

    sequences_log_probs: torch.FloatTensor | None = None


@dataclass
class Hypotheses:
    """K captions of each of B images, the best first, with t tokens behind the prompt.

    Args:
        tokens (`(B, K, t)`): the tokens.
        log_probs (`(B, K, t)`): their log-probabilities; 0 after `<eos>`.
        scores (`(B, K)`): sums of the log-probabilities.
        origins (`(B, K, t)`): the row of the step's scores that each token comes from, -1 after `<eos>`; `None` where
            scores are not returned.
    """

    tokens: torch.LongTensor
    log_probs: torch.Tensor
    scores: torch.Tensor
    origins: torch.LongTensor | None

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int], pad_token_id: int, like: torch.Tensor, with_origins: bool
    ) -> "Hypotheses":
        """Captions of `<pad>`, (B, K, t), with log-probabilities on the device and in the type of `like`."""
        log_probs = like.new_zeros(shape)
        tokens, origins = (torch.full_like(log_probs, value, dtype=torch.long) for value in (pad_token_id, -1))
        return cls(tokens, log_probs, like.new_zeros(shape[:2]), origins if with_origins else None)


@dataclass
class BeamState(Hypotheses):
    """The search between two steps. One row of every tensor belongs to one of the images that are still searched.

    Before the first step each image has one hypothesis (K = 1), the empty one; afterwards K is `num_beams`.

    Args:
        images (`(B,)`): their places in the batch.
        finished (`(B, K)`): whether a hypothesis ends with `<eos>`.
        lengths (`(B, 1)`): number of the prompt's tokens, without the padding that it begins with.
        visible (`(B, K, slots)`): which slots of the cache a hypothesis looks at. Slots: the prompt, then `num_beams`
            for each step.
        step: what computes the next logits, with keys and values of all slots and of the encoder's output.
    """

    images: torch.LongTensor
    finished: torch.Tensor
    lengths: torch.LongTensor
    visible: torch.Tensor
    step: "ForwardStep | FastStep"

    def keep(self, images: torch.LongTensor) -> None:
        """Leaves out all images but some, given by their rows here."""
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), torch.Tensor):
                setattr(self, field.name, value[images])
        self.step.keep(images)

    def step_inputs(self, pad_token_id: int) -> dict[str, torch.Tensor]:
        """What the decoder reads next: each hypothesis's newest token, which is added to the visible slots."""
        newest = self.tokens[:, :, -1]  # (B, K)
        own_slot = torch.eye(newest.shape[1], dtype=torch.bool, device=newest.device)
        # A hypothesis looks at its own newest token, unless that is `<pad>`, which the original hides.
        self.visible = torch.cat([self.visible, own_slot & (newest != pad_token_id).unsqueeze(-1)], dim=2)
        return {
            "tokens": newest,
            "attention_mask": self.visible.unsqueeze(1),  # (B, 1, K, slots)
            "position_ids": self.lengths + self.tokens.shape[2],  # (B, 1)
        }

    def advance(
        self, log_probs: torch.Tensor, num_beams: int, eos_token_ids: torch.LongTensor, pad_token_id: int
    ) -> None:
        """Replaces the hypotheses by their `num_beams` best continuations, given log-probabilities (B, K, V)."""
        self.scores, beams, tokens, token_log_probs = best_continuations(
            log_probs, self.scores, self.finished, num_beams
        )  # (B, num_beams) each
        rows = torch.arange(len(beams), device=beams.device).unsqueeze(1)  # (B, 1)
        was_finished = self.finished.gather(1, beams)
        tokens = tokens.masked_fill(was_finished, pad_token_id)
        self.finished = was_finished | (tokens.unsqueeze(-1) == eos_token_ids).any(-1)
        self.visible = self.visible[rows, beams]
        self.tokens = torch.cat([self.tokens[rows, beams], tokens.unsqueeze(-1)], dim=2)
        self.log_probs = torch.cat([self.log_probs[rows, beams], token_log_probs.unsqueeze(-1)], dim=2)
        if self.origins is not None:
            origins = (self.images.unsqueeze(1) * num_beams + beams).masked_fill(was_finished, -1)
            self.origins = torch.cat([self.origins[rows, beams], origins.unsqueeze(-1)], dim=2)

    def store(self, results: Hypotheses) -> None:
        """Writes the hypotheses to their images' rows of `results`, which has room for all steps."""
        num_tokens = self.tokens.shape[2]
        results.tokens[self.images, :, :num_tokens] = self.tokens
        results.log_probs[self.images, :, :num_tokens] = self.log_probs
        results.scores[self.images] = self.scores
        if self.origins is not None:
            results.origins[self.images, :, :num_tokens] = self.origins


# Leaving finished images out copies the cache of the others, which pays when this share of the images is finished.
LEAVE_OUT_SHARE = 0.25


def original_beam_search(
    model: "DifnetForConditionalGeneration",
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs,
) -> torch.LongTensor | OriginalBeamSearchOutput:
    r"""The original's beam search: `model.generate(..., custom_generate=original_beam_search)`.

    A finished caption stays among the `num_beams` hypotheses of its image and takes up a place, with its score, until
    better ones push it out; the beam search of Transformers moves it to a separate list instead. No length
    normalisation. The search ends when all hypotheses are finished or have `max_length` tokens, with the result of
    the original's fixed number of steps.

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
    from .decoding_step_difnet import decoding_step  # which imports the network, which imports this file

    check_original_beam_search(model, stopping_criteria, generation_config, model_kwargs)
    num_beams, pad_token_id = generation_config.num_beams, model.config.pad_token_id
    eos_token_ids = generation_config._eos_token_tensor
    if eos_token_ids is None:
        eos_token_ids = input_ids.new_zeros(0)
    with_scores = bool(generation_config.return_dict_in_generate and generation_config.output_scores)
    prompts = input_ids[::num_beams]  # (B, prompt)
    num_steps = generation_config.max_length - prompts.shape[1]

    encoder_states, grid_attention_mask = (
        None if each is None else each[::num_beams]
        for each in (model_kwargs["encoder_outputs"].last_hidden_state, model_kwargs.get("grid_attention_mask"))
    )  # (B, N, d_model), (B, N)
    num_slots = prompts.shape[1] + num_beams * (num_steps - 1)
    state, prompt_inputs = begin_search(
        prompts,
        num_beams,
        pad_token_id,
        decoding_step(model, encoder_states, grid_attention_mask, num_slots),
        torch.promote_types(encoder_states.dtype, torch.float32),
        model_kwargs.get("decoder_attention_mask"),
        with_scores,
    )
    results = Hypotheses.empty((len(prompts), num_beams, num_steps), pad_token_id, state.scores, with_scores)
    step_scores = []
    for step in range(num_steps):
        is_closed = state.finished.all(dim=1)  # (B,)
        num_closed = int(is_closed.sum())
        if num_closed == len(is_closed):
            break
        if num_closed >= LEAVE_OUT_SHARE * len(is_closed):
            state.store(results)
            state.keep((~is_closed).nonzero().squeeze(1))

        logits = state.step.logits(**(prompt_inputs if step == 0 else state.step_inputs(pad_token_id)))
        logits = logits[:, -state.scores.shape[1] :]  # (B, K, V)
        log_probs = logits.to(state.scores.dtype).log_softmax(-1)
        if logits_processor or with_scores:
            log_probs, processed = process_all_rows(logits_processor, prompts, results.tokens, state, log_probs)
            if with_scores:
                step_scores.append(processed)
        state.advance(log_probs, num_beams, eos_token_ids, pad_token_id)
    state.store(results)

    num_returned = generation_config.num_return_sequences
    found = results.tokens[:, :num_returned, : state.tokens.shape[2]].flatten(0, 1)  # (B * returned, steps)
    # Hypotheses that are not returned may be longer.
    is_end = (found.unsqueeze(-1) == eos_token_ids).any(-1)
    is_after_end = is_end.cumsum(1) > is_end.long()
    length = int((~is_after_end).sum(1).max())
    if generation_config._pad_token_tensor is not None:
        found = torch.where(is_after_end, generation_config._pad_token_tensor, found)
    sequences = torch.cat([prompts.repeat_interleave(num_returned, dim=0), found[:, :length]], dim=1)
    if not generation_config.return_dict_in_generate:
        return sequences
    return OriginalBeamSearchOutput(
        sequences=sequences,
        sequences_scores=results.scores[:, :num_returned].flatten(),
        sequences_log_probs=results.log_probs[:, :num_returned, :length].flatten(0, 1),
        scores=tuple(step_scores) if with_scores else None,
        beam_indices=results.origins[:, :num_returned, :length].flatten(0, 1) if with_scores else None,
    )


def begin_search(
    prompts: torch.LongTensor,  # (B, prompt)
    num_beams: int,
    pad_token_id: int,
    step: "ForwardStep | FastStep",
    dtype: torch.dtype,  # of log-probabilities
    prompt_mask: torch.Tensor | None,  # (B * num_beams, prompt)
    with_origins: bool,
) -> tuple[BeamState, dict[str, torch.Tensor]]:
    """One empty hypothesis for each image, and what the decoder reads in the first step.

    Raises:
        ValueError: the mask hides a whole prompt.
    """
    (batch_size, prompt_length), device = prompts.shape, prompts.device
    inputs = {"tokens": prompts}
    lengths = torch.full((batch_size, 1), prompt_length, device=device)
    visible = prompts != pad_token_id  # (B, prompt)
    if prompt_mask is not None:
        # `generate` has moved padding to the left, so that all captions continue at the same slot. `<pad>` between
        # words is hidden, and takes up a position, as it does without a mask.
        visible = visible & (prompt_mask[::num_beams] != 0)
        num_leading = count_leading_padding(visible)  # (B, 1)
        lengths = lengths - num_leading
        if not lengths.all():
            image = int((lengths == 0).nonzero()[0, 0])
            raise ValueError(
                f"`decoder_attention_mask` hides the whole prompt of image {image}: `<bos>` is no padding."
            )
        positions = torch.arange(1, prompt_length + 1, device=device) - num_leading
        inputs |= {"attention_mask": visible.long(), "position_ids": positions.clamp(min=0)}
    like = torch.empty(0, dtype=dtype, device=device)
    hypotheses = Hypotheses.empty((batch_size, 1, 0), pad_token_id, like, with_origins)
    state = BeamState(
        **vars(hypotheses),
        images=torch.arange(batch_size, device=device),
        finished=torch.zeros(batch_size, 1, dtype=torch.bool, device=device),
        lengths=lengths,
        visible=visible.unsqueeze(1),
        step=step,
    )
    return state, inputs


def best_continuations(
    log_probs: torch.Tensor,  # (B, K, V)
    scores: torch.Tensor,  # (B, K)
    finished: torch.Tensor,  # (B, K) bool
    num_beams: int,
) -> tuple[torch.Tensor, torch.LongTensor, torch.LongTensor, torch.Tensor]:
    """The `num_beams` best continuations of each image: scores, hypotheses, tokens, log-probabilities.

    A finished hypothesis has one continuation, at log-probability 0 (the caller sets its token); its others have the
    total score -999. Equal to sorting `scores + log_probs` over all `K * V` continuations, as the original does: the
    best of an image are among the `num_beams` best of each hypothesis. All results are (B, num_beams).
    """
    token_log_probs, tokens = log_probs.topk(num_beams)  # (B, K, num_beams)
    finished = finished.unsqueeze(-1)
    token_log_probs = token_log_probs.masked_fill(finished, 0)
    totals = scores.unsqueeze(-1) + token_log_probs  # (B, K, num_beams)
    totals[:, :, 1:].masked_fill_(finished, -999)
    scores, best = totals.flatten(1).topk(num_beams)  # (B, num_beams)
    return scores, best // num_beams, tokens.flatten(1).gather(1, best), token_log_probs.flatten(1).gather(1, best)


def process_all_rows(
    logits_processor: LogitsProcessorList,
    prompts: torch.LongTensor,  # (all images, prompt)
    all_tokens: torch.LongTensor,  # (all images, beams, steps): the captions of images that are left out
    state: BeamState,
    log_probs: torch.Tensor,  # (B, K, V)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the processors all rows of the batch, as many for each image as there are beams, in the caller's order.

    Processors find out by the number of a row which image it belongs to, as `prefix_allowed_tokens_fn` does.

    Returns:
        The processed log-probabilities of the images that are searched, (B, K, V), and of all rows,
        (all images * beams, V).
    """
    num_beams, num_hypotheses, vocab_size = all_tokens.shape[1], *log_probs.shape[1:]
    # What a finished or impossible hypothesis would get is not used, and a processor may have no answer for its words,
    # such as a function that allows the words of certain captions: it is given an open hypothesis instead.
    is_open = ~state.finished & (state.scores > -float("inf"))
    rank = state.finished.long() + 2 * is_open.long()  # (B, K) 2: open, 1: finished, 0: impossible
    best_rank, first = rank.max(1, keepdim=True)
    own = torch.arange(num_hypotheses, device=rank.device).expand_as(rank)
    shown = torch.where(rank == best_rank, own, first)
    tokens = state.tokens.gather(1, shown.unsqueeze(-1).expand_as(state.tokens))

    words = all_tokens[:, :, : tokens.shape[2]].clone()
    words[state.images] = tokens.expand(-1, num_beams, -1)
    prefixes = torch.cat([prompts.unsqueeze(1).expand(-1, num_beams, -1), words], dim=2)
    processed = log_probs.new_full((len(prompts), num_beams, vocab_size), -math.log(vocab_size))
    processed[state.images] = log_probs.expand(-1, num_beams, -1)
    processed = logits_processor(prefixes.flatten(0, 1), processed.flatten(0, 1))
    return processed.view(-1, num_beams, vocab_size)[state.images, :num_hypotheses], processed


# `generate` of Transformers


class StopWordsCriteria(StoppingCriteria):
    """Ends a caption after certain words.

    For the `stop_strings` of `generate`: the criterion of Transformers needs a tokenizer that can spell any string.

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


class DifnetGenerationMixin(GenerationMixin):
    """What `generate` of Transformers must know of DIFNet, for one captioner and for an ensemble of them.

    Three things differ from other models: an image is encoded and cached once for all its beams; `<pad>` is hidden
    wherever it stands, also among generated tokens, and prompts may be padded on either side; what `generate` would
    ignore or fail on without a word is refused.
    """

    original_beam_search = staticmethod(original_beam_search)

    # Checks and settings

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
        for settings in (kwargs, vars(generation_config) if generation_config is not None else {}):
            is_set = [settings.get(name) is not None for name in names]
            if any(is_set):
                if not all(is_set):
                    setattr(prepared, names[is_set.index(False)], None)
                break
        check_settings(prepared)
        return prepared, model_kwargs

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs) -> None:
        streamer, assistant_model = map(generation_mode_kwargs.get, ("streamer", "assistant_model"))
        check_beams(generation_config, streamer, assistant_model)
        check_drafts(generation_config, assistant_model, is_captioner=hasattr(self, self.base_model_prefix))
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        longest = self.config.max_position_embeddings + 1  # the last token is never read
        if generation_config.max_length > longest:
            raise ValueError(
                f"`generate` is asked for sequences of up to {generation_config.max_length} tokens, but the position "
                f"table of this model ends at {longest - 1}. Ask for `max_new_tokens={longest - input_ids_length}` or "
                "less."
            )

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
                "`stop_strings` needs `tokenizer=processor.tokenizer` in the call of `generate`, and a search of "
                "Transformers: `original_beam_search` does not know it."
            )
        generation_config.stop_strings = None  # of the copy that this call works with
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)
        criteria.append(StopWordsCriteria(stop_strings, getattr(tokenizer, "tokenizer", tokenizer)))
        return criteria

    # Prompts and padding

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size: int, model_input_name: str, model_kwargs: dict, *args, **kwargs
    ) -> tuple[torch.LongTensor, dict]:
        """Prompts of different lengths end in one column, whichever side they are padded on."""
        prompts = model_kwargs.get("decoder_input_ids")
        num_empty = 0
        if prompts is not None:
            mask = model_kwargs.pop("decoder_attention_mask", None)
            prompts, mask = move_padding_left(prompts.long(), mask, self.config.pad_token_id)
            start_token_id = args[0] if args else kwargs.get("decoder_start_token_id")
            if start_token_id is not None:
                prompts, mask = add_start_tokens(prompts, mask, start_token_id, self.config.pad_token_id)
            # Transformers looks for `<bos>` in the first column, and puts one there where no row begins with it.
            num_empty = int(count_leading_padding(mask).min()) if mask is not None else 0
            model_kwargs["decoder_input_ids"] = prompts[:, num_empty:]
            if mask is not None:
                model_kwargs["decoder_attention_mask"] = mask[:, num_empty:]
        input_ids, model_kwargs = super()._prepare_decoder_input_ids_for_generation(
            batch_size, model_input_name, model_kwargs, *args, **kwargs
        )
        if (mask := model_kwargs.get("decoder_attention_mask")) is not None and prompts is not None:
            input_ids = nn.functional.pad(input_ids, (num_empty, 0), value=self.config.pad_token_id)
            model_kwargs["decoder_attention_mask"] = nn.functional.pad(mask, (num_empty, 0))
        return input_ids, model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, next_sequence_length: int | None = None, **kwargs
    ) -> dict:
        """Adds a mask of all tokens so far: neither a prompt's padding nor a generated `<pad>` is attended to."""
        mask = input_ids != self.config.pad_token_id  # (B * K, L)
        cache = resolve_cache(kwargs.get("past_key_values"), kwargs.get("cache"))
        past_length = cache.get_seq_length() if cache is not None else 0
        if next_sequence_length is None and 0 < past_length < input_ids.shape[1]:
            # Without a mask Transformers takes all of the caption for what comes after the cache.
            next_sequence_length = input_ids.shape[1] - int(past_length)
        if isinstance(past_length, int):
            num_missing = past_length + (next_sequence_length or input_ids.shape[1]) - input_ids.shape[1]
            if num_missing > 0:  # a long prompt in chunks
                past_mask = getattr(cache, "padding_mask", None)
                past_mask = mask.new_ones(len(mask), past_length) if past_mask is None else past_mask
                mask = torch.cat([past_mask[:, :num_missing] != 0, mask], dim=1)
        if (prompt_mask := kwargs.pop("decoder_attention_mask", None)) is not None:
            # Transformers has added ones for the tokens since the prompt.
            mask = mask & (prompt_mask[:, : mask.shape[1]] != 0)
        # Drafts of assisted decoding may continue behind the longest caption, where Transformers drops them.
        longest = self.config.max_position_embeddings
        if prompt_mask is not None or mask.shape[1] > longest:
            positions = torch.arange(1, mask.shape[1] + 1, device=mask.device) - count_leading_padding(mask)
            kwargs["decoder_position_ids"] = positions.clamp(min=0, max=longest)
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, decoder_attention_mask=mask.long(), **kwargs
        )

    # Encoder and cache

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: dict
    ):
        """Takes the caller's cache under both of its names; Transformers knows one of them."""
        cache = resolve_cache(model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None))
        if cache is not None:
            model_kwargs[CACHE_NAME] = cache
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ):
        """Drops the features before Transformers repeats everything for each beam: the encoder has run.

        With one beam nothing is repeated, and assisted decoding encodes once more for the assistant: keep them.
        """
        if expand_size > 1:
            for name in ("segmentation_features", "segmentation_attention_mask"):
                model_kwargs.pop(name, None)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _reorder_cache(self, cache: EncoderDecoderCache, beam_idx: torch.LongTensor) -> EncoderDecoderCache:
        """Moves the tokens' keys and values to their new beams. Those of the image are equal in all its beams."""
        cache.self_attention_cache.reorder_cache(beam_idx)
        if (mask := getattr(cache, "padding_mask", None)) is not None:
            cache.padding_mask = mask.index_select(0, beam_idx.to(mask.device))
        return cache


# Log-probabilities of given captions


def caption_states(
    model: "DifnetForConditionalGeneration",
    sequences: torch.LongTensor,
    grid_features: torch.Tensor | None = None,
    segmentation_features: torch.Tensor | None = None,
    decoder_input_ids: torch.Tensor | None = None,
    **model_kwargs,
) -> tuple[torch.Tensor, torch.LongTensor, torch.BoolTensor]:
    r"""The decoder's states at the tokens of given captions, teacher-forced; padding is left out.

    Args:
        model, sequences, grid_features, segmentation_features, model_kwargs: as those of `sequence_log_probs`.
        decoder_input_ids (`(B * K, L - 1)`): what the decoder reads, by default the captions themselves.

    Returns:
        The states `(tokens, d_model)` of all captions' tokens, one caption's after another, these tokens `(tokens,)`,
        and where they stand, `(B * K, L - 1)`.
    """
    flat = sequences.reshape(-1, sequences.shape[-1])  # (B * K, L)
    states = model.model(
        grid_features,
        segmentation_features,
        decoder_input_ids=flat[:, :-1] if decoder_input_ids is None else decoder_input_ids,
        use_cache=False,
        return_dict=True,
        **model_kwargs,
    ).last_hidden_state  # (B * K, L - 1, d_model)
    is_token = flat[:, 1:] != model.config.pad_token_id
    return states[is_token], flat[:, 1:][is_token], is_token


def sequence_statistics(
    model: "DifnetForConditionalGeneration",
    sequences: torch.LongTensor,
    grid_features: torch.Tensor | None = None,
    segmentation_features: torch.Tensor | None = None,
    with_mean: bool = False,
    with_entropy: bool = False,
    temperature: float = 1.0,
    **model_kwargs,
) -> TokenLogProbs:
    r"""`sequence_log_probs` and, where asked for, the mean and the entropy over the vocabulary, with gradient.

    Args:
        model, sequences, grid_features, segmentation_features, model_kwargs: as those of `sequence_log_probs`.
        with_mean, with_entropy: what else is computed.
        temperature: as that of `sequence_log_probs`.

    Returns:
        Log-probabilities, means and entropies, each in the shape that `sequence_log_probs` returns; 0 at `<pad>`.
    """
    states, targets, is_token = caption_states(
        model, sequences, grid_features, segmentation_features, **model_kwargs
    )  # (tokens, d_model), (tokens,), (B * K, L - 1)
    of_tokens = token_log_probs(model.lm_head, states, targets, with_mean, with_entropy, temperature)

    def at_tokens(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        placed = values.new_zeros(is_token.shape).masked_scatter(is_token, values)  # (B * K, L - 1)
        return placed.view(*sequences.shape[:-1], -1)

    return TokenLogProbs(*map(at_tokens, of_tokens))


def sequence_log_probs(
    model: "DifnetForConditionalGeneration",
    sequences: torch.LongTensor,
    grid_features: torch.Tensor | None = None,
    segmentation_features: torch.Tensor | None = None,
    temperature: float = 1.0,
    **model_kwargs,
) -> torch.Tensor:
    r"""Log-probability of each token of given captions, teacher-forced, with gradient.

    One pass for all captions of an image; the encoder runs once for each image. Self-critical training
    differentiates it: `sequence_log_probs(...).sum(-1)` is `sequences_scores` of a beam search, with a graph.

    Args:
        model: a `DifnetForConditionalGeneration`.
        sequences (`(B, K, L)` or `(B * K, L)`): K captions of each image, one image's after another: `<bos> w1 ..
            wn <eos> <pad> ..`, as `generate` returns them.
        grid_features (`(B, N, 2048)`), segmentation_features (`(B, 133, H, W)`): the images; or `encoder_outputs=`,
            the output of `model.get_encoder()`, with its graph where it has one.
        temperature: of the distribution, as that of `generate`: it divides the logits.
        model_kwargs: further arguments of the model's `forward`, such as `grid_attention_mask`; with
            `decoder_input_ids` `(B * K, L - 1)` the decoder reads these in the place of the captions.

    Returns:
        `(B, K, L - 1)` or `(B * K, L - 1)`: entry `t` belongs to token `t + 1`; 0 at `<pad>`.

    Raises:
        ValueError: as the model's `forward`.
    """
    return sequence_statistics(
        model, sequences, grid_features, segmentation_features, temperature=temperature, **model_kwargs
    ).log_probs
