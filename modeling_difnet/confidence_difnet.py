"""How sure a captioner is of its captions: log-probabilities, agreement of the beams, and calibrated confidences.

A caption's words are read once more, teacher-forced, together with the other beams of its image. That gives what each
word and the caption are worth to the model. What a number means for the truth is another question, which
`difnet calibrate` answers on a split with reference captions: its `calibration.json` lies in the checkpoint's folder
and turns these numbers into the probability that a word is right, and into the CIDEr-D that a caption can expect.

The original (mrwu-mac/DIFNet, CVPR 2022) has nothing that corresponds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import cached_file

from .generation_difnet import sequence_statistics

if TYPE_CHECKING:
    from .modeling_difnet import DifnetForConditionalGeneration

CALIBRATION_NAME = "calibration.json"
CALIBRATION_VERSION = 1
WORD_FEATURES = ("log_prob", "log_complement", "entropy", "support", "log_rate")
RATE_STRENGTH = 2.0
"""So many occurrences of a word at the rate of all words are added to its own."""


@dataclass
class WordConfidence:
    """A word of a caption.

    Args:
        word: as the vocabulary has it.
        log_prob: log-probability, given the image and the words before it.
        entropy: of the distribution that it was taken from, in nats.
        support: share of the beams that have the word anywhere, each weighed by its probability; 0 to 1.
        confidence: probability that the word is right; `None` without a calibration.
    """

    word: str
    log_prob: float
    entropy: float
    support: float
    confidence: float | None = None


@dataclass
class CaptionConfidence:
    """A caption, the best of its image.

    Args:
        words: without the end of the caption.
        score: sum of the log-probabilities, that of `<eos>` among them.
        mean_log_prob: the same, divided by the number of tokens.
        margin: by how much the score is above that of the second caption; `None` of a single one.
        agreement: mean support of the words; 1 where all beams have the same words.
        expected_cider_d: what captions with such confidences get; `None` without a calibration.
    """

    words: list[WordConfidence]
    score: float
    mean_log_prob: float
    margin: float | None
    agreement: float
    expected_cider_d: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is `None` is left out."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        found["words"] = [
            {name: value for name, value in word.items() if value is not None} for word in found["words"]
        ]
        return found


@dataclass
class Calibration:
    """From what a model says of its words and captions to how often it is right.

    Args:
        mean, scale, coefficients, intercept: of a logistic regression on `WORD_FEATURES`.
        rates: how often each word was right, and how often it occurred, in the captions that were fitted to.
        rate: share of all words that were right.
        caption_confidences, caption_scores: of captions, the mean confidence of their words and the CIDEr-D that goes
            with it, both rising; between them it is interpolated.
        num_beams: of the search that it was fitted to, on which `support` depends.
        fitted_to: what it was fitted to, in words and numbers.
    """

    mean: list[float]
    scale: list[float]
    coefficients: list[float]
    intercept: float
    rates: dict[str, tuple[int, int]]
    rate: float
    caption_confidences: list[float]
    caption_scores: list[float]
    num_beams: int
    fitted_to: dict[str, Any] = field(default_factory=dict)

    def word_confidences(self, words: Sequence[WordConfidence]) -> list[float]:
        """Probability of each word to be right."""
        if not words:
            return []
        rates = [smoothed_rate(*self.rates.get(word.word, (0, 0)), self.rate) for word in words]
        features = (word_features(words, rates) - np.array(self.mean)) / np.array(self.scale)
        logits = features @ np.array(self.coefficients) + self.intercept
        return (1 / (1 + np.exp(-logits))).tolist()

    def add_to(self, caption: CaptionConfidence) -> None:
        """Sets the confidences of a caption and of its words."""
        confidences = self.word_confidences(caption.words)
        for word, confidence in zip(caption.words, confidences, strict=True):
            word.confidence = confidence
        if confidences:
            mean = float(np.mean(confidences))
            caption.expected_cider_d = float(np.interp(mean, self.caption_confidences, self.caption_scores))

    def to_json(self) -> str:
        return json.dumps({"version": CALIBRATION_VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"


def smoothed_rate(num_right: int, number: int, rate: float) -> float:
    """How often a word was right, drawn towards the rate of all words where it is rare."""
    return (num_right + RATE_STRENGTH * rate) / (number + RATE_STRENGTH)


def word_features(words: Sequence[WordConfidence], rates: Sequence[float]) -> np.ndarray:
    """What the logistic regression reads, (words, `WORD_FEATURES`).

    Args:
        words: of captions.
        rates: how often each of them was right elsewhere, see `smoothed_rate`.
    """
    log_probs = np.array([word.log_prob for word in words])
    complements = np.log(np.maximum(-np.expm1(log_probs), 1e-6))
    others = [(word.entropy, word.support, math.log(rate)) for word, rate in zip(words, rates, strict=True)]
    return np.column_stack([log_probs, complements, np.array(others)])


def read_calibration(source: str | os.PathLike, revision: str | None = None) -> Calibration | None:
    """The calibration of a checkpoint, `None` where there is none.

    Args:
        source: folder or repository of the checkpoint.
        revision: branch, tag or commit of the repository.

    Raises:
        ValueError: the file is damaged, or of another version.
    """
    file = cached_file(
        os.fspath(source), CALIBRATION_NAME, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if file is None:
        return None
    remedy = "fit it again with difnet calibrate, or delete it"
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        version = content.pop("version", None)
        if version != CALIBRATION_VERSION:
            raise ValueError(f"version {str(version)[:20]}, not {CALIBRATION_VERSION}")
        calibration = Calibration(**content)
        check_calibration(calibration)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: no calibration of this version ({str(error)[:200]}); {remedy}") from None
    return calibration


def check_calibration(calibration: Calibration) -> None:
    """Raises ValueError for lists of wrong lengths and numbers that are none."""
    for name in ("mean", "scale", "coefficients"):
        if len(getattr(calibration, name)) != len(WORD_FEATURES):
            raise ValueError(f"{name} has not {len(WORD_FEATURES)} numbers")
    if len(calibration.caption_confidences) != len(calibration.caption_scores) or not calibration.caption_scores:
        raise ValueError("caption_confidences and caption_scores differ in length, or are empty")
    numbers = [*calibration.mean, *calibration.scale, *calibration.coefficients, calibration.intercept]
    numbers += [calibration.rate, *calibration.caption_confidences, *calibration.caption_scores]
    numbers += [number for pair in calibration.rates.values() for number in pair]
    if not np.isfinite(np.array(numbers, dtype=float)).all() or min(calibration.scale) <= 0:
        raise ValueError("a number is NaN or infinite, or a scale is not positive")


@torch.no_grad()
def caption_confidences(
    model: DifnetForConditionalGeneration,
    sequences: torch.LongTensor,
    words_of: Mapping[int, str] | Sequence[str],
    calibration: Calibration | None = None,
    **features: torch.Tensor,
) -> list[CaptionConfidence]:
    """Confidences of the first caption of each image.

    Args:
        model: in eval mode.
        sequences (`(B, K, L)`): the captions of a beam search for each of B images, the best first:
            `<bos> w1 .. wn <eos> <pad> ..`.
        words_of: the word of each token id.
        calibration: of the checkpoint.
        features: of the B images, by the names of `forward`.

    Returns:
        B captions with their words.
    """
    statistics = sequence_statistics(model, sequences, with_entropy=True, **features)
    log_probs, entropies = statistics.log_probs, statistics.entropies  # (B, K, L - 1)
    assert entropies is not None
    scores = log_probs.sum(-1).double()  # (B, K)
    weights = scores.softmax(-1)
    tokens = sequences[..., 1:]  # (B, K, L - 1)
    # Where the best caption's token occurs in each caption of the image.
    occurs = (tokens[:, :1, :, None, None] == tokens[:, None, None]).any(-1).squeeze(1)  # (B, L - 1, K)
    support = (occurs * weights.unsqueeze(1)).sum(-1)  # (B, L - 1)

    ends = model.generation_config.eos_token_id
    special = {model.config.pad_token_id, *(ends if isinstance(ends, list) else [ends])}
    table = torch.stack([log_probs[:, 0].double(), entropies[:, 0].double(), support], -1).tolist()
    found = []
    for image, ids in enumerate(tokens[:, 0].tolist()):
        length = next((index for index, token in enumerate(ids) if token in special), len(ids))
        words = [WordConfidence(words_of[token], *table[image][index]) for index, token in enumerate(ids[:length])]
        of_captions = scores[image].tolist()
        num_tokens = max(1, sum(token != model.config.pad_token_id for token in ids))
        caption = CaptionConfidence(
            words=words,
            score=of_captions[0],
            mean_log_prob=of_captions[0] / num_tokens,
            margin=of_captions[0] - of_captions[1] if len(of_captions) > 1 else None,
            agreement=sum(word.support for word in words) / max(1, len(words)),
        )
        if calibration is not None:
            calibration.add_to(caption)
        found.append(caption)
    return found


__all__ = [
    "CALIBRATION_NAME",
    "Calibration",
    "CaptionConfidence",
    "WordConfidence",
    "caption_confidences",
    "read_calibration",
]
