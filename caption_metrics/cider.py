"""CIDEr-D (Vedantam et al., CVPR 2015), the metric that captioning papers call CIDEr, and the reward made of it.

Equals `pycocoevalcap.cider.Cider` to rounding, and with `document="caption"` the reward of the original DIFNet and
Meshed-Memory Transformer, whose `Cider` is handed a flat list of captions and so takes each *caption* for a
document. What differs: whole batches are scored with arrays (the simple form is
`tests/test_caption_metrics_scores.py::slow_cider_d`), and a look-up of an unknown n-gram does not add it to the
table.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from .captions import Caption, Score, ngram_words, tokenized
from .ngrams import MAX_N, Document, DocumentFrequencies, Words, count_ngrams
from .tokenizer import PTBTokenizer

SIGMA = 6.0
EOS = "<eos>"
_IMAGES_AT_ONCE = 256


def _sums(place: np.ndarray, weight: np.ndarray, size: int) -> np.ndarray:
    """Sums of the weights at each place, (size,) float64; `bincount` alone gives integers where there is nothing."""
    return np.bincount(place, weight, minlength=size).astype(np.float64, copy=False)


def _cider_d(
    hypotheses: Sequence[Words],
    images: Sequence[int],
    references: Sequence[Sequence[Words]],
    frequencies: DocumentFrequencies,
) -> np.ndarray:
    """CIDEr-D of every hypothesis against the references of its image, `references[images[i]]`; (hypotheses,)."""
    number = len(hypotheses)
    captions = [*hypotheses, *(words for group in references for words in group)]
    groups = np.array([len(group) for group in references])
    reference_image = np.repeat(np.arange(len(references)), groups)
    # Place of each reference within its image, and for every hypothesis and place the reference there (or -1).
    place = np.concatenate([np.arange(size) for size in groups])
    at = np.full((len(references), groups.max()), -1)
    at[reference_image, place] = np.arange(len(reference_image)) + number
    image = np.concatenate([np.asarray(images, dtype=np.int64), reference_image])
    pairs = at[image[:number]]  # (hypotheses, places)
    log_documents = np.log(float(frequencies.documents))

    total = np.zeros(pairs.shape)
    delta = np.zeros(pairs.shape)
    for n, counts in enumerate(count_ngrams(captions, image, frequencies), start=1):
        inverse = log_documents - np.log(np.maximum(1.0, counts.document_frequency))
        weight = counts.count * inverse[counts.ngram]
        norm = np.sqrt(_sums(counts.caption, weight**2, len(captions)))
        if n == 2:
            bigrams = _sums(counts.caption, counts.count, len(captions))
            delta = bigrams[:number, None] - bigrams[pairs]
        split = np.searchsorted(counts.caption, number)
        of_references = np.zeros((len(inverse), pairs.shape[1]))
        of_references[counts.ngram[split:], place[counts.caption[split:] - number]] = weight[split:]
        theirs = of_references[counts.ngram[:split]]  # (entries of hypotheses, places)
        clipped = np.minimum(weight[:split, None], theirs) * theirs
        cell = counts.caption[:split, None] * pairs.shape[1] + np.arange(pairs.shape[1])
        products = _sums(cell.ravel(), clipped.ravel(), pairs.size).reshape(pairs.shape)
        norms = norm[:number, None] * norm[pairs]
        total += np.divide(products, norms, out=products, where=norms != 0)
    total *= np.exp(-(delta**2) / (2 * SIGMA**2)) * (pairs >= 0)
    return total.sum(axis=1) / groups[image[:number]] / MAX_N * 10.0


class CiderD:
    """CIDEr-D of captions, each against the references of its image.

    frequencies: document frequencies to use; without them those of the references being scored, an image with all of
        its references as a document, which is how captions are evaluated.
    """

    def __init__(self, frequencies: DocumentFrequencies | None = None):
        self.frequencies = frequencies

    def score(self, hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> Score:
        """Mean, and score of each image (0 to 10), of strings or lists of tokens. Errors as in `tokenized`."""
        hypotheses, references = tokenized(hypotheses, references)
        theirs = [[ngram_words(tokens) for tokens in group] for group in references]
        frequencies = self.frequencies or DocumentFrequencies.from_documents(theirs)
        scores = np.zeros(len(hypotheses))
        for first in range(0, len(hypotheses), _IMAGES_AT_ONCE):
            part = slice(first, first + _IMAGES_AT_ONCE)
            words = [ngram_words(tokens) for tokens in hypotheses[part]]
            scores[part] = _cider_d(words, range(len(words)), theirs[part], frequencies)
        return Score(float(scores.mean()), scores)


class CiderReward:
    """CIDEr-D of sampled captions, for self-critical sequence training.

    Make it with `from_captions` or `load`. `reward` may be called from several threads, and gives the same numbers in
    every process.

    Attributes: `document` ("caption" or "image"), `count_eos`, `corpus` (a name to report), `signature`.
    """

    def __init__(
        self,
        frequencies: DocumentFrequencies,
        document: Document = "caption",
        count_eos: bool = False,
        corpus: str = "",
        cached_captions: int = 65_536,
    ):
        self.frequencies = frequencies
        self.document = document
        self.count_eos = count_eos
        self.corpus = corpus
        self._tokenizer = PTBTokenizer()
        # References come again in every epoch and with every hypothesis; hypotheses hardly ever do.
        self._reference = lru_cache(maxsize=cached_captions)(self._words)
        self._cached_captions = cached_captions

    def __reduce__(self):
        # To other processes without the cache, which can't go there and would be found again anyway.
        return CiderReward, (self.frequencies, self.document, self.count_eos, self.corpus, self._cached_captions)

    @classmethod
    def from_captions(
        cls,
        captions_per_image: Iterable[Sequence[str]],
        document: Document = "caption",
        count_eos: bool = False,
        corpus: str = "",
    ) -> CiderReward:
        """Document frequencies of a training corpus.

        captions_per_image: raw captions, a list for each image.
        document: what counts as a document. "caption", every caption (the original's, N about 567,000 for COCO), or
            "image", an image with all of its captions (as in evaluation).
        count_eos: whether the end of a caption counts as a word, in the corpus and on both sides of the reward. The
            original leaves it out, which rewards captions that break off ("a man with a").
        corpus: a name for the corpus, kept in the file that `save` writes.

        Raises ValueError for no captions at all, an unknown `document`, or a caption that is not a string.
        """
        if document not in ("caption", "image"):
            raise ValueError(f'document must be "caption" or "image", not {document!r}')
        reward = cls(DocumentFrequencies([], [], [], 0), document, count_eos, corpus)

        def documents():
            for position, captions in enumerate(captions_per_image):
                if isinstance(captions, str):
                    raise ValueError(
                        f"captions_per_image[{position}] is a string; give a list of captions for each image"
                    )
                words = [reward._words(caption) for caption in captions]
                if document == "image":
                    yield words
                else:
                    yield from ([caption] for caption in words)

        reward.frequencies = DocumentFrequencies.from_documents(documents())
        if not reward.frequencies.documents:
            raise ValueError("captions_per_image holds no captions; document frequencies need a corpus")
        return reward

    @property
    def signature(self) -> str:
        """How the reward treats the end of a caption, as SacreEOS (Hu et al., 2023) writes it, to be reported."""
        eos = "STANDARD_wInit" if self.count_eos else "NO<EOS>"
        return f"{eos}+Cider-D[n{MAX_N},s{SIGMA}]+document[{self.document}]"

    def _words(self, caption: str) -> tuple[str, ...]:
        words = ngram_words(self._tokenizer.tokenize(caption))
        return (*words, EOS) if self.count_eos else tuple(words)

    def reward(
        self,
        hypotheses: Sequence[str],
        references: Sequence[Sequence[str]],
        finished: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """CIDEr-D (0 to 10) of every hypothesis, float64 (hypotheses,).

        hypotheses: raw captions as decoded, special tokens such as `<unk>` included.
        references: for every hypothesis the raw captions of its image. Equal lists are found and scored once.
        finished: for every hypothesis whether it came to its end, or was cut off at the longest length; with
            `count_eos` a caption that was cut off has no end that could count. Default: all came to their end.

        Raises ValueError if the lengths differ, an image has no references, or a caption is not a string.
        """
        if isinstance(hypotheses, str) or len(hypotheses) != len(references):
            raise ValueError(
                f"reward takes a list of hypotheses and as many lists of references, got {len(hypotheses)} and "
                f"{len(references)}; repeat an image's references for each of its hypotheses"
            )
        groups: dict[tuple[str, ...], int] = {}
        images = []
        for position, captions in enumerate(references):
            if isinstance(captions, str) or not len(captions) or not all(isinstance(c, str) for c in captions):
                raise ValueError(
                    f"references[{position}] must be a list with at least one string, got {captions!r:.80}"
                )
            images.append(groups.setdefault(tuple(captions), len(groups)))
        if finished is not None and len(finished) != len(hypotheses):
            raise ValueError(f"finished has {len(finished)} entries for {len(hypotheses)} hypotheses")
        words = [self._words(caption) for caption in hypotheses]
        if not words:
            return np.zeros(0)
        if self.count_eos and finished is not None:
            words = [each if ended else each[:-1] for each, ended in zip(words, finished, strict=True)]
        return _cider_d(words, images, [list(map(self._reference, group)) for group in groups], self.frequencies)

    def save(self, path: str | os.PathLike) -> None:
        """Write the document frequencies to one safetensors file, under a temporary name first."""
        from safetensors.numpy import save

        table = self.frequencies
        arrays = {f"counts_{n}": counts for n, counts in enumerate(table.counts, start=1)}
        arrays |= {f"keys_{n}": keys for n, keys in enumerate(table.keys, start=2)}
        # Words hold no white space.
        arrays["words"] = np.frombuffer("\n".join(table.words).encode() or b"\n", dtype=np.uint8)
        facts = {
            "format": "caption_metrics document frequencies 1",
            "documents": table.documents,
            "document": self.document,
            "count_eos": self.count_eos,
            "corpus": self.corpus,
        }
        data = save(arrays, metadata={"caption_metrics": json.dumps(facts)})
        path = os.fspath(path)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=os.path.basename(path))
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike) -> CiderReward:
        """Read what `save` wrote. Raises ValueError, naming the file, for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["caption_metrics"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            counts = [arrays[f"counts_{n}"].astype(np.int32, casting="safe") for n in range(1, MAX_N + 1)]
            keys = [arrays[f"keys_{n}"].astype(np.int64, casting="safe") for n in range(2, MAX_N + 1)]
            words = arrays["words"].tobytes().decode().split()
            sound = (
                facts["format"] == "caption_metrics document frequencies 1"
                and facts["document"] in ("caption", "image")
                and isinstance(facts["documents"], int)
                and facts["documents"] > 0
                and len(counts[0]) == len(set(words)) == len(words)
                and all(len(key) == len(count) for key, count in zip(keys, counts[1:], strict=True))
                and all(array.ndim == 1 for array in (*keys, *counts))
                and all((np.diff(key) > 0).all() for key in keys)
                and all(((count >= 0) & (count <= facts["documents"])).all() for count in counts)
            )
        except FileNotFoundError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"{path} is no file written by CiderReward.save: {error}") from error
        if not sound:
            raise ValueError(f"{path} is no file written by CiderReward.save, or it is damaged; write it again")
        table = DocumentFrequencies(words, keys, counts, facts["documents"])
        return cls(table, facts["document"], bool(facts["count_eos"]), str(facts["corpus"]))
