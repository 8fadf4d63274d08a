"""Examples for the page: scenes that the demo draws, unlike any that its model was trained on.

A captioner of the demo knows the demo's own features alone, which come from the drawing and not from a network; others
see the drawings as images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modeling_difnet.segmentation_difnet import CLASS_NAMES

from ..command_line import requires
from ..demo.features import GRID_FEATURE_SIZE, grid_features, segmentation_features
from ..demo.rendering import GRID_SIZE, Drawing, draw_scene
from ..demo.scenes import Scene, make_scenes
from .captioners import ServedCaptioner
from .inputs import CaptionInput

with requires("app"):
    from PIL import Image

NUM_EXAMPLES = 8


@dataclass
class Example:
    """A drawn scene.

    Args:
        name: for people.
        scene, drawing: of the demo.
    """

    name: str
    scene: Scene
    drawing: Drawing

    @property
    def image(self) -> Image.Image:
        return self.drawing.image

    def given(self, as_features: bool) -> CaptionInput:
        """What a captioner gets: the image or, beside it, the demo's features of it."""
        if not as_features:
            return CaptionInput(self.image, name=self.name)
        features: dict[str, Any] = {
            "grid_features": grid_features(self.scene, self.drawing),
            "segmentation_features": segmentation_features(self.drawing),
        }
        return CaptionInput(self.image, features, name=self.name)


def make_examples() -> list[Example]:
    """The first test scenes of the demo."""
    scenes = [scene for scene in make_scenes() if scene.split == "test"][:NUM_EXAMPLES]
    return [Example(f"scene {scene.image_id}", scene, draw_scene(scene)) for scene in scenes]


def takes_examples(served: ServedCaptioner) -> bool:
    """Whether a captioner can caption the examples, one way or the other."""
    return wants_features(served) or served.takes_images


def wants_features(served: ServedCaptioner) -> bool:
    """Whether a captioner may be the demo's: nothing says what made its features, which have the demo's sizes."""
    extractor = served.captioner.processor.feature_extractor
    return (
        not served.captioner.recorded_backbone
        and served.captioner.grid_backbone is None
        and extractor.grid_shape == (GRID_SIZE, GRID_SIZE)
        and extractor.grid_feature_size == GRID_FEATURE_SIZE
        and extractor.num_segmentation_classes == len(CLASS_NAMES)
    )
