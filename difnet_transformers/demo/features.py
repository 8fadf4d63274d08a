"""Features of a drawn scene in place of the two networks that make the original's.

Each flow lacks what the other has, as the paper says of the real ones (section 1):

* Grid features, in place of grid-feats-vqa's ResNeXt-101: colors and edges of the pixels in each cell and the
  appearance of what is there (pose, man or woman), with noise, mixed at random into 2048 values that are not negative.
  Classes that look alike (dog and cat, bus and truck) are often confused.
* Segmentation features, in place of UPSNet's: from the drawn label map, so class and extent are exact; color and pose
  are not in them.

The features are synthetic, and scores on them say nothing about COCO.
"""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np

from modeling_difnet.segmentation_difnet import pool_channel_map

from .rendering import GRID_SIZE, Drawing, cell_histograms
from .scenes import LOOK_ALIKE, Scene

GRID_FEATURE_SIZE = 2048
APPEARANCE_SIZE, NUM_COLORS, NUM_EDGES, POSITION_SIZE = 64, 27, 6, 4


@cache
def _random_direction(name: str) -> np.ndarray:
    """The vector that stands for a name: (APPEARANCE_SIZE,), of length 1."""
    vector = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(APPEARANCE_SIZE)
    return vector / np.linalg.norm(vector)


@cache
def _projection() -> np.ndarray:
    """The random matrix from what a cell shows to its feature, the same for all scenes."""
    size = NUM_COLORS + NUM_EDGES + APPEARANCE_SIZE + POSITION_SIZE
    return np.random.default_rng(zlib.crc32(b"backbone")).standard_normal((size, GRID_FEATURE_SIZE)) / np.sqrt(8)


def grid_features(scene: Scene, drawing: Drawing, noise: float = 0.12) -> np.ndarray:
    """Grid features of a drawing, float32 (49, 2048), not negative, about half of them zero.

    Each cell has a histogram of 27 colors, edges in six directions (both from the pixels), the appearance of its
    parts and, faintly, its position, as convolutions with padding have it. A part's appearance is the sum of a vector
    that look-alike classes share, a mixture of its class and its look-alike (another mixture in each image), and its
    pose and kind.

    Args:
        scene: seeds the noise.
        drawing: of the scene.
        noise: standard deviation of the noise of each cell's appearance.
    """
    rng = np.random.default_rng([scene.image_id, 4])
    pixels = np.asarray(drawing.image, dtype=np.float32) / 255
    color_bins = np.minimum((pixels * 3).astype(np.int64), 2) @ (9, 3, 1)
    colors = cell_histograms(color_bins, NUM_COLORS)

    along_y, along_x = np.gradient(pixels.mean(axis=-1))
    direction = (np.mod(np.arctan2(along_y, along_x), np.pi) / np.pi * NUM_EDGES).astype(np.int64) % NUM_EDGES
    edges = cell_histograms(direction, NUM_EDGES, weights=np.hypot(along_y, along_x))

    shares = cell_histograms(drawing.part_map, len(drawing.parts))
    appearance = rng.normal(0, noise, (GRID_SIZE, GRID_SIZE, APPEARANCE_SIZE))
    for index, (class_name, kind, pose) in enumerate(drawing.parts):
        look_alike = LOOK_ALIKE.get(class_name, class_name)
        confusion = rng.uniform(0, 0.8)
        vector = _random_direction("family " + min(class_name, look_alike))
        vector = vector + 0.5 * (1 - confusion) * _random_direction(class_name)
        vector = vector + 0.5 * confusion * _random_direction(look_alike)
        if kind:
            vector = vector + 0.5 * _random_direction("pose " + pose)
        if class_name == "person":
            vector = vector + 0.6 * _random_direction("kind " + kind)
        appearance += shares[..., index, None] * vector

    row, column = np.mgrid[:GRID_SIZE, :GRID_SIZE] / GRID_SIZE * np.pi
    position = 0.2 * np.stack([np.sin(row), np.cos(row), np.sin(column), np.cos(column)], axis=-1)
    cells = np.concatenate([1.5 * np.sqrt(colors), 4 * edges, 1.5 * appearance, position], axis=-1)
    return np.maximum(cells.reshape(GRID_SIZE**2, -1) @ _projection(), 0).astype(np.float32)


def segmentation_features(drawing: Drawing) -> np.ndarray:
    """The share of each class in each cell, float32 (133, 7, 7), without an error."""
    return pool_channel_map(drawing.label_map, GRID_SIZE)
