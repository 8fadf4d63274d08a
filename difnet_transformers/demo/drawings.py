"""Flat drawings of COCO's classes, with a map of the part of the scene that each pixel belongs to.

Nothing of the original implementation corresponds to it. `Canvas` draws the same shapes twice: into the image, drawn
large and scaled down so that edges are smooth, and into the part map. The functions below it draw one object each, in
coordinates from 0 to 1 within the object's box, y pointing down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

SIDE = 224  # pixels; 32 for each of the 7 x 7 cells
SUPERSAMPLING = 3

COLORS = {
    "red": (214, 62, 54),
    "blue": (52, 104, 196),
    "green": (70, 152, 78),
    "yellow": (242, 196, 60),
    "white": (246, 244, 238),
    "black": (48, 46, 52),
    "brown": (134, 88, 54),
    "orange": (236, 134, 46),
    "pink": (236, 142, 168),
    "gray": (142, 144, 150),
}

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the image
SKIN, HAIR, DARK, GLASS, WOOD = (
    (226, 178, 142), (78, 54, 42), (54, 52, 58), (196, 224, 240), (166, 118, 74),
)  # fmt: skip


def shade(color: Color, factor: float) -> Color:
    """The color darker (factor below 1) or lighter."""
    red, green, blue = (int(min(255, max(0, channel * factor))) for channel in color)
    return red, green, blue


class Canvas:
    """An image and its part map, both drawn with the same shapes."""

    def __init__(self) -> None:
        self._image = Image.new("RGB", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING), (255, 255, 255))
        self._part_map = Image.new("L", (SIDE, SIDE), 0)

    def pen(self, box: Box, part: int, mirrored: bool = False) -> Pen:
        """A pen that draws the part of index `part` within `box`."""
        return Pen(self._image, self._part_map, box, part, mirrored)

    def image(self) -> Image.Image:
        """RGB, `SIDE` x `SIDE`."""
        return self._image.reduce(SUPERSAMPLING)

    def part_map(self) -> np.ndarray:
        """(SIDE, SIDE) uint8: the index of the part that is visible at each pixel."""
        return np.asarray(self._part_map)


class Pen:
    """Draws shapes given in coordinates from 0 to 1 within a box."""

    def __init__(self, image: Image.Image, part_map: Image.Image, box: Box, part: int, mirrored: bool) -> None:
        self._image, self._part_map = ImageDraw.Draw(image), ImageDraw.Draw(part_map)
        self.box, self.part, self.mirrored = box, part, mirrored

    def _targets(self, color: Color) -> Iterator[tuple[ImageDraw.ImageDraw, int, Color | int]]:
        """Both images, with the side in pixels and the fill of each."""
        yield self._image, SIDE * SUPERSAMPLING, color
        yield self._part_map, SIDE, self.part

    def _places(self, points: Sequence[tuple[float, float]], side: int) -> list[tuple[float, float]]:
        left, top, right, bottom = self.box
        return [
            ((left + (1 - x if self.mirrored else x) * (right - left)) * side, (top + y * (bottom - top)) * side)
            for x, y in points
        ]

    def polygon(self, points: Sequence[tuple[float, float]], color: Color) -> None:
        for target, side, fill in self._targets(color):
            target.polygon(self._places(points, side), fill=fill)

    def rectangle(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], color)

    def ellipse(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        angles = [2 * math.pi * step / 40 for step in range(40)]
        x, y, width, height = (left + right) / 2, (top + bottom) / 2, (right - left) / 2, (bottom - top) / 2
        self.polygon([(x + width * math.cos(angle), y + height * math.sin(angle)) for angle in angles], color)

    def line(self, points: Sequence[tuple[float, float]], color: Color, width: float) -> None:
        """`width` as a fraction of the box's height."""
        for target, side, fill in self._targets(color):
            pixels = max(1, round(width * (self.box[3] - self.box[1]) * side))
            target.line(self._places(points, side), fill=fill, width=pixels, joint="curve")


# Animals


def _legs(pen: Pen, pose: str, color: Color, hips: Sequence[float], top: float, width: float) -> None:
    stride = 0.1 if pose == "running" else 0.0
    for number, hip in enumerate(hips):
        foot = hip + (stride if number % 2 else -stride)
        pen.line([(hip, top), (foot, 1.0)], shade(color, 0.8 if number % 2 else 0.92), width)


