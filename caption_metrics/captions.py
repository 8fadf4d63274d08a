"""What every metric takes and gives: hypotheses with their references, and a score for the corpus and each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .tokenizer import PTBTokenizer

Caption = str | Sequence[str]  # as written, or its tokens


class Score(NamedTuple):
    """`corpus`: one number for all images. `per_image`: (images,) float64, in the order given."""

    corpus: float
    per_image: np.ndarray


def _tokens(caption: Caption, name: str, tokenizer: PTBTokenizer) -> list[str]:
    if isinstance(caption, str):
        return tokenizer.tokenize(caption)
    if isinstance(caption, list | tuple) and (
        {str}.issuperset(map(type, caption)) or all(isinstance(token, str) for token in caption)
    ):
        return caption if isinstance(caption, list) else list(caption)
    raise ValueError(f"{name} must be a string or a list of tokens, not {type(caption).__name__}: {caption!r:.80}")


def tokenized(
    hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Tokens of one hypothesis and of a list of references for each image; captions given as tokens stay.

    Raises ValueError if there are no images, the lengths differ, an image has no references, or something that should
    be a caption is none; the message names the place.
    """
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise ValueError("hypotheses is a list of captions and references a list of lists of captions, not one string")
    if len(hypotheses) != len(references):
        raise ValueError(
            f"{len(hypotheses)} hypotheses and {len(references)} lists of references: give one list for each"
        )
    if not len(hypotheses):
        raise ValueError("there are no captions to score")
    tokenizer = PTBTokenizer()
    for position, group in enumerate(references):
        if isinstance(group, str | dict) or not hasattr(group, "__len__") or not len(group):
            raise ValueError(f"references[{position}] must be a list with at least one caption, got {group!r:.80}")
    return (
        [_tokens(caption, f"hypotheses[{i}]", tokenizer) for i, caption in enumerate(hypotheses)],
        [
            [_tokens(caption, f"references[{i}][{k}]", tokenizer) for k, caption in enumerate(group)]
            for i, group in enumerate(references)
        ],
    )


def ngram_words(tokens: Sequence[str]) -> list[str]:
    """Words as BLEU and CIDEr-D count them: the original splits at any kind of space, so "10\\xa01/2" is two words.

    Equals `" ".join(tokens).split()`; letters and digits hold no space, so that most captions need not be split. Their
    lists are not copied: Python's garbage collector took a quarter of an evaluation to look at the copies.
    """
    if isinstance(tokens, list) and all(tokens) and "".join(tokens).isalnum():
        return tokens
    return " ".join(tokens).split()
