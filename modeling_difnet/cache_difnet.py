"""The decoder's cache, and padding: which tokens a caption looks at, from call to call.

The cache is an `EncoderDecoderCache` of Transformers: keys and values of the tokens so far, and of the image. Its
attribute `padding_mask` carries the mask of these tokens, which cannot be told from their keys. In the original, the
layers themselves hold this state (`running_keys`, `running_values`, `running_mask_self_attention`).
"""

import inspect

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import create_causal_mask

# Transformers calls the decoder's cache `cache` from 5.24 on and `past_key_values` before, as an argument of its
# functions and as a field of its outputs.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def resolve_cache(past_key_values: Cache | None, cache: Cache | None) -> EncoderDecoderCache | None:
    """The decoder's cache, which callers may pass under either of its names.

    Raises:
        ValueError: both names are used, or it is another kind of cache.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("`past_key_values` and `cache` are two names of one argument: pass only one of them.")
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, EncoderDecoderCache):
        raise ValueError(
            f"The cache of this model is an `EncoderDecoderCache`, not {type(cache).__name__}: the words' and the "
            "image's keys are in two caches, `EncoderDecoderCache(DynamicCache(), DynamicCache())`. Leave it out to "
            "have one made."
        )
    return cache


def padding_mask(
    input_ids: torch.Tensor | None,  # (B * K, L)
    attention_mask: torch.Tensor | None,  # (B * K, past + L), or of more dimensions
    cache: EncoderDecoderCache | None,
    pad_token_id: int,
    inputs_embeds: torch.Tensor | None = None,  # (B * K, L, d_model), in place of the ids
) -> torch.Tensor | None:
    """Which tokens may be attended to, those in the cache included; the cache keeps it for the next call.

    Without an `attention_mask` every `<pad>` is padding.

    Returns:
        `(B * K, past + L)`, 0 or False for padding; the given mask where it has more dimensions; `None` stands for all
        tokens.

    Raises:
        ValueError: the mask does not cover the tokens in the cache, or these belong to another number of captions.
    """
    tokens = inputs_embeds if input_ids is None else input_ids
    if tokens is None:
        raise ValueError("Pass exactly one of `decoder_input_ids` and `decoder_inputs_embeds`.")
    past_length = cache.get_seq_length() if cache is not None else 0
    if not isinstance(past_length, int):
        # A static cache counts in a tensor. `generate` passes a mask with it, so that the tensor is not read here.
        if torch.compiler.is_compiling():
            return attention_mask
        if attention_mask is not None:
            keep_padding_mask(cache, attention_mask if attention_mask.ndim == 2 else None)
            return attention_mask
        past_length = int(past_length)
    past_mask = getattr(cache, "padding_mask", None) if past_length else None
    if attention_mask is None:
        if input_ids is None:
            is_word = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        else:
            is_word = input_ids != pad_token_id  # (B * K, L)
        if past_length == 0:
            attention_mask = is_word if input_ids is not None else None
        elif past_mask is not None or (not torch.compiler.is_compiling() and not is_word.all()):
            if past_mask is None:
                past_mask = is_word.new_ones(len(is_word), past_length)
            if len(past_mask) != len(is_word):
                raise ValueError(
                    f"The cache holds {len(past_mask)} captions with padding, but {len(is_word)} are given: pass "
                    "`decoder_attention_mask`, which says where the padding is."
                )
            attention_mask = torch.cat([past_mask[:, :past_length] != 0, is_word], dim=1)
    if attention_mask is None or attention_mask.ndim != 2:
        keep_padding_mask(cache, None)
        return attention_mask
    length = tokens.shape[1]
    if attention_mask.shape[1] != past_length + length:
        raise ValueError(
            f"`decoder_attention_mask` has {attention_mask.shape[1]} columns, but there are {past_length} tokens in "
            f"the cache and {length} new ones: it covers both."
        )
    keep_padding_mask(cache, attention_mask)
    return attention_mask


def keep_padding_mask(cache: EncoderDecoderCache | None, attention_mask: torch.Tensor | None) -> None:
    """Lets the cache, if there is one, carry the mask of its tokens to the next call."""
    if cache is not None:
        cache.padding_mask = attention_mask


def count_leading_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """Number of zeros before the first one in each row of a mask (B, L), (B, 1)."""
    return (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)


def move_padding_left(
    input_ids: torch.Tensor,  # (B, L)
    attention_mask: torch.Tensor | None,  # (B, L)
    pad_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts of one batch that end together, so that all captions continue in the same column.

    Padding between tokens stays where it is.

    Returns:
        The prompts, and their mask; None if none was given and no row begins or ends with padding.

    Raises:
        ValueError: a mask of another shape, or a row that is padding throughout.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`decoder_attention_mask` {tuple(attention_mask.shape)} must have the shape of `decoder_input_ids` "
            f"{tuple(input_ids.shape)}: 1 for each token that counts, 0 for padding."
        )
    is_word = input_ids != pad_token_id if attention_mask is None else attention_mask != 0
    is_empty = ~is_word.any(1)
    if is_empty.any():
        raise ValueError(f"Prompt {int(is_empty.nonzero()[0, 0])} of `decoder_input_ids` is padding throughout.")
    num_trailing = count_leading_padding(is_word.flip(1))
    if attention_mask is None and not (num_trailing.any() or (~is_word[:, 0]).any()):
        return input_ids, None

    columns = torch.arange(input_ids.shape[1], device=input_ids.device) - num_trailing
    columns = columns % input_ids.shape[1]  # (B, L)
    input_ids, is_word = input_ids.gather(1, columns), is_word.gather(1, columns)
    is_leading = is_word.cumsum(1) == 0
    # `<pad>` between tokens is padding without a mask, too, as it is in a caption alone.
    attention_mask = (~is_leading if attention_mask is None else is_word).long()
    return input_ids.masked_fill(is_leading, pad_token_id), attention_mask


def add_start_tokens(
    input_ids: torch.Tensor,  # (B, L), padded on the left
    attention_mask: torch.Tensor | None,  # (B, L)
    start_token_id: torch.Tensor,  # of all rows, or one for each
    pad_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Puts the start token before each prompt that lacks it; Transformers does so where all of a batch lack it."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    start_token_id = start_token_id.to(input_ids.device).reshape(-1).expand(len(input_ids))  # (B,)
    first = count_leading_padding(mask).squeeze(1)  # (B,)
    rows = (input_ids[torch.arange(len(first), device=first.device), first] != start_token_id).nonzero().squeeze(1)
    if len(rows) == 0:
        return input_ids, attention_mask
    if (first[rows] == 0).any():
        input_ids, mask = nn.functional.pad(input_ids, (1, 0), value=pad_token_id), nn.functional.pad(mask, (1, 0))
        first = first + 1
    input_ids, mask = input_ids.clone(), mask.clone()
    input_ids[rows, first[rows] - 1], mask[rows, first[rows] - 1] = start_token_id[rows], 1
    return input_ids, mask
