"""The original's beam search as a `custom_generate` function.

Original files: `models/beam_search/beam_search.py` and `models/captioning_model.py`, both from Meshed-Memory
Transformer. The original's beam search and this one return the same tokens and scores. The original keeps a copy of
the image and of all keys and values for each beam, gathers them at every step, projects the image again in every
layer, and sorts beams x vocabulary scores. Here the beams of an image are branches of one sequence in the cache: the
decoder reads the newest token of every beam as `num_beams` positions of this sequence, keys and values stay where they
were written, and a mask tells each beam which of them are its own past.

All tensors of a search have their final shape from the beginning, but that finished images leave it. With
`cache_implementation="static"` they stay, and a step is a function of tensors that never move, for `torch.compile` and
CUDA graphs (`static_search_difnet.py`).
"""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from transformers.generation import (
    CompileConfig,
    GenerateBeamEncoderDecoderOutput,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from .cache_difnet import count_leading_padding
from .checks_difnet import check_original_beam_search

if TYPE_CHECKING:
    from .decoding_step_difnet import FastStep, ForwardStep
    from .modeling_difnet import DifnetForConditionalGeneration


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
    """K captions of each of B images, the best first, with room for T tokens behind the prompt.

    Args:
        tokens (`(B, K, T)`): the tokens, then `<pad>`.
        log_probs (`(B, K, T)`): their log-probabilities; 0 after `<eos>`.
        scores (`(B, K)`): sums of the log-probabilities.
        origins (`(B, K, T)`): the row of the step's scores that each token comes from, -1 after `<eos>`; `None` where
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
        """Captions of `<pad>`, (B, K, T), with log-probabilities on the device and in the type of `like`."""
        log_probs = like.new_zeros(shape)
        tokens, origins = (torch.full_like(log_probs, value, dtype=torch.long) for value in (pad_token_id, -1))
        return cls(tokens, log_probs, like.new_zeros(shape[:2]), origins if with_origins else None)


@dataclass
class BeamState(Hypotheses):
    """The search between two steps. One row of every tensor belongs to one of the images that are still searched.

    Before the first step each image has one hypothesis (K = 1), the empty one; afterwards K is `num_beams`. A static
    search has `num_beams` from the beginning, all but one of them impossible.

    Args:
        num_tokens (`(1,)`): how many tokens the hypotheses have, `<pad>` behind `<eos>` counted.
        images (`(B,)`): their places in the batch.
        finished (`(B, K)`): whether a hypothesis ends with `<eos>`.
        lengths (`(B, 1)`): number of the prompt's tokens, without the padding that it begins with.
        visible (`(B, K, slots)`): which slots of the cache a hypothesis looks at. Slots: the prompt, then `num_beams`
            for each step.
        step: what computes the next logits, with keys and values of all slots and of the encoder's output.
    """

    num_tokens: torch.LongTensor
    images: torch.LongTensor
    finished: torch.Tensor
    lengths: torch.LongTensor
    visible: torch.Tensor
    step: "ForwardStep | FastStep"

    def keep(self, images: torch.LongTensor) -> None:
        """Leaves out all images but some, given by their rows here."""
        for name, value in self.tensors().items():
            if name != "num_tokens":
                setattr(self, name, value[images])
        self.step.keep(images)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state's own tensors; those of `step` are not among them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def step_inputs(self, pad_token_id: int) -> dict[str, torch.Tensor]:
        """What the decoder reads next: each hypothesis's newest token, which is added to the visible slots."""
        (num_beams, num_steps), num_slots = self.tokens.shape[1:], self.visible.shape[2]
        newest = self.tokens.index_select(2, self.num_tokens - 1).squeeze(2)  # (B, K)
        beams, slots = (torch.arange(size, device=newest.device) for size in (num_beams, num_slots))
        own_slot = num_slots + num_beams * (self.num_tokens - num_steps) + beams  # (K,)
        # A hypothesis looks at its own newest token, unless that is `<pad>`, which the original hides.
        is_word = (newest != pad_token_id).unsqueeze(-1)  # (B, K, 1)
        self.visible = self.visible | (is_word & (slots == own_slot.unsqueeze(-1)))
        return {
            "tokens": newest,
            "attention_mask": self.visible.unsqueeze(1),  # (B, 1, K, slots)
            "position_ids": self.lengths + self.num_tokens,  # (B, 1)
        }

    def next_log_probs(self, pad_token_id: int, prompt_inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Log-probabilities (B, K, V) of the next tokens, those behind the prompt if its inputs are given."""
        logits = self.step.logits(**(prompt_inputs or self.step_inputs(pad_token_id)))
        if prompt_inputs is not None:
            logits = logits[:, -1:]  # (B, 1, V)
        return logits.to(self.scores.dtype).log_softmax(-1).expand(-1, self.tokens.shape[1], -1)

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
        self.tokens = self.appended(self.tokens[rows, beams], tokens)
        self.log_probs = self.appended(self.log_probs[rows, beams], token_log_probs)
        if self.origins is not None:
            origins = (self.images.unsqueeze(1) * num_beams + beams).masked_fill(was_finished, -1)
            self.origins = self.appended(self.origins[rows, beams], origins)
        self.num_tokens = self.num_tokens + 1

    def appended(self, sequences: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Sequences (B, K, T) whose next place is filled with values (B, K)."""
        return sequences.index_copy_(2, self.num_tokens, values.unsqueeze(-1))

    def store(self, results: Hypotheses) -> None:
        """Writes the hypotheses to their images' rows of `results`."""
        results.tokens[self.images] = self.tokens
        results.log_probs[self.images] = self.log_probs
        results.scores[self.images] = self.scores
        if self.origins is not None:
            results.origins[self.images] = self.origins


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
            `return_dict_in_generate`, `output_scores` count. `cache_implementation="static"` asks for a step that is
            compiled where `generate` of Transformers compiles its own: on a GPU, with `compile_config`, unless
            `disable_compile`. It takes a model that `FastStep` serves, in eval mode, without processors and
            `output_scores`; others are searched as without it.
        model_kwargs: `encoder_outputs`, `grid_attention_mask` and `decoder_attention_mask`, one row for each beam, as
            `generate` prepares them.

    Returns:
        Sequences `(B * num_return_sequences, L)`, as long as the longest of them, or an `OriginalBeamSearchOutput`.

    Raises:
        ValueError: sampling, a stopping criterion or an output that this search does not know, flash attention.
    """
    from .decoding_step_difnet import StaticStep, decoding_step  # which imports the network, which imports this file
    from .static_search_difnet import static_search

    check_original_beam_search(model, stopping_criteria, generation_config, model_kwargs)
    num_beams, pad_token_id = generation_config.num_beams, model.config.pad_token_id
    eos_token_ids = generation_config._eos_token_tensor
    if eos_token_ids is None:
        eos_token_ids = input_ids.new_zeros(0)
    with_scores = bool(generation_config.return_dict_in_generate and generation_config.output_scores)
    is_static = generation_config.cache_implementation == "static" and not (
        logits_processor or with_scores or model.training
    )
    prompts = input_ids[::num_beams]  # (B, prompt)
    num_steps = generation_config.max_length - prompts.shape[1]

    encoder_states, grid_attention_mask = (
        None if each is None else each[::num_beams]
        for each in (model_kwargs["encoder_outputs"].last_hidden_state, model_kwargs.get("grid_attention_mask"))
    )  # (B, N, d_model), (B, N)
    num_slots = prompts.shape[1] + num_beams * (num_steps - 1)
    decoder = decoding_step(model, encoder_states, grid_attention_mask, num_slots, is_static)
    is_static = isinstance(decoder, StaticStep)
    results, hypotheses = (
        Hypotheses.empty(
            (len(prompts), num_hypotheses, num_steps),
            pad_token_id,
            prompts.new_empty(0, dtype=torch.promote_types(encoder_states.dtype, torch.float32)),
            with_scores,
        )
        for num_hypotheses in (num_beams, num_beams if is_static else 1)
    )
    prompt_mask = model_kwargs.get("decoder_attention_mask")
    state, prompt_inputs = begin_search(prompts, prompt_mask, hypotheses, num_slots, pad_token_id, decoder)
    step_scores = []
    if is_static:
        is_compiled = model._valid_auto_compile_criteria(model_kwargs, generation_config)
        compile_config = (generation_config.compile_config or CompileConfig()) if is_compiled else None
        state = static_search(model, state, prompt_inputs, eos_token_ids, pad_token_id, compile_config)
    for step in range(0 if is_static else num_steps):
        is_closed = state.finished.all(dim=1)  # (B,)
        num_closed = int(is_closed.sum())
        if num_closed == len(is_closed):
            break
        if num_closed >= LEAVE_OUT_SHARE * len(is_closed):
            state.store(results)
            state.keep((~is_closed).nonzero().squeeze(1))

        log_probs = state.next_log_probs(pad_token_id, prompt_inputs if step == 0 else None)
        if logits_processor or with_scores:
            log_probs, processed = process_all_rows(logits_processor, prompts, results.tokens, step, state, log_probs)
            if with_scores:
                step_scores.append(processed)
        state.advance(log_probs, num_beams, eos_token_ids, pad_token_id)
    state.store(results)

    num_returned = generation_config.num_return_sequences
    found = results.tokens[:, :num_returned].flatten(0, 1)  # (B * returned, steps)
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
    prompt_mask: torch.Tensor | None,  # (B * num_beams, prompt)
    hypotheses: Hypotheses,  # (B, K, T), empty
    num_slots: int,
    pad_token_id: int,
    step: "ForwardStep | FastStep",
) -> tuple[BeamState, dict[str, torch.Tensor]]:
    """The state before the first step, and what the decoder reads in it.

    Raises:
        ValueError: the mask hides a whole prompt.
    """
    (batch_size, prompt_length), device = prompts.shape, prompts.device
    num_hypotheses = hypotheses.tokens.shape[1]
    inputs = {"tokens": prompts}
    lengths = torch.full((batch_size, 1), prompt_length, device=device)
    is_word = prompts != pad_token_id  # (B, prompt)
    if prompt_mask is not None:
        # `generate` has moved padding to the left, so that all captions continue at the same slot. `<pad>` between
        # words is hidden, and takes up a position, as it does without a mask.
        is_word = is_word & (prompt_mask[:: len(prompt_mask) // batch_size] != 0)
        num_leading = count_leading_padding(is_word)  # (B, 1)
        lengths = lengths - num_leading
        if not lengths.all():
            image = int((lengths == 0).nonzero()[0, 0])
            raise ValueError(
                f"`decoder_attention_mask` hides the whole prompt of image {image}: `<bos>` is no padding."
            )
        positions = torch.arange(1, prompt_length + 1, device=device) - num_leading
        inputs |= {"attention_mask": is_word.long(), "position_ids": positions.clamp(min=0)}
    visible = torch.zeros(batch_size, num_hypotheses, num_slots, dtype=torch.bool, device=device)
    visible[:, :, :prompt_length] = is_word.unsqueeze(1)
    hypotheses.scores[:, 1:] = -torch.inf
    state = BeamState(
        **vars(hypotheses),
        num_tokens=torch.zeros(1, dtype=torch.long, device=device),
        images=torch.arange(batch_size, device=device),
        finished=torch.zeros(batch_size, num_hypotheses, dtype=torch.bool, device=device),
        lengths=lengths,
        visible=visible,
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
    num_tokens: int,
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
    tokens = state.tokens.gather(1, shown.unsqueeze(-1).expand_as(state.tokens))[:, :, :num_tokens]

    words = all_tokens[:, :, :num_tokens].clone()
    words[state.images] = tokens.expand(-1, num_beams, -1)
    prefixes = torch.cat([prompts.unsqueeze(1).expand(-1, num_beams, -1), words], dim=2)
    processed = log_probs.new_full((len(prompts), num_beams, vocab_size), -math.log(vocab_size))
    processed[state.images] = log_probs.expand(-1, num_beams, -1)
    processed = logits_processor(prefixes.flatten(0, 1), processed.flatten(0, 1))
    return processed.view(-1, num_beams, vocab_size)[state.images, :num_hypotheses], processed
