"""How pages show confidences: words underlined by how sure the captioner is, with the number as text.

The numbers are those of `CaptionConfidence.as_dict` (modeling_difnet/confidence_difnet.py). Without a calibration a
word's own probability stands in, and the legend says so. Levels differ in color, width and style of the line, and
doubtful words are also named in a sentence, so that nothing depends on seeing colors or on a pointer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

LEVELS = {"sure": 0.9, "likely": 0.7, "doubtful": 0.5, "unlikely": 0.0}
"""Classes in style.css.j2, with the least probability of each."""
MAX_DOUBTS = 3  # words of the sentence
NAMES = {True: "confidence", False: "probability"}


class ShownWord(NamedTuple):
    """A word of a caption as a page shows it.

    Args:
        word: the word.
        level: one of `LEVELS`.
        title: the number, in words.
    """

    word: str
    level: str
    title: str


def level_of(probability: float) -> str:
    """The first of `LEVELS` whose least probability is reached."""
    return next((name for name, least in LEVELS.items() if probability >= least), "unlikely")


def is_calibrated(confidences: Iterable[Mapping[str, Any]]) -> bool:
    """Whether captions have calibrated confidences; all or none of a run have."""
    return any("confidence" in caption for caption in confidences)


def probability_of(word: Mapping[str, Any]) -> float:
    """A word's confidence, or its probability where there is no calibration."""
    return word["confidence"] if "confidence" in word else math.exp(word["log_prob"])


def shown_words(caption: Mapping[str, Any]) -> list[ShownWord]:
    """The words of a caption with their underlines."""
    name = NAMES["confidence" in caption]
    return [
        ShownWord(word["word"], level_of(share), f"{word['word']}: {name} {share:.0%}")
        for word, share in ((word, probability_of(word)) for word in caption["words"])
    ]


def confidence_note(caption: Mapping[str, Any]) -> str:
    """A caption's confidence in a sentence, with the words that are least sure."""
    if "confidence" in caption:
        note = f"confidence {caption['confidence']:.0%}"
    else:
        note = f"mean log-probability {caption['mean_log_prob']:.2f}"
    doubts = sorted((probability_of(word), word["word"]) for word in caption["words"])
    doubts = [(share, word) for share, word in doubts if share < LEVELS["likely"]][:MAX_DOUBTS]
    return note + ("; least sure: " + ", ".join(f"{word} {share:.0%}" for share, word in doubts) if doubts else "")


def legend(calibrated: bool) -> list[ShownWord]:
    """The levels as words, in the order of falling probability."""
    bounds = [f"{least:.0%} or more" for least in LEVELS.values() if least] + [f"below {LEVELS['doubtful']:.0%}"]
    return [ShownWord(text, level, NAMES[calibrated]) for level, text in zip(LEVELS, bounds, strict=True)]


def legend_text(calibrated: bool) -> str:
    """What underlines mean."""
    if calibrated:
        return "Underlines show the confidence of a word, the calibrated probability that it is right:"
    return "Underlines show the probability that the model gives a word, which is not calibrated (difnet calibrate):"