def draw_animal(pen: Pen, color: Color, pose: str, kind: str) -> None:
    """Dog, cat, horse, cow or sheep, facing right: standing, running, or lying (and sitting, for the small ones)."""
    low = 0.2 if pose in ("lying", "sitting") else 0.0
    top, bottom = {"dog": (0.36, 0.7), "cat": (0.42, 0.74), "horse": (0.36, 0.66), "cow": (0.3, 0.7)}.get(
        kind, (0.26, 0.74)
    )
    top, bottom = top + low, bottom + 1.3 * low
    fleece = kind == "sheep"
    limbs = (92, 84, 80) if fleece else color
    head = limbs if fleece else shade(color, 1.06)
    if not low:
        _legs(pen, pose, limbs, (0.22, 0.32, 0.62, 0.72), bottom - 0.08, 0.075)
    elif pose == "lying":
        pen.line([(0.6, bottom - 0.05), (0.92, bottom - 0.01)], shade(color, 0.85), 0.08)
    if kind == "cat":
        pen.line([(0.16, top + 0.2), (0.04, top + 0.02), (0.09, top - 0.2)], shade(color, 0.9), 0.06)
    elif kind in ("dog", "cow"):
        pen.line([(0.16, top + 0.12), (0.03, top + (0.3 if kind == "cow" else -0.12))], shade(color, 0.9), 0.05)
    elif kind == "horse":
        pen.polygon([(0.17, top + 0.05), (0.02, top + 0.16), (0.06, bottom + 0.14), (0.18, top + 0.22)], DARK)
    pen.ellipse(0.12, top, 0.8, bottom, color)
    if kind == "horse":
        pen.polygon([(0.62, top + 0.18), (0.76, 0.04 + low), (0.9, 0.14 + low), (0.8, top + 0.24)], color)
        pen.polygon([(0.6, top + 0.06), (0.74, 0.02 + low), (0.79, 0.06 + low), (0.67, top + 0.12)], DARK)
        pen.polygon([(0.74, 0.04 + low), (0.84, 0.02 + low), (1.0, 0.2 + low), (0.92, 0.28 + low)], head)
        eye = (0.85, 0.11 + low)
    else:
        size = {"dog": 0.3, "cat": 0.3, "cow": 0.3, "sheep": 0.26}[kind]
        middle = {"dog": top - 0.02, "cat": top - 0.06, "cow": top + 0.04, "sheep": top + 0.12}[kind]
        left, right = 0.98 - size, 0.98
        if kind == "cat":
            for ear in (left + 0.06, right - 0.1):
                pen.polygon(
                    [(ear - 0.05, middle - 0.08), (ear + 0.01, middle - 0.24), (ear + 0.08, middle - 0.1)], head
                )
        if kind == "cow":
            pen.line([(left + 0.04, middle - 0.12), (left + 0.08, middle - 0.22)], (226, 216, 190), 0.04)
            pen.line([(right - 0.1, middle - 0.12), (right - 0.06, middle - 0.22)], (226, 216, 190), 0.04)
        pen.ellipse(left, middle - 0.16, right, middle + 0.14, head)
        if kind == "dog":
            pen.ellipse(left - 0.03, middle - 0.16, left + 0.09, middle + 0.12, shade(color, 0.7))
            pen.ellipse(right - 0.06, middle - 0.02, right + 0.02, middle + 0.06, DARK)
        if kind == "cow":
            pen.ellipse(left + 0.06, middle + 0.02, right + 0.02, middle + 0.16, (232, 182, 172))
        eye = (left + 0.17, middle - 0.05)
    if kind == "cow":
        patch = DARK if sum(color) > 500 else (240, 236, 228)
        pen.ellipse(0.24, top + 0.05, 0.42, top + 0.22, patch)
        pen.ellipse(0.5, top + 0.14, 0.64, top + 0.3, patch)
    if fleece:
        for x in (0.16, 0.3, 0.46, 0.62):
            pen.ellipse(x - 0.06, top - 0.05, x + 0.16, top + 0.18, shade(color, 1.02))
    pen.ellipse(eye[0] - 0.02, eye[1] - 0.025, eye[0] + 0.02, eye[1] + 0.025, (30, 30, 32))


