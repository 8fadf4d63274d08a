"""COCO's segmentations as maps of channels: the PNGs of panoptic files, the polygons and run lengths of instances.

The original (mrwu-mac/DIFNet, CVPR 2022) reads segmentation features that its authors made; it has no such code.

pycocotools is not used here, but tests hold run lengths equal to it. Of run lengths that do not add up to the image
it returns memory that was never written, and its polygons differ along their edges (it rounds their corners on a grid
five times as fine); here a pixel belongs to a polygon if its centre lies within.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import numpy as np

from modeling_difnet.segmentation_difnet import CHANNEL_OF_NAME, channel_map, no_channel, normal_name

from ..command_line import requires
from ..files import printable

with requires("images"):
    from PIL import Image

MAX_COORDINATE = 2**24  # of a polygon, in pixels


def channels_of_categories(categories: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """The original's channel for each of the `"categories"` of a COCO file (`{"id": .., "name": ..}`), by name.

    Args:
        categories: all of COCO's panoptic classes, or some: an instance file has the things alone.

    Raises:
        ValueError: a category is no panoptic class, or lacks its id or name.
    """
    channels = {}
    for category in categories:
        if not isinstance(category, Mapping) or not _is_integer(category.get("id")) or "name" not in category:
            raise ValueError(f'a category lacks an integer "id" or a "name": {printable(category, 80)}')
        name = normal_name(str(category["name"]))
        if name not in CHANNEL_OF_NAME:
            raise ValueError(
                f"category {category['id']} ({printable(repr(category['name']), 80)}) is none of COCO's 133 panoptic "
                "classes"
            )
        channels[category["id"]] = CHANNEL_OF_NAME[name]
    return channels


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _channel_of(annotation: Mapping[str, Any], channels: Mapping[int, int]) -> int:
    category: Any = annotation.get("category_id")
    if not _is_integer(category) or category not in channels:
        raise ValueError(f'the category {printable(category, 40)} is not among the "categories" of the file')
    return channels[category]


def panoptic_channel_map(
    segment_image: Image.Image, segments: Iterable[Mapping[str, Any]], channels: Mapping[int, int]
) -> np.ndarray:
    """The map of channels of one image of COCO panoptic.

    Args:
        segment_image: the PNG; a pixel's segment id is red + 256 green + 65536 blue.
        segments: `"segments_info"` of the image's annotation.
        channels: places of the file's categories in the feature, see `channels_of_categories`.

    Returns:
        (height, width), `no_channel` where no segment is.

    Raises:
        ValueError: a segment lacks its id, has a category that `channels` lacks, or no pixel has the id of a segment.
    """
    channel_of = {}
    for segment in segments:
        if not isinstance(segment, Mapping) or not _is_integer(segment.get("id")):
            raise ValueError(f'an entry of "segments_info" lacks an integer "id": {printable(segment, 80)}')
        channel_of[segment["id"]] = _channel_of(segment, channels)
    red, green, blue = np.moveaxis(np.asarray(segment_image.convert("RGB"), dtype=np.int32), -1, 0)
    ids = red + 256 * green + 65536 * blue
    if channel_of and not np.isin(ids, list(channel_of)).any():
        raise ValueError('no pixel has an id of "segments_info": the colours of the label map are not COCO\'s ids')
    return channel_map(ids, channel_of)


def instance_channel_map(
    annotations: Iterable[Mapping[str, Any]], channels: Mapping[int, int], height: int, width: int
) -> np.ndarray:
    """The map of channels of one image of COCO instances; what no instance covers is void.

    Where instances overlap, the smaller one wins (by its pixels; of equal ones the later in the file), because what
    lies in front is mostly smaller. Crowds (`iscrowd`) lie below everything else.

    Args:
        annotations: the image's entries in the file.
        channels: places of the file's categories in the feature, see `channels_of_categories`.
        height, width: of the image, in pixels.

    Returns:
        (height, width), `no_channel` where no instance is.

    Raises:
        ValueError: an annotation has a category that `channels` lacks, or a segmentation that
            `mask_of_segmentation` refuses; the text names the annotation.
    """
    layers = []
    for position, annotation in enumerate(annotations):
        try:
            if not isinstance(annotation, Mapping):
                raise ValueError(f"expected an object, got {printable(annotation, 40)}")
            channel = _channel_of(annotation, channels)
            mask = mask_of_segmentation(annotation.get("segmentation"), height, width)
        except ValueError as error:
            named = annotation.get("id", f"number {position}") if isinstance(annotation, Mapping) else position
            raise ValueError(f"annotation {printable(named, 40)}: {error}") from None
        layers.append((not annotation.get("iscrowd", 0), -int(mask.sum()), channel, mask))
    result = np.full((height, width), no_channel(channels.values()))
    for _, _, channel, mask in sorted(layers, key=lambda layer: layer[:2]):
        result[mask] = channel
    return result


def mask_of_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The pixels of one instance: bool (height, width).

    Args:
        segmentation: run lengths, compressed or not, or a list whose parts together are the instance: polygons, and
            run lengths too. A list of numbers is one polygon.
        height, width: of the image, in pixels.

    Raises:
        ValueError: none of these; run lengths of another size, or that do not add up to it; a polygon with an odd
            number of values, or with values that are no finite numbers.
    """
    if isinstance(segmentation, Mapping):
        return _mask_of_run_lengths(segmentation, height, width)
    if not isinstance(segmentation, list | tuple):
        raise ValueError(f"its segmentation is {printable(segmentation, 40)}, neither polygons nor run lengths")
    if segmentation and not any(isinstance(part, list | tuple | Mapping) for part in segmentation):
        segmentation = [segmentation]
    mask = np.zeros((height, width), dtype=bool)
    for part in segmentation:
        if isinstance(part, Mapping):
            mask |= _mask_of_run_lengths(part, height, width)
            continue
        if not isinstance(part, list | tuple) or not all(_is_coordinate(value) for value in part):
            raise ValueError(f"a polygon is no list of finite numbers: {printable(part, 40)}")
        if len(part) % 2:
            raise ValueError(f"a polygon has {len(part)} values, which are no pairs")
        mask |= mask_of_polygon(np.array(part, dtype=np.float64).reshape(-1, 2), height, width)
    return mask


