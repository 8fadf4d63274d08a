"""The calibration of a checkpoint: from what a captioner says of its words to how often they are right.

`difnet calibrate` fits it on a split with known truth and writes it as `calibration.json` beside the weights. Here it
is read, checked, applied and carried along when a model is saved; nothing of that needs scikit-learn. What it reads of
a word is computed in `confidence_difnet.py`.

The original (mrwu-mac/DIFNet, CVPR 2022) has nothing that corresponds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import cached_file, logging

if TYPE_CHECKING:
    from .confidence_difnet import CaptionConfidence, WordConfidence

logger = logging.get_logger(__name__)

CALIBRATION_NAME = "calibration.json"
CALIBRATION_VERSION = 1
CALIBRATION_SIZE_LIMIT = 2**26  # bytes
WORD_FEATURES = ("log_prob", "log_complement", "entropy", "support", "rate_log_odds")
RATE_STRENGTH = 2.0
"""Weight of the rate of all words in that of a single one, in occurrences."""


@dataclass
class Calibration:
    """What `difnet calibrate` fits: from log-probability, entropy and support of a word to how often it is right.

    Args:
        mean, scale, coefficients, intercept: of a logistic regression on `WORD_FEATURES`.
        rates: of each word, how often it was right and how often it occurred in the captions that were fitted to.
        rate: share of all words that were right.
        caption_confidences, caption_scores: mean confidence of a caption's words and CIDEr-D, both rising; between
            them it is interpolated.
        num_beams: of the search that was fitted to. `support` depends on it, so that it fits no other.
        weights_sha256: `weights_fingerprint` of the model that was fitted to.
        fitted_to: dataset, split, truth and metrics, for people.
    """

    mean: list[float]
    scale: list[float]
    coefficients: list[float]
    intercept: float
    rates: Mapping[str, Sequence[int]]
    rate: float
    caption_confidences: list[float]
    caption_scores: list[float]
    num_beams: int
    weights_sha256: str | None = None
    fitted_to: dict[str, Any] = field(default_factory=dict)

    def word_confidences(self, words: Sequence[WordConfidence]) -> list[float]:
        """Probability of each word to be right."""
        if not words:
            return []
        rates = []
        for word in words:
            num_right, number = self.rates.get(word.word, (0, 0))
            rates.append(smoothed_rate(num_right, number, self.rate))
        features = (word_features(words, rates) - np.array(self.mean)) / np.array(self.scale)
        logits = features @ np.array(self.coefficients) + self.intercept
        return (0.5 * (1 + np.tanh(0.5 * logits))).tolist()  # the logistic function, without overflow

    def caption_confidence(self, words: Sequence[WordConfidence]) -> float:
        """Mean of the words' confidences; 0 of a caption without words."""
        return float(np.mean(self.word_confidences(words))) if words else 0.0

    def add_to(self, caption: CaptionConfidence) -> None:
        """Sets the confidences of a caption and of its words."""
        for word, confidence in zip(caption.words, self.word_confidences(caption.words), strict=True):
            word.confidence = confidence
        caption.confidence = self.caption_confidence(caption.words)
        caption.expected_cider_d = float(np.interp(caption.confidence, self.caption_confidences, self.caption_scores))

    def to_json(self) -> str:
        return json.dumps({"version": CALIBRATION_VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"


def smoothed_rate(num_right: int, number: int, rate: float) -> float:
    """How often a word was right; of a rare word near the rate of all words."""
    return (num_right + RATE_STRENGTH * rate) / (number + RATE_STRENGTH)


def word_features(words: Sequence[WordConfidence], rates: Sequence[float]) -> np.ndarray:
    """What the logistic regression reads, `(words, WORD_FEATURES)`.

    Args:
        words: of captions.
        rates: how often each of them was right elsewhere, see `smoothed_rate`.
    """
    log_probs = np.minimum([word.log_prob for word in words], 0)
    complements = np.log(np.maximum(-np.expm1(log_probs), 1e-6))
    others = [
        (word.entropy, word.support, math.log(rate / (1 - rate))) for word, rate in zip(words, rates, strict=True)
    ]
    return np.column_stack([log_probs, complements, np.array(others)])


def read_calibration(source: str | os.PathLike, revision: str | None = None) -> Calibration | None:
    """The calibration of a checkpoint; `None` where there is none, or where the Hub cannot be reached.

    Args:
        source: folder or repository of the checkpoint.
        revision: branch, tag or commit of the repository.

    Raises:
        ValueError: the file is damaged, or of another version.
    """
    file = cached_file(
        os.fspath(source),
        CALIBRATION_NAME,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return None
    try:
        if os.path.getsize(file) > CALIBRATION_SIZE_LIMIT:
            raise ValueError(f"more than {CALIBRATION_SIZE_LIMIT:,} bytes")
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        version = content.pop("version", None)
        if version != CALIBRATION_VERSION:
            raise ValueError(f"version {str(version)[:20]}, not {CALIBRATION_VERSION}")
        calibration = Calibration(**content)
        check_calibration(calibration)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:160].replace("Calibration.__init__() ", "")
        raise ValueError(
            f"{file}: no calibration of this version ({reason}); fit it again with difnet calibrate, or delete it"
        ) from None
    return calibration


def check_calibration(calibration: Calibration) -> None:
    """Raises ValueError for values that `difnet calibrate` does not write."""
    for name in ("mean", "scale", "coefficients"):
        values = getattr(calibration, name)
        if not (are_numbers(values) and len(values) == len(WORD_FEATURES)):
            raise ValueError(f"{name}: {len(WORD_FEATURES)} numbers are expected")
    if min(calibration.scale) <= 0:
        raise ValueError("scale: a number is not positive")
    if not are_numbers([calibration.intercept]):
        raise ValueError("intercept: a number is expected")
    if not (are_numbers([calibration.rate]) and 0 < calibration.rate < 1):
        raise ValueError("rate: a number between 0 and 1 is expected")
    if not isinstance(calibration.rates, dict) or not all(
        are_numbers(pair) and len(pair) == 2 and 0 <= pair[0] <= pair[1] for pair in calibration.rates.values()
    ):
        raise ValueError("rates: for each word how often it was right and how often it occurred is expected")
    curve = (calibration.caption_confidences, calibration.caption_scores)
    if not all(are_numbers(each) and each and all(a <= b for a, b in pairwise(each)) for each in curve):
        raise ValueError("caption_confidences and caption_scores: rising numbers are expected")
    if len(curve[0]) != len(curve[1]):
        raise ValueError("caption_confidences and caption_scores: as many of the one as of the other are expected")
    if type(calibration.num_beams) is not int or calibration.num_beams < 1:
        raise ValueError("num_beams: a whole number from 1 is expected")
    if not isinstance(calibration.weights_sha256, str | None) or not isinstance(calibration.fitted_to, dict):
        raise ValueError("weights_sha256: a text is expected, fitted_to: an object")


def are_numbers(values: Any) -> bool:
    """Whether it is a list of finite numbers."""
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )


def weights_fingerprint(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of weights, rounded to bfloat16: float32 and bfloat16 copies have the same."""
    digest = hashlib.sha256()
    for key, value in sorted(state_dict.items()):
        digest.update(f"{key} {tuple(value.shape)}\n".encode())
        rounded = value.detach().cpu().to(torch.bfloat16).contiguous()
        digest.update(rounded.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def calibration_of(model: Any, state_dict: Mapping[str, torch.Tensor] | None = None) -> Calibration | None:
    """The calibration of the checkpoint that a model was loaded from; `None` where there is none.

    It is left out, with a warning, where the weights are others by now, as after fine-tuning. The weights of an
    exported or quantised model, or in float16, cannot be compared: they are taken to be those of its folder.

    Args:
        model: any captioner; an ensemble has no calibration.
        state_dict: the weights, where they are not those that the model holds itself.

    Raises:
        ValueError: as `read_calibration`.
    """
    source = getattr(model, "name_or_path", None)
    if not source or hasattr(model, "members"):  # an ensemble bears the name of its first member
        return None
    try:
        calibration = read_calibration(source, getattr(model.config, "_commit_hash", None))
    except OSError:  # the folder is gone
        return None
    has_own_weights = hasattr(model, "lm_head") and not getattr(model, "is_quantized", False)
    has_own_weights = has_own_weights and model.dtype != torch.float16  # which rounds otherwise than bfloat16
    if calibration is None or calibration.weights_sha256 is None or not has_own_weights:
        return calibration
    if calibration.weights_sha256 != weights_fingerprint(model.state_dict() if state_dict is None else state_dict):
        logger.warning_once(
            f"{source}: {CALIBRATION_NAME} was fitted to other weights and is left out; fit it to these with difnet "
            "calibrate"
        )
        return None
    return calibration


def save_calibration(
    model: Any, folder: str | os.PathLike, state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Puts a model's calibration into the folder that it is saved to, and removes one of other weights there.

    Args:
        model, state_dict: as those of `calibration_of`.
        folder: of the checkpoint.
    """
    path = Path(folder, CALIBRATION_NAME)
    try:
        calibration = calibration_of(model, state_dict)
    except ValueError as error:  # a model can be saved all the same
        logger.warning_once(str(error))
        calibration = None
    if calibration is None:
        if path.exists():
            path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{CALIBRATION_NAME}.{os.getpid()}.unfinished")
    unfinished.write_text(calibration.to_json(), encoding="utf-8")
    unfinished.replace(path)


__all__ = [
    "CALIBRATION_NAME",
    "Calibration",
    "calibration_of",
    "read_calibration",
    "save_calibration",
    "smoothed_rate",
    "weights_fingerprint",
    "word_features",
]
