"""ROUGE-L (Lin, 2004), equal to `pycocoevalcap.rouge.Rouge`: the F-score of the longest common subsequence.

As there, beta is 1.2, and the largest precision and the largest recall are taken over the references separately. The
subsequence is found with whole rows of the table as bits of an integer (Hyyrö, 2004).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .captions import Caption, Score, tokenized

BETA = 1.2


def _common_subsequence(places: dict[str, int], length: int, other: Sequence[str]) -> int:
    """Length of the longest common subsequence; `places` has, for each word of one text, its places there as bits."""
    full = (1 << length) - 1
    row = full
    for word in other:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return length - row.bit_count()


def _rouge_l(hypothesis: list[str], references: list[list[str]]) -> float:
    # The original splits a string at single spaces, and finds one empty word in an empty caption.
    hypothesis = hypothesis or [""]
    places: dict[str, int] = {}
    for place, word in enumerate(hypothesis):
        places[word] = places.get(word, 0) | 1 << place
    precision = recall = 0.0
    for reference in references:
        common = _common_subsequence(places, len(hypothesis), reference or [""])
        precision = max(precision, common / len(hypothesis))
        recall = max(recall, common / (len(reference) or 1))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def rouge_l(hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> Score:
    """ROUGE-L (0 to 1), mean and for each image, of one hypothesis each; strings or lists of tokens.

    Errors as in `tokenized`.
    """
    hypotheses, references = tokenized(hypotheses, references)
    scores = np.array([_rouge_l(words, group) for words, group in zip(hypotheses, references, strict=True)])
    return Score(float(scores.mean()), scores)
