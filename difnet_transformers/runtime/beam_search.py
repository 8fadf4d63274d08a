"""The original's beam search in NumPy.

It equals `original_beam_search` in modeling_difnet/generation_difnet.py: the same tokens in the same order, and the
same scores. Original files: `models/beam_search/beam_search.py` and `models/captioning_model.py`. The beams of an
image are branches of one sequence in the cache: each step reads the newest token of every beam, keys and values stay
where they were written, and a mask says which of them are a beam's own past.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .sessions import Session

# Leaving finished images out copies the cache of the others, which pays when this share of the images is finished.
LEAVE_OUT_SHARE = 0.25
# The cache grows by so many slots: attention reads all that there are, and OpenVINO prepares itself for each size.
NUM_MORE_SLOTS = 32


@dataclass
class BeamSearchOutput:
    """Captions, and how likely they are.

    Args:
        sequences (`(B * num_return_sequences, L)` int64): `<bos> w1 .. wn <eos> <pad> ..`, an image's best first.
        sequences_scores (`(B * num_return_sequences,)`): sums of the log-probabilities of the words and `<eos>`.
        sequences_log_probs (`(B * num_return_sequences, L - prompt)`): the addends; 0 after `<eos>`.
        scores (one `(B * num_beams, vocab_size)` for each step): log-probabilities, if asked for. Rows of finished
            hypotheses mean nothing.
        beam_indices (`(B * num_return_sequences, L - prompt)`): if scores are asked for, the row of `scores` that each
            token comes from; -1 after `<eos>`.
    """

    sequences: np.ndarray
    sequences_scores: np.ndarray
    sequences_log_probs: np.ndarray
    scores: tuple[np.ndarray, ...] | None = None
    beam_indices: np.ndarray | None = None


class DecodingStep:
    """The exported decoding step with its cache, which holds the tokens of all hypotheses of an image together.

    Args:
        session: of the decoding step.
        cross (`(B, heads, N, head_dim)` each): the encoder's outputs, `cross_keys_0`, `cross_values_0`, ..
        grid_attention_mask (`(B, N)` bool): which cells the decoder looks at.
        num_slots: tokens of an image that are read again.
    """

    def __init__(
        self, session: Session, cross: Mapping[str, np.ndarray], grid_attention_mask: np.ndarray, num_slots: int
    ) -> None:
        self.session = session
        self.constant = {**cross, "grid_attention_mask": grid_attention_mask}
        self.cache = {name.replace("cross", "past"): each[:, :, :0] for name, each in cross.items()}
        self.num_slots = num_slots
        self.num_filled = 0
        self.grow()

    def run(
        self,
        tokens: np.ndarray,
        position_ids: np.ndarray,
        visible: np.ndarray,
        num_best: int,
        with_log_probs: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Reads tokens, which the cache then holds.

        Args:
            tokens, position_ids (`(B, L)`): the prompts, or the newest token of each hypothesis.
            visible (`(B, L, slots)` bool): which slots each of them looks at, those of the new tokens included.
            num_best: wanted continuations of each token.
            with_log_probs: whether the log-probabilities of all words are returned.

        Returns:
            Log-probabilities (B, L, num_best) and ids (B, L, num_best) of the best next tokens, and, where asked for,
            the log-probabilities (B, L, V).
        """
        (batch_size, length), start = tokens.shape, self.num_filled
        past_visible = np.zeros((batch_size, length, self.capacity), bool)
        past_visible[:, :, :start] = visible[:, :, :start]
        new_names = {name.replace("past", "new"): name for name in self.cache}
        wanted = ["best_log_probs", "best_tokens", *(["log_probs"] if with_log_probs else [])]
        found = self.session.run(
            {
                "tokens": tokens,
                "position_ids": position_ids,
                "past_visible": past_visible,
                "new_visible": np.ascontiguousarray(visible[:, :, start:]),
                "num_best": np.array([num_best]),
                **self.constant,
                **self.cache,
            },
            [*wanted, *new_names],
        )
        self.num_filled = min(start + length, self.num_slots)  # nothing comes after the tokens of the last step
        while self.num_filled > self.capacity:
            self.grow()
        for new_name, name in new_names.items():
            self.cache[name][:, :, start : self.num_filled] = found[new_name][:, :, : self.num_filled - start]
        log_probs = found["log_probs"].copy() if with_log_probs else None
        return found["best_log_probs"].copy(), found["best_tokens"].astype(np.int64), log_probs

    @property
    def capacity(self) -> int:
        """Slots that there are."""
        return next(iter(self.cache.values())).shape[2]

    def grow(self) -> None:
        """Adds slots to the cache, with zeros, because what nothing looks at is multiplied by 0 all the same."""
        more = min(NUM_MORE_SLOTS, self.num_slots - self.capacity)
        self.cache = {name: np.pad(each, ((0, 0), (0, 0), (0, more), (0, 0))) for name, each in self.cache.items()}

    def keep(self, images: np.ndarray) -> None:
        """Leaves out all images but some, given by their rows here."""
        self.constant = {name: each[images] for name, each in self.constant.items()}
        self.cache = {name: each[images] for name, each in self.cache.items()}