def draw_bird(pen: Pen, color: Color, pose: str) -> None:
    if pose == "flying":
        pen.polygon([(0.0, 0.2), (0.3, 0.12), (0.52, 0.5), (0.4, 0.6)], shade(color, 0.85))
        pen.polygon([(1.0, 0.1), (0.7, 0.06), (0.46, 0.5), (0.6, 0.6)], shade(color, 0.92))
    else:
        pen.line([(0.45, 0.7), (0.45, 1.0)], (226, 150, 60), 0.06)
        pen.line([(0.57, 0.7), (0.57, 1.0)], (226, 150, 60), 0.06)
        pen.polygon([(0.0, 0.4), (0.3, 0.42), (0.3, 0.66)], shade(color, 0.8))
    pen.ellipse(0.2, 0.36, 0.78, 0.82, color)
    pen.ellipse(0.62, 0.24, 0.9, 0.56, color)
    pen.polygon([(0.88, 0.34), (1.0, 0.42), (0.88, 0.48)], (236, 158, 52))
    pen.ellipse(0.75, 0.33, 0.81, 0.41, (30, 30, 32))


# People


def draw_person(pen: Pen, color: Color, pose: str, kind: str) -> None:
    """A man, a woman or a child in clothes of the given color."""
    head = 0.26 if kind == "child" else 0.2
    trousers = (70, 78, 104) if kind != "woman" else shade(color, 0.9)
    waist, hip = 0.6, 0.66
    if pose in ("sitting", "riding"):
        waist, hip = 0.72, 0.8
        pen.line([(0.46, hip), (0.86, hip), (0.86, 1.0)], trousers, 0.12)
    else:
        spread = 0.16 if pose in ("walking", "running") else 0.07
        legs = trousers if kind != "woman" else SKIN
        pen.line([(0.45, hip), (0.45 - spread, 0.99)], shade(legs, 0.9), 0.1)
        pen.line([(0.55, hip), (0.55 + spread, 0.99)], legs, 0.1)
    if kind == "woman":
        pen.ellipse(0.24, 0.0, 0.76, head + 0.12, HAIR)
        pen.polygon([(0.34, head), (0.66, head), (0.84, hip + 0.08), (0.16, hip + 0.08)], color)
    else:
        pen.polygon([(0.24, head + 0.02), (0.76, head + 0.02), (0.7, waist + 0.08), (0.3, waist + 0.08)], color)
    arm = [(0.7, head + 0.07), (0.98, 0.42)] if pose == "holding" else [(0.72, head + 0.08), (0.88, waist)]
    pen.line(arm, shade(color, 0.82), 0.08)
    pen.line([(0.28, head + 0.08), (0.12, waist)], shade(color, 0.82), 0.08)
    pen.ellipse(0.3, 0.02, 0.7, head + 0.02, SKIN)
    pen.polygon(
        [(0.3, head * 0.5), (0.34, 0.03), (0.5, -0.01), (0.66, 0.03), (0.7, head * 0.5), (0.5, head * 0.3)], HAIR
    )
    for eye in (0.43, 0.58):
        pen.ellipse(eye - 0.025, head * 0.55, eye + 0.025, head * 0.55 + 0.025, (40, 36, 36))


# Vehicles


def _wheel(pen: Pen, x: float, y: float, width: float, height: float) -> None:
    pen.ellipse(x - width, y - height, x + width, y + height, (44, 44, 48))
    pen.ellipse(x - width / 2, y - height / 2, x + width / 2, y + height / 2, (170, 172, 178))


def draw_car(pen: Pen, color: Color, pose: str) -> None:
    pen.polygon([(0.2, 0.5), (0.32, 0.12), (0.68, 0.12), (0.84, 0.5)], color)
    pen.polygon([(0.27, 0.48), (0.36, 0.2), (0.49, 0.2), (0.49, 0.48)], GLASS)
    pen.polygon([(0.53, 0.48), (0.53, 0.2), (0.65, 0.2), (0.76, 0.48)], GLASS)
    pen.polygon([(0.0, 0.56), (0.06, 0.46), (0.92, 0.46), (1.0, 0.58), (1.0, 0.82), (0.0, 0.82)], color)
    pen.ellipse(0.93, 0.54, 1.0, 0.66, (250, 236, 170))
    _wheel(pen, 0.22, 0.82, 0.1, 0.18)
    _wheel(pen, 0.78, 0.82, 0.1, 0.18)


def draw_bus(pen: Pen, color: Color, pose: str) -> None:
    pen.rectangle(0.0, 0.06, 1.0, 0.86, color)
    pen.rectangle(0.0, 0.56, 1.0, 0.62, shade(color, 0.75))
    for left in (0.05, 0.23, 0.41, 0.59):
        pen.rectangle(left, 0.18, left + 0.14, 0.46, GLASS)
    pen.rectangle(0.8, 0.18, 0.96, 0.5, GLASS)
    _wheel(pen, 0.2, 0.86, 0.08, 0.14)
    _wheel(pen, 0.8, 0.86, 0.08, 0.14)


