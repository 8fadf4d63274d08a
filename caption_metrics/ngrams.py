"""N-grams of many captions at once, and how many documents of a corpus hold each.

Counting in Python dictionaries, as the original scorers do, costs a tuple for every n-gram: 356 MB for the document
frequencies of the COCO training captions and most of the time of a reward. Here an n-gram is a number that is
*exact*, no hash: the (n-1)-gram that it starts with (a number found before) together with its last word.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

MAX_N = 4
_WORD_BITS = 32

Words = Sequence[str]


@dataclass(frozen=True)
class NgramCounts:
    """Counts of the n-grams of one length in a batch of captions; one entry for an n-gram and a caption that holds it.

    An n-gram of two images is two n-grams here, so that an image's captions are compared with one another alone.
    """

    caption: np.ndarray  # (entries,) ascending
    ngram: np.ndarray  # (entries,) 0..len(document_frequency)-1
    count: np.ndarray  # (entries,)
    document_frequency: np.ndarray  # (n-grams,); zeros without a table


class DocumentFrequencies:
    """In how many documents of a corpus every n-gram of 1 to 4 words occurs.

    Level n holds sorted keys `(number of the (n-1)-gram) << 32 | number of the last word` and a count for each; the
    number of an n-gram is its place there. 12 bytes for an n-gram.
    """

    def __init__(self, words: Sequence[str], keys: Sequence[np.ndarray], counts: Sequence[np.ndarray], documents: int):
        self.words = list(words)
        self.word_numbers = {word: number for number, word in enumerate(self.words)}
        self.keys = list(keys)  # for n = 2, 3, 4; a word's number is its place in `words`
        self.counts = list(counts)  # for n = 1, 2, 3, 4
        self.documents = documents

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[Words]]) -> DocumentFrequencies:
        """Count over `documents`, each a list of captions, each a list of words."""
        word_numbers: dict[str, int] = {}
        # Machine integers: a Python list of the words of 567,000 captions would take more than the table itself.
        flat, lengths, caption_documents = array("i"), array("i"), array("i")
        total = 0
        for captions in documents:
            for words in captions:
                flat.extend([word_numbers.setdefault(word, len(word_numbers)) for word in words])
                lengths.append(len(words))
                caption_documents.append(total)
            total += 1
        word = np.frombuffer(flat, dtype=np.int32) if flat else np.zeros(0, dtype=np.int32)
        caption = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        document = np.repeat(np.array(caption_documents, dtype=np.int32), lengths)

        ngram, size = word.astype(np.int64), len(word_numbers)
        keys, counts = [], []
        for n in range(1, MAX_N + 1):
            if n > 1:
                inside = caption[: -n + 1] == caption[n - 1 :] if len(caption) >= n else np.zeros(0, dtype=bool)
                here = ngram[: len(inside)] << _WORD_BITS | word[n - 1 :]
                level, number = np.unique(here[inside], return_inverse=True)
                ngram = np.zeros(len(inside), dtype=np.int64)
                ngram[inside] = number
                size = len(level)
                keys.append(level)
                of, where = number, document[: len(inside)][inside]
            else:
                of, where = ngram, document
            # Sorted by hand: `np.unique` hashes here, and counting 567,000 captions took 63 s instead of 11 s and left
            # 350 MB more with the process.
            seen = np.sort(of * max(total, 1) + where)
            once = seen[np.diff(seen, prepend=-1) > 0] // max(total, 1)
            counts.append(np.bincount(once, minlength=size).astype(np.int32))
        return cls(list(word_numbers), keys, counts, total)

    def extend(self, n: int, ngrams: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Numbers of the n-grams made of known (n-1)-grams and one more word each; -1 where the corpus has none."""
        keys = self.keys[n - 2]
        if not len(keys):
            return np.full(len(ngrams), -1, dtype=np.int64)
        wanted = ngrams << _WORD_BITS | words
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        found = (keys[place] == wanted) & (ngrams >= 0) & (words >= 0)
        return np.where(found, place, -1)

    def of(self, n: int, ngrams: np.ndarray) -> np.ndarray:
        """Document frequencies of n-grams by number, 0 for -1."""
        if not len(self.counts[n - 1]):
            return np.zeros(len(ngrams), dtype=np.int32)
        return np.where(ngrams >= 0, self.counts[n - 1][ngrams], 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, without the words."""
        return sum(array.nbytes for array in (*self.keys, *self.counts))


def count_ngrams(
    captions: Sequence[Words], images: Sequence[int] | np.ndarray, frequencies: DocumentFrequencies | None = None
) -> list[NgramCounts]:
    """Counts for n = 1, 2, 3, 4 of the n-grams of `captions`; `images[i]` is the image of caption i."""
    local: dict[str, int] = {}
    flat = [local.setdefault(word, len(local)) for words in captions for word in words]
    word = np.array(flat, dtype=np.int64)
    lengths = np.fromiter(map(len, captions), dtype=np.int64, count=len(captions))
    caption = np.repeat(np.arange(len(captions)), lengths)
    if frequencies is not None:
        numbers = frequencies.word_numbers
        known_words = np.array([numbers.get(entry, -1) for entry in local], dtype=np.int64)

    result = []
    ngram, size, known = np.asarray(images, dtype=np.int64)[caption], 1, np.empty(0, dtype=np.int64)
    for n in range(1, MAX_N + 1):
        if n > 1:
            inside = caption[n - 1 :] == caption[: len(caption) - n + 1]
            here = ngram[: len(inside)] * len(local) + word[n - 1 :]
            start = np.flatnonzero(inside)
            here = here[start]
        else:
            here, start = ngram * len(local) + word, np.arange(len(word))
        distinct, number = np.unique(here, return_inverse=True)
        size = max(len(distinct), 1)
        document_frequency = np.zeros(len(distinct), dtype=np.int32)
        if frequencies is not None and len(distinct):
            last = known_words[distinct % len(local)]
            known = last if n == 1 else frequencies.extend(n, known[distinct // len(local)], last)
            document_frequency = frequencies.of(n, known)
        entry, count = np.unique(caption[start] * size + number, return_counts=True)
        result.append(NgramCounts(entry // size, entry % size, count, document_frequency))
        ngram = np.zeros(len(word), dtype=np.int64)
        ngram[start] = number
    return result


Document = Literal["caption", "image"]
