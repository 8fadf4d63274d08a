"""Metrics of image captioning, equal to the Java tools' and without Java. See README.md beside this file."""

import os

from .bleu import BleuCounts, bleu, bleu_counts, bleu_of_counts
from .captions import Score
from .chair import Chair, ObjectClass, chair
from .cider import CiderD, CiderReward
from .clip_score import ClipScore
from .coco_objects import COCO_OBJECTS
from .diversity import CaptionStatistics, caption_statistics, distinct_n, novel_captions, self_cider
from .extra_metrics import ExtraMetrics, ExtraScores
from .java_metrics import JavaMissing, Meteor, check_java, meteor, spice
from .objects import ObjectWords
from .rouge import rouge_l
from .scoring import score_captions
from .tokenizer import PTBTokenizer


def module_path(name: str | None = None) -> str:
    """What `evaluate.load` takes, wherever this package is installed.

    name: `None` for the metrics of captions and references; "chair", "diversity" or "clip_score" for these.

    Raises ValueError for another name.
    """
    folder = os.path.dirname(os.path.abspath(__file__))
    if name is None:
        return folder
    if name not in ("chair", "diversity", "clip_score"):
        raise ValueError(f'name must be "chair", "diversity" or "clip_score", not {name!r:.80}')
    return os.path.join(folder, f"evaluate_{name}.py")


__all__ = [
    "COCO_OBJECTS",
    "BleuCounts",
    "CaptionStatistics",
    "Chair",
    "CiderD",
    "CiderReward",
    "ClipScore",
    "ExtraMetrics",
    "ExtraScores",
    "JavaMissing",
    "Meteor",
    "ObjectClass",
    "ObjectWords",
    "PTBTokenizer",
    "Score",
    "bleu",
    "bleu_counts",
    "bleu_of_counts",
    "caption_statistics",
    "chair",
    "check_java",
    "distinct_n",
    "meteor",
    "module_path",
    "novel_captions",
    "rouge_l",
    "score_captions",
    "self_cider",
    "spice",
]