def draw_truck(pen: Pen, color: Color, pose: str) -> None:
    pen.rectangle(0.0, 0.04, 0.64, 0.8, shade(color, 1.08))
    for line in (0.16, 0.32, 0.48):
        pen.line([(line, 0.1), (line, 0.74)], shade(color, 0.8), 0.025)
    pen.polygon([(0.67, 0.8), (0.67, 0.26), (0.86, 0.26), (1.0, 0.54), (1.0, 0.8)], color)
    pen.polygon([(0.74, 0.5), (0.74, 0.34), (0.84, 0.34), (0.92, 0.5)], GLASS)
    for x in (0.16, 0.34, 0.82):
        _wheel(pen, x, 0.84, 0.085, 0.15)


def draw_bicycle(pen: Pen, color: Color, pose: str) -> None:
    for x in (0.22, 0.78):
        pen.ellipse(x - 0.22, 0.4, x + 0.22, 1.0, DARK)
        pen.ellipse(x - 0.16, 0.48, x + 0.16, 0.92, (222, 222, 220))
    pen.line([(0.22, 0.7), (0.38, 0.3), (0.68, 0.3), (0.46, 0.7), (0.22, 0.7)], color, 0.1)
    pen.line([(0.46, 0.7), (0.36, 0.18)], color, 0.1)
    pen.line([(0.78, 0.7), (0.66, 0.1), (0.8, 0.06)], color, 0.1)
    pen.line([(0.28, 0.16), (0.46, 0.16)], DARK, 0.1)


def draw_boat(pen: Pen, color: Color, pose: str) -> None:
    pen.line([(0.48, 0.7), (0.48, 0.02)], WOOD, 0.03)
    pen.polygon([(0.5, 0.06), (0.5, 0.62), (0.88, 0.62)], (250, 248, 240))
    pen.polygon([(0.45, 0.14), (0.45, 0.62), (0.14, 0.62)], (234, 230, 220))
    pen.polygon([(0.0, 0.68), (1.0, 0.68), (0.84, 1.0), (0.16, 1.0)], color)
    pen.polygon([(0.0, 0.68), (1.0, 0.68), (0.97, 0.75), (0.03, 0.75)], shade(color, 0.75))


def draw_surfboard(pen: Pen, color: Color, pose: str) -> None:
    pen.ellipse(0.0, 0.0, 1.0, 1.0, color)
    pen.ellipse(0.1, 0.34, 0.9, 0.62, shade(color, 1.25))


# Objects that people hold


def draw_kite(pen: Pen, color: Color, pose: str) -> None:
    pen.line([(0.5, 0.7), (0.42, 0.8), (0.54, 0.88), (0.46, 1.0)], shade(color, 0.7), 0.03)
    pen.polygon([(0.5, 0.0), (0.9, 0.3), (0.5, 0.74), (0.1, 0.3)], color)
    pen.polygon([(0.5, 0.0), (0.9, 0.3), (0.5, 0.3)], shade(color, 1.25))
    pen.polygon([(0.5, 0.3), (0.1, 0.3), (0.5, 0.74)], shade(color, 0.8))


def draw_umbrella(pen: Pen, color: Color, pose: str) -> None:
    pen.line([(0.5, 0.2), (0.5, 0.94), (0.58, 1.0)], DARK, 0.035)
    dome = [
        (0.5 - 0.5 * math.cos(math.pi * step / 20), 0.5 - 0.46 * math.sin(math.pi * step / 20)) for step in range(21)
    ]
    pen.polygon(dome, color)
    pen.polygon([(0.34, 0.5), (0.5, 0.04), (0.66, 0.5)], shade(color, 1.2))


# Furniture


def draw_bench(pen: Pen, color: Color, pose: str) -> None:
    for y in (0.1, 0.3):
        pen.rectangle(0.02, y, 0.98, y + 0.13, color)
    pen.rectangle(0.0, 0.54, 1.0, 0.68, shade(color, 0.85))
    for x in (0.12, 0.82):
        pen.rectangle(x, 0.1, x + 0.06, 1.0, shade(color, 0.65))


