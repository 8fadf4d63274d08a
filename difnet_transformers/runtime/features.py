"""Features of images to the inputs of the exported graphs, as `DifnetFeatureExtractor` (processing_difnet.py) does.

Wrong shapes, NaN and differing numbers of images are a ValueError that names the image. Grids with fewer cells than
the captioner's are padded and masked. `DifnetFeatureExtractor` needs torch and Transformers; tests hold the two
against each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..files import printable


def make_batch(grid_features: Any, segmentation_features: Any, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One batch of inputs; equals what the processor makes.

    Args:
        grid_features: one image (N, grid_feature_size), several, or a list of images whose N may differ.
        segmentation_features: one image (num_segmentation_classes, rows, columns), several, or None.
        settings: of the feature extractor: `grid_size`, `grid_feature_size`, `num_segmentation_classes`,
            `mask_padded_cells`, `cut_large_grids`.

    Returns:
        `grid_features` (B, cells, grid_feature_size), `segmentation_features` (B, num_segmentation_classes, rows,
        columns) and, where a grid was padded and `mask_padded_cells`, `grid_attention_mask` (B, cells).

    Raises:
        ValueError: features of another shape, NaN or infinity, no image, or differing numbers of images.
    """
    sides = settings["grid_size"]
    rows, columns = (sides, sides) if isinstance(sides, int) else (sides[0], sides[-1])
    cells, width = rows * columns, settings["grid_feature_size"]
    grids = as_images(grid_features, 2, "grid_features", f"(cells, {width})")
    batch = np.zeros((len(grids), cells, width), np.float32)
    mask = np.zeros((len(grids), cells), np.int64)
    for index, grid in enumerate(grids):
        where = f"grid_features of image {index}"
        if grid.ndim != 2 or grid.shape[1] != width or len(grid) == 0:
            raise ValueError(f"{where}: expected (cells, {width}), got {grid.shape}.")
        if len(grid) > cells and not settings["cut_large_grids"]:
            raise ValueError(
                f"{where}: {len(grid)} cells, but the grid of this captioner is {rows} x {columns}. Average them to "
                f"{rows} x {columns}, or use another checkpoint."
            )
        kept = min(len(grid), cells)
        batch[index, :kept], mask[index, :kept] = grid[:kept], 1
        check_finite(batch[index], where)
    inputs = {"grid_features": batch}
    if segmentation_features is not None:
        shape = (settings["num_segmentation_classes"], rows, columns)
        maps = as_images(segmentation_features, 3, "segmentation_features", str(shape))
        if len(maps) != len(grids):
            raise ValueError(
                f"grid_features holds {len(grids)} images and segmentation_features {len(maps)}; both need the same "
                "images in the same order."
            )
        for index, each in enumerate(maps):
            where = f"segmentation_features of image {index}"
            if each.shape != shape:
                raise ValueError(f"{where}: expected {shape}, got {each.shape}.")
            check_finite(each, where)
        inputs["segmentation_features"] = np.stack(maps).astype(np.float32)
    if settings["mask_padded_cells"] and not mask.all():
        inputs["grid_attention_mask"] = mask
    return inputs


def as_images(value: Any, image_ndim: int, name: str, expected: str) -> list[np.ndarray]:
    """The images in `value`: one array of `image_ndim` dimensions, a batch with one dimension more, or a list."""
    if isinstance(value, list | tuple) and value and np.ndim(value[0]) == image_ndim:
        return [as_array(each, f"{name} of image {index}") for index, each in enumerate(value)]
    array = as_array(value, name)
    if array.ndim not in (image_ndim, image_ndim + 1):
        raise ValueError(f"{name}: expected {expected} for one image or (images, ...) for many, got {array.shape}.")
    if array.ndim == image_ndim:
        return [array]
    if len(array) == 0:
        raise ValueError(f"{name} holds no image; expected at least one of shape {expected}.")
    return list(array)