def _is_coordinate(value: object) -> bool:
    # A comparison with NaN is false.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_COORDINATE


def _mask_of_run_lengths(segmentation: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise ValueError(f"run lengths are of {printable(size, 40)}, the image of {[height, width]}")
    if isinstance(counts, str):
        counts = _uncompressed_counts(counts)
    if not isinstance(counts, list | tuple) or not all(_is_integer(count) for count in counts):
        raise ValueError(f"the counts of run lengths are {printable(counts, 40)}, no list of integers")
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(
            f"run lengths add up to {printable(sum(counts), 40)}, the image has {height * width} pixels"
            if min(counts, default=0) >= 0
            else "run lengths are negative"
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def mask_of_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels whose centres lie within a polygon, by the even-odd rule: bool (height, width).

    Args:
        points: (N, 2), x and y of the corners; pixel (0, 0) covers the square from 0 to 1.
        height, width: of the image, in pixels.
    """
    # Every edge that crosses the line through the centres of a row flips all pixels to the right of the crossing.
    flips = np.zeros((height, width + 1), dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y0 > y1:
            x0, y0, x1, y1 = x1, y1, x0, y0
        rows = np.arange(np.clip(np.ceil(y0 - 0.5), 0, height), np.clip(np.ceil(y1 - 0.5), 0, height), dtype=np.int64)
        if len(rows):
            crossings = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
            flips[rows, np.clip(np.ceil(crossings - 0.5), 0, width).astype(np.int64)] ^= True
    return np.logical_xor.accumulate(flips, axis=1)[:, :width]


def _uncompressed_counts(text: str) -> list[int]:
    """COCO's string of run lengths: five bits a character, from the third on as differences to the one before last."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("the text of run lengths is damaged")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("the text of run lengths ends within a number")
    return counts
