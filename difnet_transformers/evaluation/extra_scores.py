"""What `difnet evaluate` and `difnet compare` need for metrics beside those of reference captions.

The metrics are those of `caption_metrics.ExtraMetrics`; here are the files that a command names, and a split's images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from caption_metrics import ExtraMetrics
from caption_metrics.files import image_key

from ..data.image_files import find_images, match_images
from ..files import printable


@dataclass(frozen=True)
class ExtraInputs:
    """Inputs of further metrics; `None` or empty for those that are not wanted.

    Args:
        diversity: whether length, vocabulary and distinct n-grams are counted.
        instances: COCO's instance annotations, for CHAIR and recall of objects.
        synonyms: words of each class, a line for each, in place of those of COCO's classes.
        training_captions: JSON file of captions, for the share of novel ones.
        clip_model: folder or repository of a CLIP or SigLIP model, for CLIPScore.
        images: image files, or folders of them, for `clip_model`.
    """

    diversity: bool = False
    instances: Sequence[Path] = ()
    synonyms: Path | None = None
    training_captions: Path | None = None
    clip_model: str | None = None
    images: Sequence[Path] = ()

    def load(self, file_names: Mapping[str, str], device: str = "cpu") -> ExtraMetrics:
        """Reads the files and loads the model.

        Args:
            file_names: of the images that will be scored, by image id as text; "" where it is not known.
            device: of the CLIP model.

        Raises:
            ValueError: a file or the model cannot be read, or lacks one of the images.
        """
        options: dict[str, Any] = {}
        if self.clip_model is not None:
            from modeling_difnet.images_difnet import open_image

            options = {"open_image": open_image, "image_paths": image_paths(self.images, file_names)}
        metrics = ExtraMetrics.from_files(
            diversity=self.diversity,
            instances=self.instances,
            synonyms=self.synonyms,
            training_captions=self.training_captions,
            clip_model=self.clip_model,
            device=device,
            **options,
        )
        metrics.check(list(file_names))
        return metrics


def image_paths(places: Sequence[Path], file_names: Mapping[str, str]) -> dict[str, Path]:
    """Image files by image id: by file name, or where that is not known by the number that the file's name ends with.

    Args:
        places: image files, or folders of them.
        file_names: by image id as text, "" where it is not known.

    Raises:
        ValueError: a place does not exist, or two files fit an image.
    """
    files = find_images(map(str, places))
    named = {image: name for image, name in file_names.items() if name}
    matches = match_images(files, cast(Any, named))
    for problem in matches.problems[:1]:
        raise ValueError(f"{printable(problem.source, 300)}: image {problem.image_id}: {problem.what}")
    paths = {str(image): path for image, path in matches.paths.items()}
    if len(named) < len(file_names):
        by_number = {image_key(re.sub(r".*?([0-9]+)$", r"\1", path.stem)): path for path in files}
        paths |= {image: by_number[image] for image in file_names if not file_names[image] and image in by_number}
    return paths


def json_number(value: float | None) -> float | None:
    """A score as JSON has it: NaN, of which there is none, becomes null."""
    return None if value is None or math.isnan(value) else value