@dataclass
class Hypotheses:
    """K captions of each of B images, the best first, with t tokens behind the prompt.

    Args:
        tokens (`(B, K, t)`): the tokens.
        log_probs (`(B, K, t)`): their log-probabilities; 0 after `<eos>`.
        scores (`(B, K)`): sums of the log-probabilities.
        origins (`(B, K, t)`): the row of the step's scores that each token comes from, -1 after `<eos>`.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    scores: np.ndarray
    origins: np.ndarray

    @classmethod
    def empty(cls, shape: tuple[int, int, int], pad_token_id: int) -> Hypotheses:
        """Captions of `<pad>`, (B, K, t)."""
        return cls(
            np.full(shape, pad_token_id),
            np.zeros(shape, np.float32),
            np.zeros(shape[:2], np.float32),
            np.full(shape, -1),
        )


@dataclass
class BeamState(Hypotheses):
    """The search between two steps; `BeamState` of modeling_difnet/generation_difnet.py describes the fields."""

    images: np.ndarray  # (B,)
    finished: np.ndarray  # (B, K) bool
    lengths: np.ndarray  # (B, 1)
    visible: np.ndarray  # (B, K, slots) bool
    step: DecodingStep

    def keep(self, images: np.ndarray) -> None:
        """Leaves out all images but some, given by their rows here."""
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), np.ndarray):
                setattr(self, field.name, value[images])
        self.step.keep(images)

    def step_inputs(self, pad_token_id: int) -> dict[str, np.ndarray]:
        """What the decoder reads next: each hypothesis's newest token, which is added to the visible slots."""
        newest = np.ascontiguousarray(self.tokens[:, :, -1])  # (B, K)
        # A hypothesis looks at its own newest token, unless that is `<pad>`, which the original hides.
        own_slot = np.eye(newest.shape[1], dtype=bool) & (newest != pad_token_id)[:, :, None]
        self.visible = np.concatenate([self.visible, own_slot], axis=2)
        positions = np.broadcast_to(self.lengths + self.tokens.shape[2], newest.shape)
        return {"tokens": newest, "position_ids": np.ascontiguousarray(positions), "visible": self.visible}

    def advance(
        self,
        best_log_probs: np.ndarray,  # (B, K, num_beams)
        best_tokens: np.ndarray,  # (B, K, num_beams)
        eos_token_ids: Sequence[int],
        pad_token_id: int,
    ) -> None:
        """Replaces the hypotheses by their `num_beams` best continuations.

        A finished hypothesis has one continuation, at log-probability 0; its others have the total score -999.
        """
        num_images, _, num_beams = best_tokens.shape
        is_finished = self.finished[:, :, None]
        best_log_probs = np.where(is_finished, np.float32(0), best_log_probs)
        totals = self.scores[:, :, None] + best_log_probs  # (B, K, num_beams)
        totals[:, :, 1:][np.broadcast_to(is_finished, totals[:, :, 1:].shape)] = -999
        flat = totals.reshape(num_images, -1)
        best = np.argsort(-flat, axis=1, kind="stable")[:, :num_beams]  # (B, num_beams)
        rows, beams = np.arange(num_images)[:, None], best // num_beams
        self.scores = flat[rows, best]
        was_finished = self.finished[rows, beams]
        tokens = np.where(was_finished, pad_token_id, best_tokens.reshape(num_images, -1)[rows, best])
        log_probs = best_log_probs.reshape(num_images, -1)[rows, best]
        origins = np.where(was_finished, -1, self.images[:, None] * num_beams + beams)
        self.finished = was_finished | np.isin(tokens, eos_token_ids)
        self.visible = self.visible[rows, beams]
        for name, newest in (("tokens", tokens), ("log_probs", log_probs), ("origins", origins)):
            setattr(self, name, np.concatenate([getattr(self, name)[rows, beams], newest[:, :, None]], axis=2))

    def store(self, results: Hypotheses) -> None:
        """Writes the hypotheses to their images' rows of `results`, which has room for all steps."""
        num_tokens = self.tokens.shape[2]
        for name in ("tokens", "log_probs", "origins"):
            getattr(results, name)[self.images, :, :num_tokens] = getattr(self, name)
        results.scores[self.images] = self.scores


