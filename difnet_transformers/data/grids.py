"""Features in the size asked for: grids padded, pooled or cut, and the shape of segmentation features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .errors import GridSizeError
from .normalization import show


def grid_shape(grid_size: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a grid that may be given by the cells along a side."""
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    return rows, columns


def grid_text(grid_size: int | Sequence[int]) -> str:
    """A grid's size in words, such as `7 x 7`."""
    return " x ".join(map(str, grid_shape(grid_size)))


def fit_grid(
    array: np.ndarray, grid_size: int | Sequence[int], width: int, fit: str = "refuse"
) -> tuple[np.ndarray, int]:
    """Grid features in the size asked for.

    Args:
        array: (N, width) cells row by row, or an unpooled (width, H, W), which is averaged.
        grid_size: cells along a side, or rows and columns.
        width: values of a cell.
        fit: what becomes of a square grid of another size: "refuse" a larger one and pad a smaller one with zeros at
            its end, "pool" (average) it to the size asked for, or "cut" a larger one to its first cells and pad a
            smaller one, as the original implementation does.

    Returns:
        Float32 (cells, width), and the number of cells that are not padded.

    Raises:
        ValueError: another shape, or a grid that does not fit; the text says what to do.
    """
    shape = grid_shape(grid_size)
    cells = math.prod(shape)
    is_map = array.ndim == 3 and array.shape[0] == width
    if not (is_map or (array.ndim == 2 and array.shape[1] == width)) or not array.size:
        raise ValueError(f"expected the shape (cells, {width}) or ({width}, height, width), got {show(array.shape)}")
    if is_map:
        return average_pool(_as_float32(array), shape), cells
    side = math.isqrt(len(array))
    if len(array) != cells and fit == "pool":
        if side**2 != len(array):
            raise GridSizeError(
                f"{len(array)} cells are no square grid, so that --pool cannot know their height and width; give "
                f"unpooled maps ({width}, height, width)"
            )
        return average_pool(_as_float32(array).T.reshape(width, side, side), shape), cells
    if len(array) > cells and fit != "cut":
        raise GridSizeError(_too_many_cells(len(array), side, shape))
    grid = _as_float32(array[:cells])
    padded = np.zeros((cells, width), dtype=np.float32)
    padded[: len(grid)] = grid
    return padded, len(grid)


def _too_many_cells(count: int, side: int, shape: tuple[int, int]) -> str:
    size = grid_text(shape)
    cut = f"--cut (keeps the first {math.prod(shape)} cells, the upper part of the image, as the original does)"
    if side**2 == count:
        return (
            f"a grid of {side} x {side} cells where {size} are asked for; give --grid-size {side} "
            f"(keeps all {count} cells), --pool (averages them to {size}) or {cut}"
        )
    return (
        f"{count} cells, which are no square grid (regions of a detector, or height and width differ), where "
        f"{size} are asked for; give grids of that size, unpooled maps, or {cut}"
    )


def average_pool(feature_map: np.ndarray, grid_size: int | Sequence[int]) -> np.ndarray:
    """Adaptive average pooling, as `torch.nn.functional.adaptive_avg_pool2d`, with the cells row by row.

    The mean over a rectangle is the mean over its rows of the means over its columns, so two small matrices do it.

    Args:
        feature_map: (C, H, W).
        grid_size: cells along a side, or rows and columns.

    Returns:
        (rows * columns, C).
    """
    rows, columns = map(_pooling_matrix, feature_map.shape[1:], grid_shape(grid_size))
    return (rows @ feature_map @ columns.T).reshape(len(feature_map), -1).T


def _pooling_matrix(length: int, size: int) -> np.ndarray:
    matrix = np.zeros((size, length), dtype=np.float32)
    for cell in range(size):
        start, stop = cell * length // size, -(-(cell + 1) * length // size)
        matrix[cell, start:stop] = 1 / (stop - start)
    return matrix


def _as_float32(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "f":
        raise ValueError(f"expected floating point numbers, got {array.dtype}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise ValueError("NaN or infinity among the values")
    return array


def check_segmentation(array: np.ndarray, expected: tuple[int, int, int]) -> np.ndarray:
    """Segmentation features as float32.

    Args:
        array: floating point numbers.
        expected: (classes, height, width).

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if array.shape != expected:
        raise ValueError(f"expected the shape {expected}, got {show(array.shape)}")
    return _as_float32(array)