def draw_chair(pen: Pen, color: Color, pose: str) -> None:
    pen.rectangle(0.08, 0.0, 0.24, 0.6, shade(color, 0.85))
    pen.rectangle(0.08, 0.5, 0.92, 0.64, color)
    for x in (0.1, 0.78):
        pen.rectangle(x, 0.6, x + 0.1, 1.0, shade(color, 0.7))


def draw_couch(pen: Pen, color: Color, pose: str) -> None:
    pen.rectangle(0.08, 0.0, 0.92, 0.7, shade(color, 0.85))
    pen.rectangle(0.14, 0.48, 0.86, 0.78, shade(color, 1.1))
    pen.line([(0.5, 0.04), (0.5, 0.78)], shade(color, 0.7), 0.02)
    for x in (0.0, 0.86):
        pen.rectangle(x, 0.3, x + 0.14, 0.92, color)
    pen.rectangle(0.06, 0.78, 0.94, 0.92, color)
    for x in (0.05, 0.88):
        pen.rectangle(x, 0.92, x + 0.07, 1.0, DARK)


# Objects on tables


def draw_cup(pen: Pen, color: Color, pose: str) -> None:
    pen.ellipse(0.62, 0.3, 1.0, 0.8, shade(color, 0.8))
    pen.ellipse(0.7, 0.4, 0.92, 0.7, (238, 226, 206))
    pen.polygon([(0.06, 0.12), (0.8, 0.12), (0.72, 1.0), (0.14, 1.0)], color)
    pen.ellipse(0.06, 0.04, 0.8, 0.2, shade(color, 0.7))


def draw_vase(pen: Pen, color: Color, pose: str) -> None:
    for x, petal in ((0.3, (240, 120, 140)), (0.52, (250, 210, 90)), (0.72, (190, 130, 220))):
        pen.line([(0.5, 0.5), (x, 0.14)], (84, 150, 84), 0.03)
        pen.ellipse(x - 0.13, 0.02, x + 0.13, 0.22, petal)
    pen.polygon([(0.34, 0.42), (0.66, 0.42), (0.62, 0.52), (0.38, 0.52)], shade(color, 0.8))
    pen.ellipse(0.16, 0.48, 0.84, 0.98, color)
    pen.rectangle(0.32, 0.92, 0.68, 1.0, shade(color, 0.8))


def draw_bowl(pen: Pen, color: Color, pose: str) -> None:
    rim = [
        (0.5 - 0.5 * math.cos(math.pi * step / 20), 0.22 + 0.78 * math.sin(math.pi * step / 20)) for step in range(21)
    ]
    pen.polygon(rim, color)
    pen.ellipse(0.0, 0.06, 1.0, 0.38, shade(color, 0.75))


def draw_apple(pen: Pen, color: Color, pose: str) -> None:
    pen.line([(0.5, 0.24), (0.56, 0.0)], WOOD, 0.07)
    pen.polygon([(0.55, 0.12), (0.78, 0.0), (0.74, 0.16)], (90, 160, 80))
    pen.ellipse(0.04, 0.16, 0.62, 1.0, color)
    pen.ellipse(0.38, 0.16, 0.96, 1.0, color)
    pen.ellipse(0.18, 0.3, 0.34, 0.5, shade(color, 1.3))


def draw_cake(pen: Pen, color: Color, pose: str) -> None:
    pen.ellipse(0.0, 0.78, 1.0, 1.0, (228, 228, 232))
    pen.rectangle(0.12, 0.36, 0.88, 0.9, color)
    pen.ellipse(0.12, 0.26, 0.88, 0.48, shade(color, 1.2))
    for x in (0.3, 0.5, 0.7):
        pen.line([(x, 0.34), (x, 0.14)], (250, 250, 250), 0.05)
        pen.ellipse(x - 0.04, 0.02, x + 0.04, 0.16, (250, 190, 60))


def draw_teddy_bear(pen: Pen, color: Color, pose: str) -> None:
    for left in (0.06, 0.7):
        pen.ellipse(left, 0.46, left + 0.24, 0.76, shade(color, 0.9))
        pen.ellipse(left, 0.74, left + 0.26, 1.0, shade(color, 0.85))
        pen.ellipse(left + 0.08, 0.0, left + 0.26 - 0.02, 0.2, shade(color, 0.85))
    pen.ellipse(0.18, 0.42, 0.82, 0.98, color)
    pen.ellipse(0.3, 0.54, 0.7, 0.9, shade(color, 1.3))
    pen.ellipse(0.16, 0.04, 0.84, 0.52, color)
    pen.ellipse(0.36, 0.28, 0.64, 0.48, shade(color, 1.3))
    for x in (0.37, 0.58):
        pen.ellipse(x, 0.2, x + 0.06, 0.27, (30, 30, 32))
    pen.ellipse(0.46, 0.3, 0.55, 0.36, (30, 30, 32))