def beam_search(
    step: DecodingStep,
    prompts: np.ndarray,
    prompt_mask: np.ndarray,
    *,
    num_beams: int,
    num_steps: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    fill_token_id: int | None = None,
    num_returned: int = 1,
    with_scores: bool = False,
) -> BeamSearchOutput:
    """The `num_beams` best captions of each image; the search of `original_beam_search`.

    Args:
        step: of the images, with an empty cache.
        prompts (`(B, prompt)`): `<bos>`, or the beginning of each caption, padded on the left.
        prompt_mask (`(B, prompt)` bool): `False` for padding.
        num_beams: hypotheses of each image.
        num_steps: most tokens of a caption behind its prompt.
        eos_token_ids: what ends a caption; none for no end but `num_steps`.
        pad_token_id: what follows a finished hypothesis, and is never looked at.
        fill_token_id: what stands in its place in the result.
        num_returned: of the `num_beams` captions.
        with_scores: whether the log-probabilities of all words are kept.
    """
    num_images, prompt_length = prompts.shape
    visible = (prompts != pad_token_id) & prompt_mask  # (B, prompt)
    num_leading = (visible.cumsum(1) == 0).sum(1, keepdims=True)  # (B, 1)
    state = BeamState(
        **vars(Hypotheses.empty((num_images, 1, 0), pad_token_id)),
        images=np.arange(num_images),
        finished=np.zeros((num_images, 1), bool),
        lengths=prompt_length - num_leading,
        visible=visible[:, None],
        step=step,
    )
    prompt_inputs = {
        "tokens": prompts,
        "position_ids": np.maximum(np.arange(1, prompt_length + 1) - num_leading, 0),
        "visible": visible[:, None] & np.tri(prompt_length, dtype=bool),
    }
    results = Hypotheses.empty((num_images, num_beams, num_steps), pad_token_id)
    step_scores = []
    for number in range(num_steps):
        is_closed: Any = state.finished.all(axis=1)  # (B,)
        if is_closed.all():
            break
        if is_closed.sum() >= LEAVE_OUT_SHARE * len(is_closed):
            state.store(results)
            state.keep(np.flatnonzero(~is_closed))
        inputs = prompt_inputs if number == 0 else state.step_inputs(pad_token_id)
        best_log_probs, best_tokens, log_probs = step.run(**inputs, num_best=num_beams, with_log_probs=with_scores)
        num_hypotheses = state.scores.shape[1]
        if log_probs is not None:
            all_rows = np.zeros((num_images, num_beams, log_probs.shape[2]), np.float32)
            all_rows[state.images] = log_probs[:, -num_hypotheses:]
            step_scores.append(all_rows.reshape(num_images * num_beams, -1))
        newest = slice(-num_hypotheses, None)  # of a prompt its last token
        state.advance(best_log_probs[:, newest], best_tokens[:, newest], eos_token_ids, pad_token_id)
    state.store(results)

    num_tokens = state.tokens.shape[2]
    found, log_probs, origins = (
        each[:, :num_returned, :num_tokens].reshape(num_images * num_returned, num_tokens)
        for each in (results.tokens, results.log_probs, results.origins)
    )
    is_end = np.isin(found, eos_token_ids)
    is_after_end = is_end.cumsum(1) > is_end
    length = int((~is_after_end).sum(1).max())  # hypotheses that are not returned may be longer
    if fill_token_id is not None:
        found = np.where(is_after_end, fill_token_id, found)
    return BeamSearchOutput(
        sequences=np.concatenate([prompts.repeat(num_returned, axis=0), found[:, :length]], axis=1),
        sequences_scores=results.scores[:, :num_returned].reshape(-1),
        sequences_log_probs=log_probs[:, :length],
        scores=tuple(step_scores) if with_scores else None,
        beam_indices=origins[:, :length] if with_scores else None,
    )
