"""A scene as an image, with the maps of its classes and of its parts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from modeling_difnet.segmentation_difnet import CLASS_NAMES

from .drawings import COLORS, SIDE, Canvas, shade
from .scenes import OBJECT_KINDS, SETTINGS, Scene, SceneObject

GRID_SIZE = 7
SEAT_HEIGHTS = {
    "horse": 0.62,
    "bicycle": 0.8,
    "surfboard": 0.5,
    "couch": 0.42,
    "chair": 0.44,
    "bench": 0.4,
}  # as fractions of the height of what is sat on


class Part(NamedTuple):
    """A band of the background, or one object. `kind` and `pose` are empty for bands."""

    class_name: str
    kind: str = ""
    pose: str = ""


class Drawing(NamedTuple):
    """A drawn scene.

    Args:
        image: RGB, `SIDE` x `SIDE`.
        label_map: (SIDE, SIDE) uint8, the original's channels.
        part_map: (SIDE, SIDE) uint8, index in `parts` of what is visible at each pixel.
        parts: bands from top to bottom, then objects from back to front.
        objects: the scene's objects, each with its indices in `parts`.
    """

    image: Image.Image
    label_map: np.ndarray
    part_map: np.ndarray
    parts: tuple[Part, ...]
    objects: tuple[tuple[SceneObject, tuple[int, ...]], ...]


def draw_scene(scene: Scene) -> Drawing:
    """Draws the background, then the objects from back to front."""
    rng = np.random.default_rng([scene.image_id, 3])
    painter = _Painter(rng)
    painter.draw_background(scene.setting)
    objects = _draw_subject(painter, scene) if scene.companion is None else _draw_pair(painter, scene, scene.companion)
    channels = np.array([CLASS_NAMES.index(part.class_name) for part in painter.parts], dtype=np.uint8)
    part_map = painter.canvas.part_map()
    return Drawing(painter.canvas.image(), channels[part_map], part_map, tuple(painter.parts), objects)


class _Painter:
    """A canvas with the parts drawn so far."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.canvas = rng, Canvas()
        self.parts: list[Part] = []

    def draw_background(self, setting: str) -> None:
        top = 0.0
        for band in SETTINGS[setting].bands:
            color = shade(band.color, self.rng.uniform(0.95, 1.04))
            self.parts.append(Part(band.class_name))
            pen = self.canvas.pen((0.0, top, 1.0, band.bottom), len(self.parts) - 1)
            pen.rectangle(0.0, 0.0, 1.0, 1.0, color)
            band.decorate(pen, color, self.rng)
            top = band.bottom

    def draw_object(
        self, thing: SceneObject, x: float, bottom: float, pose: str, scale: float = 1.0, mirrored: bool = False
    ) -> int:
        """Draws one object.

        Args:
            thing: what is drawn.
            x: its middle, as a fraction of the image's width; moved where it would stick out.
            bottom: its lower edge, as a fraction of the image's height.
            pose: as the functions of `drawings` know it.
            scale: 1 for the size in `OBJECT_KINDS`.
            mirrored: whether it faces left.

        Returns:
            Its index in `parts`.
        """
        kind = OBJECT_KINDS[thing.kind]
        width, height = kind.size[0] * scale, kind.size[1] * scale
        left = min(max(x - width / 2, 0.01), 0.99 - width)
        color = shade(COLORS[thing.color], self.rng.uniform(0.94, 1.05))
        self.parts.append(Part(kind.class_name, thing.kind, pose))
        box = (left, bottom - height, left + width, bottom)
        kind.draw(self.canvas.pen(box, len(self.parts) - 1, mirrored), color, pose)
        return len(self.parts) - 1


class _Layout(NamedTuple):
    """The random choices that all scenes share."""

    scale: float
    ground: float  # the lower edge of what stands on it
    side: int  # -1 or 1: which side of the subject its companion is on
    middle: float

    @property
    def mirrored(self) -> bool:
        return self.side > 0

    @classmethod
    def random(cls, rng: np.random.Generator) -> _Layout:
        scale, ground = rng.uniform(0.92, 1.04), rng.uniform(0.84, 0.93)
        return cls(scale, ground, int(rng.choice([-1, 1])), 0.5 + rng.uniform(-0.06, 0.06))


def _draw_subject(painter: _Painter, scene: Scene) -> tuple[tuple[SceneObject, tuple[int, ...]], ...]:
    """One to three objects of the same kind, side by side."""
    rng, subject = painter.rng, scene.subject
    layout = _Layout.random(rng)
    width, _ = OBJECT_KINDS[subject.kind].size
    largest = {1: min(1.7, 0.55 / width), 2: min(1.3, 0.42 / width), 3: min(1.1, 0.28 / width)}
    scale = layout.scale * largest[subject.number]
    ground = rng.uniform(0.4, 0.5) if scene.action == "flying" else layout.ground
    places = {1: (0.5,), 2: (0.26, 0.74), 3: (0.17, 0.5, 0.83)}[subject.number]
    parts = []
    for place in places:
        x, bottom = place + rng.uniform(-0.04, 0.04), ground + rng.uniform(-0.06, 0.06)
        parts.append(painter.draw_object(subject, x, bottom, scene.action, scale, layout.mirrored))
    return ((subject, tuple(parts)),)


