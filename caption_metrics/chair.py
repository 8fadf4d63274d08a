"""CHAIR (Rohrbach et al., EMNLP 2018): objects that captions name and images do not have; and recall of objects.

The objects of an image are those of its instance annotations and those that its reference captions name. Corresponds
to `compute_chair` of LisaAnne/Hallucination; `objects.py` says what differs in the search for words. As there, an
object that a caption names twice counts twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .captions import Caption, Score
from .objects import ObjectWords


class ObjectClass(NamedTuple):
    """One class: `images` that have it, in how many of them the caption names it, `hallucinations` in all images."""

    images: int
    recalled: int
    hallucinations: int

    @property
    def recall(self) -> float:
        """Share of its images whose captions name it; NaN without images."""
        return self.recalled / self.images if self.images else float("nan")


class Chair(NamedTuple):
    """What `chair` returns.

    Attributes:
        chair_s: share of captions that name an object that is not there; of a caption 0 or 1.
        chair_i: share of such objects among all that are named; NaN if none is, of a caption then 0.
        mentions: (images,) objects that each caption names.
        hallucinations: (images,) how many of them are not there.
        hallucinated: the words of these, a list for each caption.
        classes: counts of each class by name.
        object_recall: mean of the classes' recalls, of those that occur.
    """

    chair_s: Score
    chair_i: Score
    mentions: np.ndarray
    hallucinations: np.ndarray
    hallucinated: list[list[str]]
    classes: dict[str, ObjectClass]
    object_recall: float

    def report(self) -> dict[str, dict[str, float | None]]:
        """Counts and recall of the classes that occur, as JSON has them: None for the recall of no images."""
        return {
            name: {**each._asdict(), "recall": each.recall if each.images else None}
            for name, each in self.classes.items()
            if each.images or each.hallucinations
        }


def chair(
    captions: Sequence[Caption],
    objects: Sequence[Iterable[str]],
    references: Sequence[Sequence[Caption]] | None = None,
    words: ObjectWords | None = None,
) -> Chair:
    """CHAIR-s, CHAIR-i and recall of objects, of one caption for each image.

    captions: strings or lists of tokens.
    objects: names of the annotated objects of each image, such as the categories of its instances.
    references: reference captions of each image, whose objects are there too; the paper takes both.
    words: classes and their words; by default those of COCO.

    Raises ValueError if lengths differ, there are no captions, or `words` does not know an object.
    """
    words = words or ObjectWords()
    if not len(captions):
        raise ValueError("there are no captions to score")
    if len(objects) != len(captions) or (references is not None and len(references) != len(captions)):
        raise ValueError("captions, objects and references need one entry for each image")
    mentions, hallucinations = np.zeros(len(captions)), np.zeros(len(captions))
    hallucinated: list[list[str]] = []
    counts = {name: [0, 0, 0] for name in words.classes}
    for position, caption in enumerate(captions):
        there = {_class_of(name, words, position) for name in objects[position]}
        for reference in references[position] if references is not None else ():
            there.update(name for _, name in words.mentions(reference))
        named = words.mentions(caption)
        wrong = [(text, name) for text, name in named if name not in there]
        mentions[position], hallucinations[position] = len(named), len(wrong)
        hallucinated.append([text for text, _ in wrong])
        recalled = {name for _, name in named}
        for name in there:
            counts[name][0] += 1
            counts[name][1] += name in recalled
        for _, name in wrong:
            counts[name][2] += 1
    classes = {name: ObjectClass(*each) for name, each in counts.items()}
    recalls = [each.recall for each in classes.values() if each.images]
    per_caption = np.divide(hallucinations, mentions, out=np.zeros(len(captions)), where=mentions > 0)
    total = mentions.sum()
    return Chair(
        Score(float(np.mean(hallucinations > 0)), (hallucinations > 0).astype(np.float64)),
        Score(float(hallucinations.sum() / total) if total else float("nan"), per_caption),
        mentions,
        hallucinations,
        hallucinated,
        classes,
        float(np.mean(recalls)) if recalls else float("nan"),
    )


def _class_of(name: str, words: ObjectWords, position: int) -> str:
    found = words.class_of(name)
    if found is None:
        raise ValueError(f"objects[{position}]: {name!r:.80} is no class, and no word of one; add it to the synonyms")
    return found
