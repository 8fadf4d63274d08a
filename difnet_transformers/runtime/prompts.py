"""Beginnings of captions, put in order as `generate` of the model does; see modeling_difnet/cache_difnet.py."""

from __future__ import annotations

import numpy as np


def prepare_prompts(
    decoder_input_ids: np.ndarray | None,
    decoder_attention_mask: np.ndarray | None,
    num_images: int,
    start_token_id: int,
    pad_token_id: int,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts that all end in the last column and begin with the start token.

    Args:
        decoder_input_ids (`(B, L)`): the prompts, padded on either side; by default the start token alone.
        decoder_attention_mask (`(B, L)`): 1 for tokens that count, 0 for padding; by default `<pad>` is padding.
        num_images: B.
        start_token_id, pad_token_id, vocab_size: of the model.

    Returns:
        The prompts (B, L') and their mask, `True` for what is no padding.

    Raises:
        ValueError: ids of another shape or type, or outside the vocabulary; a prompt that is padding throughout.
    """
    if decoder_input_ids is None:
        if decoder_attention_mask is not None:
            raise ValueError("`decoder_attention_mask` is given without `decoder_input_ids`: give both, or neither.")
        return np.full((num_images, 1), start_token_id), np.ones((num_images, 1), bool)
    prompts = np.asarray(decoder_input_ids)
    if prompts.ndim != 2 or prompts.dtype.kind not in "iu" or len(prompts) != num_images or prompts.shape[1] == 0:
        raise ValueError(
            f"`decoder_input_ids` must be ids of shape (images, length), `<bos> w1 ..`, one row for each of "
            f"{num_images} images, not {prompts.dtype} of shape {prompts.shape}."
        )
    prompts = prompts.astype(np.int64)
    if not 0 <= prompts.min() <= prompts.max() < vocab_size:
        raise ValueError(
            f"`decoder_input_ids` holds ids from {prompts.min()} to {prompts.max()}; those of this model are 0 to "
            f"{vocab_size - 1}."
        )
    is_word = prompts != pad_token_id
    if decoder_attention_mask is not None:
        is_word = np.asarray(decoder_attention_mask) != 0
        if is_word.shape != prompts.shape:
            raise ValueError(
                f"`decoder_attention_mask` {is_word.shape} must have the shape of `decoder_input_ids` "
                f"{prompts.shape}: 1 for each token that counts, 0 for padding."
            )
    if not is_word.any(1).all():
        raise ValueError(f"Prompt {int(np.argmin(is_word.any(1)))} of `decoder_input_ids` is padding throughout.")
    prompts, is_word = move_padding_left(prompts, is_word, decoder_attention_mask is None, pad_token_id)
    return add_start_tokens(prompts, is_word, start_token_id, pad_token_id)


def num_leading_padding(is_word: np.ndarray) -> np.ndarray:
    """Number of `False` before the first `True` in each row of a mask (B, L), (B, 1)."""
    return (is_word.cumsum(1) == 0).sum(1, keepdims=True)


def move_padding_left(
    prompts: np.ndarray, is_word: np.ndarray, keep_inner: bool, pad_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts that end together. `keep_inner`: whether padding between words counts as a token that is not seen."""
    num_trailing = num_leading_padding(is_word[:, ::-1])
    columns = (np.arange(prompts.shape[1]) - num_trailing) % prompts.shape[1]  # (B, L)
    prompts, is_word = (np.take_along_axis(each, columns, axis=1) for each in (prompts, is_word))
    is_leading = is_word.cumsum(1) == 0
    return np.where(is_leading, pad_token_id, prompts), ~is_leading if keep_inner else is_word


def add_start_tokens(
    prompts: np.ndarray, is_word: np.ndarray, start_token_id: int, pad_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Puts the start token before each prompt that lacks it."""
    first = num_leading_padding(is_word)[:, 0]  # (B,)
    rows = np.flatnonzero(prompts[np.arange(len(first)), first] != start_token_id)
    if len(rows) == 0:
        return prompts, is_word
    if (first[rows] == 0).any():
        prompts = np.pad(prompts, ((0, 0), (1, 0)), constant_values=pad_token_id)
        is_word = np.pad(is_word, ((0, 0), (1, 0)))
        first = first + 1
    prompts[rows, first[rows] - 1], is_word[rows, first[rows] - 1] = start_token_id, True
    return prompts, is_word