def _draw_pair(
    painter: _Painter, scene: Scene, companion: SceneObject
) -> tuple[tuple[SceneObject, tuple[int, ...]], ...]:
    """The subject and its companion in their relation."""
    rng, subject, draw = painter.rng, scene.subject, painter.draw_object
    layout = _Layout.random(rng)
    side, middle, ground, mirrored = layout.side, layout.middle, layout.ground, layout.mirrored
    width, height = OBJECT_KINDS[subject.kind].size
    other_width, other_height = OBJECT_KINDS[companion.kind].size
    if scene.relation == "riding":
        seat = SEAT_HEIGHTS[companion.kind] * other_height * 1.1
        second = draw(companion, middle, ground, "standing", 1.1, mirrored)
        pose = "standing" if companion.kind == "surfboard" else "riding"
        hips = 0.2 * 0.95 * height if pose == "riding" else 0.0
        first = draw(subject, middle, ground - seat + hips, pose, 0.95, mirrored)
    elif scene.relation == "holding":
        x = middle + side * 0.46 * 0.48 * height
        second = draw(companion, x, ground - height * 0.55, "standing")
        pose = scene.action if scene.action == "walking" else "holding"
        first = draw(subject, middle, ground, pose, 1.0, side < 0)
    elif scene.relation == "flying":
        x, bottom = middle + side * rng.uniform(0.26, 0.34), rng.uniform(0.34, 0.42)
        first = draw(subject, middle - side * 0.16, ground, "holding", 1.0, side < 0)
        hand = (middle - side * 0.16 + side * 0.23 * height, ground - 0.58 * height)
        second = draw(companion, x, bottom, "flying")
        painter.canvas.pen((0, 0, 1, 1), second).line([hand, (x, bottom)], (90, 90, 94), 0.005)
    elif scene.relation == "on":
        second = draw(companion, middle, ground, "standing", 1.15)
        seat = SEAT_HEIGHTS[companion.kind] * other_height * 1.15
        deep = 0.25 * height if OBJECT_KINDS[subject.kind].class_name == "person" else 0.0
        first = draw(subject, middle, ground - seat + deep, scene.action, 1.0, mirrored)
    else:
        scale = min(1.4, 0.94 / (width + other_width))
        apart = (width + other_width) / 2 * scale
        second = draw(companion, middle + side * apart / 2, ground - 0.03, "standing", scale, not mirrored)
        first = draw(subject, middle - side * apart / 2, ground, scene.action, scale, not mirrored)
    return (subject, (first,)), (companion, (second,))


# Where the objects are on the grid


def cell_histograms(values: np.ndarray, num_values: int, weights: np.ndarray | None = None) -> np.ndarray:
    """The distribution of values in each cell of the grid.

    Args:
        values: (SIDE, SIDE), integers from 0 to `num_values` - 1.
        num_values: number of bins.
        weights: (SIDE, SIDE), of the pixels (default: 1).

    Returns:
        (GRID_SIZE, GRID_SIZE, num_values): the sum of the weights of each cell's pixels by value, divided by the
        number of pixels of a cell.
    """
    pixels = SIDE // GRID_SIZE
    row, column = np.mgrid[:SIDE, :SIDE] // pixels
    places = ((row * GRID_SIZE + column) * num_values + values).ravel()
    sums = np.bincount(places, None if weights is None else weights.ravel(), minlength=GRID_SIZE**2 * num_values)
    return sums.reshape(GRID_SIZE, GRID_SIZE, num_values) / pixels**2


class DrawnObject(NamedTuple):
    """An object of a scene: the nouns that name it, and where it is.

    Args:
        nouns: singular and plural, with synonyms.
        class_name: its COCO class.
        shares: (GRID_SIZE, GRID_SIZE), the share of each cell that it covers.
    """

    nouns: tuple[str, ...]
    class_name: str
    shares: np.ndarray

    def cells(self, at_least: float = 0.15) -> np.ndarray:
        """(GRID_SIZE, GRID_SIZE) bool: the cells of which it covers `at_least` that share, or else the most."""
        return self.shares >= min(at_least, self.shares.max())


def drawn_objects(scene: Scene, drawing: Drawing | None = None) -> list[DrawnObject]:
    """The subject and the companion of a scene; `drawing` saves drawing it again."""
    drawing = drawing or draw_scene(scene)
    shares = cell_histograms(drawing.part_map, len(drawing.parts))
    return [
        DrawnObject(
            tuple(dict.fromkeys(noun.split()[-1] for pair in OBJECT_KINDS[thing.kind].nouns for noun in pair)),
            OBJECT_KINDS[thing.kind].class_name,
            shares[..., list(parts)].sum(axis=-1),
        )
        for thing, parts in drawing.objects
    ]