def as_array(value: Any, name: str) -> np.ndarray:
    """Numbers as an array.

    Raises:
        ValueError: it is none.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {type(value).__name__} makes no array ({printable(str(error))}).") from None
    if array.dtype.kind not in "fiub":
        raise ValueError(
            f"{name}: expected numbers, got {type(value).__name__} of type {printable(array.dtype)}; this captioner "
            "takes features, not images: difnet extract makes features of images."
        )
    return array


def check_finite(array: np.ndarray, name: str) -> None:
    """Raises ValueError for NaN and infinity."""
    if not np.isfinite(array).all():
        where = tuple(int(axis[0]) for axis in np.nonzero(~np.isfinite(array)))
        raise ValueError(f"{name}: expected finite numbers, got {array[where]} at {where}.")


def check_features(
    config: Mapping[str, Any],
    grid_features: Any,
    segmentation_features: Any,
    grid_attention_mask: Any,
    segmentation_attention_mask: Any,
) -> dict[str, np.ndarray]:
    """The encoder's inputs.

    Args:
        config: content of config.json.
        grid_features: (B, cells, grid_feature_size), any number of cells.
        segmentation_features: (B, num_segmentation_classes, rows, columns); `None` for the baseline, which ignores
            it.
        grid_attention_mask, segmentation_attention_mask: (B, cells), 0 for cells that are not looked at; all are by
            default.

    Raises:
        ValueError: they are missing, misshapen, or hold NaN or infinity.
    """
    grid = as_array(grid_features, "grid_features")
    width = config["grid_feature_size"]
    if grid.ndim != 3 or grid.shape[2] != width or 0 in grid.shape[:2]:
        raise ValueError(f"`grid_features` must have the shape (batch, cells, {width}), got {grid.shape}.")
    shape = grid.shape[:2]
    inputs = {
        "grid_features": grid.astype(np.float32, order="C"),
        "grid_attention_mask": check_mask(grid_attention_mask, "grid_attention_mask", shape),
    }
    check_each_finite(inputs["grid_features"], "grid_features")
    if not config["use_segmentation"]:
        return inputs
    classes = config["num_segmentation_classes"]
    if segmentation_features is None:
        raise ValueError(
            f"`segmentation_features` are missing: this captioner reads two flows. Pass the (batch, {classes}, "
            "height, width) class shares of the same images."
        )
    shares = as_array(segmentation_features, "segmentation_features")
    if shares.ndim != 4 or shares.shape[1] != classes:
        raise ValueError(
            f"`segmentation_features` must have the shape (batch, {classes}, height, width), got {shares.shape}."
        )
    if (len(shares), math.prod(shares.shape[2:])) != shape:
        raise ValueError(
            f"The two flows must show the same images on the same grid: `grid_features` has {shape[0]} images of "
            f"{shape[1]} cells, `segmentation_features` {len(shares)} of {math.prod(shares.shape[2:])} "
            f"({shares.shape[2]} x {shares.shape[3]})."
        )
    flat = shares.reshape(len(shares), classes, -1).astype(np.float32, order="C")
    check_each_finite(flat, "segmentation_features")
    mask = check_mask(segmentation_attention_mask, "segmentation_attention_mask", shape)
    return inputs | {"segmentation_features": flat, "segmentation_attention_mask": mask}


def check_each_finite(batch: np.ndarray, name: str) -> None:
    """`check_finite` for a batch, which names the image."""
    if not np.isfinite(batch).all():
        for index, each in enumerate(batch):
            check_finite(each, f"{name} of image {index}")


def check_mask(mask: Any, name: str, shape: Sequence[int]) -> np.ndarray:
    """A mask of cells (B, cells), bool; all `True` by default."""
    if mask is None:
        return np.ones(shape, bool)
    array = as_array(mask, name)
    if array.shape != tuple(shape):
        raise ValueError(
            f"`{name}` has shape {array.shape}, but the features have {tuple(shape)} (images, cells): give one number "
            "for each cell."
        )
    return array != 0
