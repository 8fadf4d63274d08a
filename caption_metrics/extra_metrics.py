"""Metrics that need more than captions and references, each where its input is given.

CHAIR and recall of objects take instance annotations, novel captions the training captions, self-CIDEr several
captions of each image, CLIPScore the images and a model. `python -m caption_metrics` and programs that caption whole
splits use this; functions of single metrics are in `chair.py`, `diversity.py` and `clip_score.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .chair import Chair, chair
from .clip_score import ClipScore
from .diversity import caption_statistics, novel_captions, self_cider
from .files import UserError, printable, read_objects, read_references, read_synonyms, read_training_captions
from .objects import ObjectWords


class ExtraScores(NamedTuple):
    """Scores by name: of the `corpus`, of each image (`per_image`, arrays in the order given); what CHAIR found."""

    corpus: dict[str, float]
    per_image: dict[str, np.ndarray]
    chair: Chair | None


@dataclass(frozen=True)
class ExtraMetrics:
    """What is scored beside BLEU, ROUGE-L and CIDEr-D.

    diversity: whether `caption_length`, `vocabulary_size`, `distinct_1` and `distinct_2` are.
    objects: annotated objects by image id, for `chair_s`, `chair_i` and `object_recall`.
    words: classes of objects and their words.
    training_captions: for `novel_captions`.
    samples: two or more captions by image id, for `self_cider`.
    clip: for `clip_score` and `ref_clip_score`.
    image_paths: image files by image id, for `clip`.
    """

    diversity: bool = False
    objects: Mapping[str, set[str]] | None = None
    words: ObjectWords = field(default_factory=ObjectWords)
    training_captions: Sequence[str] | None = None
    samples: Mapping[str, Sequence[str]] | None = None
    clip: ClipScore | None = None
    image_paths: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_files(
        cls,
        *,
        diversity: bool = False,
        instances: Sequence[Path] = (),
        synonyms: Path | None = None,
        training_captions: Path | None = None,
        samples: Path | None = None,
        clip_model: str | None = None,
        image_paths: Mapping[str, Any] | None = None,
        open_image: Callable[[Any], Any] | None = None,
        device: str = "cpu",
    ) -> ExtraMetrics:
        """Reads the files and loads the model. Raises UserError."""
        if synonyms is not None and not instances:
            raise UserError("synonyms are words of annotated objects: give the instance annotations too")
        objects, words = None, ObjectWords()
        if instances:
            objects, categories = read_objects(instances)
            table = words if synonyms is None else ObjectWords(read_synonyms(synonyms))
            words = table.of_categories(categories)
        several: dict[str, list[str]] | None = None
        if samples is not None:
            groups = read_references(samples)
            several = groups if isinstance(groups, dict) else {str(n): group for n, group in enumerate(groups)}
            few = [image for image, group in several.items() if len(group) < 2]
            if few:
                raise UserError(
                    f"{printable(str(samples))}: image {printable(few[0])} has one caption; self-CIDEr compares two "
                    "or more of each image"
                )
        clip = None
        if clip_model is not None:
            options = {} if open_image is None else {"open_image": open_image}
            try:
                clip = ClipScore.from_pretrained(clip_model, device, **options)
            except (ImportError, ValueError) as error:
                raise UserError(str(error)) from error
        return cls(
            diversity,
            objects,
            words,
            None if training_captions is None else read_training_captions(training_captions),
            several,
            clip,
            image_paths or {},
        )

    def check(self, images: Sequence[str]) -> None:
        """To be called before long work. Raises UserError if an input lacks an image."""
        for name, known in (("instance annotations", self.objects), ("sampled captions", self.samples)):
            missing = [] if known is None else [image for image in images if image not in known]
            if missing:
                raise UserError(
                    f"the {name} lack {len(missing)} of {len(images)} images, the first is image "
                    f"{printable(missing[0])}; give the file of these images"
                )
        missing = [] if self.clip is None else [image for image in images if image not in self.image_paths]
        if missing:
            raise UserError(
                f"CLIPScore lacks the files of {len(missing)} of {len(images)} images, the first is image "
                f"{printable(missing[0])}"
            )

    def score(
        self, images: Sequence[str], captions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> ExtraScores:
        """Scores one caption for each image, raw strings. Errors as of `check` and of each metric."""
        self.check(images)
        corpus: dict[str, float] = {}
        per_image: dict[str, np.ndarray] = {}
        if self.diversity:
            statistics = caption_statistics(captions)
            corpus["caption_length"], per_image["caption_length"] = statistics.caption_length
            corpus["vocabulary_size"] = statistics.vocabulary_size
            corpus |= {"distinct_1": statistics.distinct_1, "distinct_2": statistics.distinct_2}
        if self.training_captions is not None:
            corpus["novel_captions"], per_image["novel_captions"] = novel_captions(captions, self.training_captions)
        if self.samples is not None:
            groups = [self.samples[image] for image in images]
            corpus["self_cider"], per_image["self_cider"] = self_cider(groups, references)
        found = None
        if self.objects is not None:
            found = chair(captions, [self.objects[image] for image in images], references, self.words)
            corpus["chair_s"], per_image["chair_s"] = found.chair_s
            corpus["chair_i"], per_image["chair_i"] = found.chair_i
            corpus["object_recall"] = found.object_recall
        if self.clip is not None:
            paths = [self.image_paths[image] for image in images]
            scores = self.clip.scores(captions, paths, references)
            for name, score in zip(("clip_score", "ref_clip_score"), scores, strict=True):
                corpus[name], per_image[name] = score
        return ExtraScores(corpus, per_image, found)
