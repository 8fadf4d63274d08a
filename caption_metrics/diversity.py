"""How varied captions are: length, vocabulary, distinct n-grams, novel captions, and self-CIDEr of several captions.

distinct-n: Li et al., NAACL 2016. Self-CIDEr: Wang and Chan, CVPR 2019, "Describing like humans: on diversity in image
captioning", equation 8; its kernel is CIDEr, the mean cosine of tf-idf vectors. (The code that its authors released
takes CIDEr-D in one direction, which is no kernel: clipping makes it depend on the order of the captions.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .captions import Caption, Score, ngram_words, tokenized
from .ngrams import DocumentFrequencies, count_ngrams
from .tokenizer import PTBTokenizer

_IMAGES_AT_ONCE = 256


class CaptionStatistics(NamedTuple):
    """What `caption_statistics` returns: words of a caption (mean and each), different words, distinct n-grams."""

    caption_length: Score
    vocabulary_size: int
    distinct_1: float
    distinct_2: float


def _words(captions: Iterable[Caption]) -> list[list[str]]:
    if isinstance(captions, str):
        raise ValueError(f"captions are given as a list, not as one string: {captions!r:.80}")
    tokenizer = PTBTokenizer()
    return [ngram_words(tokenizer.tokenize(caption) if isinstance(caption, str) else caption) for caption in captions]


def distinct_n(captions: Sequence[Caption], n: int) -> float:
    """Different n-grams of all captions divided by all their n-grams, 0 without any."""
    return _distinct(_words(captions), n)


def _distinct(captions: Sequence[Sequence[str]], n: int) -> float:
    ngrams = [tuple(words[start : start + n]) for words in captions for start in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def caption_statistics(captions: Sequence[Caption]) -> CaptionStatistics:
    """Length, vocabulary and distinct-1 and -2 of captions, strings or lists of tokens; punctuation is no word.

    Raises ValueError if there are no captions.
    """
    if not len(captions):
        raise ValueError("there are no captions to describe")
    words = _words(captions)
    lengths = np.array([len(each) for each in words], dtype=np.float64)
    vocabulary = {word for each in words for word in each}
    return CaptionStatistics(
        Score(float(lengths.mean()), lengths), len(vocabulary), _distinct(words, 1), _distinct(words, 2)
    )


def novel_captions(captions: Sequence[Caption], training_captions: Iterable[Caption]) -> Score:
    """Share of captions that are not among the training captions, word for word; of a caption 0 or 1.

    Raises ValueError if there are no captions.
    """
    if not len(captions):
        raise ValueError("there are no captions to look up")
    known = {tuple(words) for words in _words(training_captions)}
    novel = np.array([tuple(words) not in known for words in _words(captions)], dtype=np.float64)
    return Score(float(novel.mean()), novel)


def self_cider(
    captions_per_image: Sequence[Sequence[Caption]],
    references: Sequence[Sequence[Caption]] | None = None,
    frequencies: DocumentFrequencies | None = None,
) -> Score:
    """Self-CIDEr diversity of several captions for each image: 0 if all are equal, 1 if they share nothing.

    captions_per_image: two or more captions for each image, strings or lists of tokens.
    references: reference captions, whose document frequencies count, an image as one document.
    frequencies: document frequencies, in place of `references`; without both those of the captions themselves.

    Raises ValueError for an image with fewer than two captions; other errors as in `tokenized`.
    """
    if isinstance(captions_per_image, str):
        raise ValueError("captions_per_image is a list of lists of captions, not one string")
    for position, group in enumerate(captions_per_image):
        if isinstance(group, str) or len(group) < 2:
            raise ValueError(f"captions_per_image[{position}] needs two or more captions, got {group!r:.80}")
    _, tokens = tokenized([[""]] * len(captions_per_image), captions_per_image)
    groups = [[ngram_words(caption) for caption in group] for group in tokens]
    if frequencies is None:
        documents = groups
        if references is not None:
            _, theirs = tokenized([[""]] * len(references), references)
            documents = [[ngram_words(caption) for caption in group] for group in theirs]
        frequencies = DocumentFrequencies.from_documents(documents)
    scores = [
        score
        for first in range(0, len(groups), _IMAGES_AT_ONCE)
        for score in _self_cider(groups[first : first + _IMAGES_AT_ONCE], frequencies)
    ]
    return Score(float(np.mean(scores)), np.array(scores))


def _self_cider(groups: Sequence[Sequence[list[str]]], frequencies: DocumentFrequencies) -> list[float]:
    captions = [words for group in groups for words in group]
    sizes = [len(group) for group in groups]
    first_caption = np.concatenate([[0], np.cumsum(sizes)])
    images = np.repeat(np.arange(len(groups)), sizes)
    log_documents = np.log(float(frequencies.documents))
    kernels = [np.zeros((size, size)) for size in sizes]
    levels = count_ngrams(captions, images, frequencies)
    for counts in levels:
        weight = counts.count * (log_documents - np.log(np.maximum(1.0, counts.document_frequency)))[counts.ngram]
        norm = np.sqrt(np.bincount(counts.caption, weight**2, minlength=len(captions)))[counts.caption]
        weight = np.divide(weight, norm, out=np.zeros(len(weight)), where=norm != 0)
        bounds = np.searchsorted(counts.caption, first_caption)
        for image, kernel in enumerate(kernels):
            entries = slice(bounds[image], bounds[image + 1])
            _, column = np.unique(counts.ngram[entries], return_inverse=True)
            vectors = np.zeros((sizes[image], column.max(initial=-1) + 1))
            vectors[counts.caption[entries] - first_caption[image], column] = weight[entries]
            kernel += vectors @ vectors.T / len(levels)
    return [_diversity(kernel) for kernel in kernels]


def _diversity(kernel: np.ndarray) -> float:
    """-log_m of the share of the largest singular value, of m captions with the kernel (m, m)."""
    # Rounding leaves 1e-17 of eigenvalues that are 0, whose root would count.
    eigenvalues = np.linalg.eigvalsh(kernel)
    singular = np.sqrt(np.where(eigenvalues > 1e-12, eigenvalues, 0.0))
    if not singular.sum():
        return 0.0  # no caption has a word that tells images apart
    return max(0.0, float(-np.log(singular.max() / singular.sum()) / np.log(len(kernel))))
