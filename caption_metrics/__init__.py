"""Metrics of image captioning, equal to the Java tools' and without Java. See README.md beside this file."""

import os

from .bleu import bleu
from .captions import Score
from .cider import CiderD, CiderReward
from .java_metrics import JavaMissing, Meteor, check_java, meteor, spice
from .rouge import rouge_l
from .scoring import score_captions
from .tokenizer import PTBTokenizer


def module_path() -> str:
    """The folder that `evaluate.load` takes, wherever this package is installed."""
    return os.path.dirname(os.path.abspath(__file__))


__all__ = [
    "CiderD",
    "CiderReward",
    "JavaMissing",
    "Meteor",
    "PTBTokenizer",
    "Score",
    "bleu",
    "check_java",
    "meteor",
    "module_path",
    "rouge_l",
    "score_captions",
    "spice",
]