def draw_laptop(pen: Pen, color: Color, pose: str) -> None:
    pen.polygon([(0.16, 0.0), (0.94, 0.0), (0.86, 0.68), (0.1, 0.68)], shade(color, 0.75))
    pen.polygon([(0.22, 0.07), (0.87, 0.07), (0.8, 0.6), (0.17, 0.6)], (150, 198, 226))
    pen.polygon([(0.1, 0.7), (0.86, 0.7), (1.0, 1.0), (0.0, 1.0)], color)


# Backgrounds: details on the band of color that is there


def decorate_sky(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    x = rng.uniform(0.05, 0.8)
    pen.ellipse(x, 0.1, x + 0.13, 0.1 + 0.13 / (pen.box[3] - pen.box[1]), (252, 226, 138))
    for _ in range(2):
        x, y = rng.uniform(0, 0.75), rng.uniform(0.1, 0.5)
        pen.ellipse(x, y, x + 0.2, y + 0.18, (250, 252, 254))
        pen.ellipse(x + 0.06, y - 0.08, x + 0.16, y + 0.14, (250, 252, 254))


def decorate_trees(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    for x in np.arange(0.02, 1.0, 0.14) + rng.uniform(-0.03, 0.03):
        pen.ellipse(x - 0.12, rng.uniform(-0.6, -0.2), x + 0.12, 0.9, shade(color, rng.uniform(0.85, 1.1)))


def decorate_mountains(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    for x in (0.1, 0.45, 0.85):
        x, peak = x + rng.uniform(-0.08, 0.08), rng.uniform(-0.9, -0.3)
        pen.polygon([(x - 0.34, 1.0), (x, peak), (x + 0.34, 1.0)], shade(color, rng.uniform(0.9, 1.05)))
        pen.polygon([(x - 0.09, peak + 0.36), (x, peak), (x + 0.09, peak + 0.36)], (246, 248, 252))


def decorate_buildings(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    left = 0.0
    while left < 1.0:
        width, top = rng.uniform(0.16, 0.26), rng.uniform(-0.3, 0.3)
        pen.rectangle(left, top, left + width, 1.0, shade(color, rng.uniform(0.75, 1.1)))
        for x in np.arange(left + 0.03, left + width - 0.04, 0.06):
            for y in np.arange(top + 0.1, 0.8, 0.22):
                pen.rectangle(x, y, x + 0.03, y + 0.1, (238, 226, 178))
        left += width


def decorate_waves(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    for y in np.arange(0.2, 1.0, 0.26):
        start = rng.uniform(0, 0.6)
        pen.line([(start + step * 0.03, y + 0.03 * (step % 2)) for step in range(9)], (198, 224, 238), 0.03)


def decorate_road(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    for left in np.arange(0.02, 1.0, 0.24) + rng.uniform(-0.02, 0.02):
        pen.rectangle(left, 0.66, left + 0.12, 0.72, (240, 236, 222))


def decorate_ground(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    for _ in range(14):
        x, y = rng.uniform(0, 0.97), rng.uniform(0.05, 0.95)
        pen.ellipse(x, y, x + 0.03, y + 0.03, shade(color, 0.9))


def decorate_window(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    x = rng.uniform(0.06, 0.66)
    pen.rectangle(x, 0.12, x + 0.28, 0.66, (250, 250, 246))
    pen.rectangle(x + 0.02, 0.15, x + 0.26, 0.63, (184, 216, 236))
    pen.line([(x + 0.14, 0.15), (x + 0.14, 0.63)], (250, 250, 246), 0.03)


def decorate_tiles(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    for x in np.arange(0.1, 1.0, 0.2):
        pen.line([(x, 0.0), (x, 1.0)], (222, 228, 226), 0.012)
    for y in (0.25, 0.5, 0.75):
        pen.line([(0.0, y), (1.0, y)], (222, 228, 226), 0.012)


def decorate_planks(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    for y in (0.3, 0.6, 0.88):
        pen.line([(0.0, y), (1.0, y)], (150, 106, 68), 0.012)
