"""BLEU-1 to BLEU-4 (Papineni et al., ACL 2002), equal to `pycocoevalcap.bleu.Bleu`.

Counts are summed over the corpus before they are divided; the reference length is the closest one, of equally close
ones the shorter. The original's two constants, which keep empty captions from dividing by zero, are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .captions import Caption, Score, ngram_words, tokenized
from .ngrams import MAX_N, count_ngrams

SMALL = 1e-9
TINY = 1e-15
_IMAGES_AT_ONCE = 512


class BleuCounts(NamedTuple):
    """What BLEU is computed from, of images or summed over them.

    Attributes:
        correct: (4, ...) n-grams of the hypotheses that a reference has too, for n of 1 to 4.
        guessed: (4, ...) n-grams of the hypotheses.
        length: (...) words of the hypotheses.
        reference_length: (...) words of the closest references.
    """

    correct: np.ndarray
    guessed: np.ndarray
    length: np.ndarray
    reference_length: np.ndarray


def bleu_of_counts(counts: BleuCounts) -> np.ndarray:
    """BLEU-1 to BLEU-4, (4, ...), of the counts of each image, or of sums over images for the corpus."""
    products = np.cumprod((counts.correct + TINY) / (counts.guessed + SMALL), axis=0)
    orders = np.arange(1, MAX_N + 1).reshape(-1, *[1] * (products.ndim - 1))
    ratio = (counts.length + TINY) / (counts.reference_length + SMALL)
    return products ** (1.0 / orders) * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def bleu_counts(hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> BleuCounts:
    """Counts of each image, whose sums give the BLEU of any part or resample of them. Errors as in `tokenized`."""
    hypotheses, references = tokenized(hypotheses, references)
    words = [ngram_words(tokens) for tokens in hypotheses]
    theirs = [[ngram_words(tokens) for tokens in group] for group in references]
    length = np.array([len(caption) for caption in words], dtype=np.float64)
    closest = np.array(
        [
            min((abs(len(reference) - len(caption)), len(reference)) for reference in group)[1]
            for caption, group in zip(words, theirs, strict=True)
        ],
        dtype=np.float64,
    )
    guessed = np.maximum(0.0, length - np.arange(MAX_N)[:, None])
    correct = np.zeros((MAX_N, len(words)))
    for first in range(0, len(words), _IMAGES_AT_ONCE):
        part = slice(first, first + _IMAGES_AT_ONCE)
        correct[:, part] = _correct(words[part], theirs[part])
    return BleuCounts(correct, guessed, length, closest)


def bleu(hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> list[Score]:
    """BLEU-1, BLEU-2, BLEU-3 and BLEU-4 (0 to 1) of one hypothesis for each image, strings or lists of tokens.

    Errors as in `tokenized`.
    """
    counts = bleu_counts(hypotheses, references)
    per_image = bleu_of_counts(counts)
    corpus = bleu_of_counts(BleuCounts(*(each.sum(axis=-1) for each in counts)))
    return [Score(float(corpus[n]), per_image[n]) for n in range(MAX_N)]


def _correct(words: list[list[str]], references: list[list[list[str]]]) -> np.ndarray:
    """N-grams of each hypothesis that a reference has too, as often as one reference has it at most; (4, images)."""
    number = len(words)
    captions = [*words, *(caption for group in references for caption in group)]
    images = [*range(number), *(image for image, group in enumerate(references) for _ in group)]
    correct = np.zeros((MAX_N, number))
    for n, counts in enumerate(count_ngrams(captions, images)):
        split = np.searchsorted(counts.caption, number)
        most = np.zeros(len(counts.document_frequency), dtype=np.int64)
        np.maximum.at(most, counts.ngram[split:], counts.count[split:])
        matched = np.minimum(counts.count[:split], most[counts.ngram[:split]])
        correct[n] = np.bincount(counts.caption[:split], matched, minlength=number)
    return correct
