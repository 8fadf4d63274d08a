"""What `difnet evaluate` and `difnet compare` need for metrics beside those of reference captions.

The metrics are those of `caption_metrics.ExtraMetrics`; here are the files that a command names, and a split's images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caption_metrics import ExtraMetrics

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

    def load(self, file_names: Mapping[int, str], device: str = "cpu") -> ExtraMetrics:
        """Reads the files and loads the model.

        Args:
            file_names: of the images that will be scored, by image id.
            device: of the CLIP model.

        Raises:
            ValueError: a file or the model cannot be read, or lacks one of the images.
        """
        paths: dict[str, Path] = {}
        options: dict[str, Any] = {}
        if self.clip_model is not None:
            from modeling_difnet.images_difnet import open_image

            options["open_image"] = open_image
            matches = match_images(find_images(map(str, self.images)), file_names)
            for problem in matches.problems[:1]:
                raise ValueError(f"{printable(problem.source, 300)}: image {problem.image_id}: {problem.what}")
            paths = {str(image_id): path for image_id, path in matches.paths.items()}
        metrics = ExtraMetrics.from_files(
            diversity=self.diversity,
            instances=self.instances,
            synonyms=self.synonyms,
            training_captions=self.training_captions,
            clip_model=self.clip_model,
            image_paths=paths,
            device=device,
            **options,
        )
        metrics.check([str(image_id) for image_id in file_names])
        return metrics


def json_number(value: float | None) -> float | None:
    """A score as JSON has it: NaN, of which there is none, becomes null."""
    return None if value is None or math.isnan(value) else value
