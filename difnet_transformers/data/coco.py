"""COCO's JSON files of images: captions, instances, panoptic; also the images of Karpathy's split files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..files import printable, read_json
from .errors import BrokenImage, DataError, Problem
from .normalization import (
    LARGEST_SIDE,
    entry_label,
    normalize_file_name,
    normalize_image_id,
    normalize_side,
    show,
)


class CocoImage(NamedTuple):
    """An entry of "images". `size` is (width, height) in pixels, `None` where the file does not say it."""

    image_id: int
    file_name: str
    size: tuple[int, int] | None


@dataclass
class CocoFile:
    """What one COCO file says: its images, and for each what it is annotated with.

    Attributes:
        path: the file.
        images: by image id.
        categories: names by category id.
        problems: entries that cannot be used, and why; those of images that are in `images` are in `broken` too.
        broken: reasons by image id.
    """

    path: Path
    images: dict[int, CocoImage]
    categories: dict[int, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)
    _annotations: dict[int, list[dict]] = field(default_factory=dict)

    def annotations(self, image_id: int) -> list[dict]:
        """The annotations of an image, in the order of the file; ids and categories are integers.

        Of instances, `"segmentation"` is what `normalize_segmentation` makes of it. Of panoptic, `"file_name"` is
        normalized and `"segments_info"` a list of objects.

        Raises:
            BrokenImage: one of them cannot be used. The text names the file, the image and the annotation, and what
                to do.
        """
        if image_id in self.broken:
            raise BrokenImage(self.path, f"image {image_id}: {self.broken[image_id]}")
        result = []
        for position, annotation in enumerate(self._annotations.get(image_id, [])):
            place = f"annotation {show(annotation.get('id', position))}"
            try:
                if "segments_info" in annotation:
                    result.append(self._panoptic(annotation, image_id))
                else:
                    segmentation = normalize_segmentation(annotation.get("segmentation"))
                    result.append(
                        {**self._categorized(annotation), "segmentation": segmentation, "image_id": image_id}
                    )
            except ValueError as error:
                raise BrokenImage(self.path, f"image {image_id}: {place}: {error}") from None
        return result

    def _panoptic(self, annotation: dict, image_id: int) -> dict:
        segments = annotation["segments_info"]
        if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
            raise ValueError('"segments_info" is no list of objects')
        segments = [
            {**self._categorized(segment), "id": normalize_image_id(segment.get("id"))} for segment in segments
        ]
        name = normalize_file_name(annotation.get("file_name"))
        return {**annotation, "image_id": image_id, "file_name": name, "segments_info": segments}

    def _categorized(self, annotation: dict) -> dict:
        try:
            category = normalize_image_id(annotation.get("category_id"))
        except ValueError:
            raise ValueError(
                f'"category_id" is {show(annotation.get("category_id"))}; it must be the integer "id" of a category'
            ) from None
        if category not in self.categories:
            raise ValueError(
                f'the category {category} is not among the {len(self.categories)} "categories" of the file; add it '
                "there, or remove the annotation"
            )
        crowd = annotation.get("iscrowd") or 0
        return {**annotation, "category_id": category, "iscrowd": int(crowd in (1, True, "1"))}


def read_images(path: str | os.PathLike) -> CocoFile:
    """The images that a JSON file lists: a COCO file of any kind, or one of Karpathy's split files.

    Raises:
        ValueError: it is no such file; the text names it.
        OSError: it cannot be read.
    """
    # Annotations are dropped as they are read, because those of COCO take gigabytes as Python objects.
    return _read_entries(Path(path), read_json(path, _without_annotations))


def _without_annotations(entry: dict) -> dict | None:
    if "image_id" in entry or "raw" in entry:
        return None
    entry.pop("annotations", None)
    return entry


def read_instances(path: str | os.PathLike) -> CocoFile:
    """COCO's `instances_*.json`: images, categories, and annotations with polygons or run lengths.

    Raises:
        ValueError: it is no such file; the text names it.
        OSError: it cannot be read.
    """
    return _read_annotated(Path(path), "segmentation")


def read_panoptic(path: str | os.PathLike) -> CocoFile:
    """COCO's `panoptic_*.json`: images, categories, and annotations with `"segments_info"`.

    Raises:
        ValueError: it is no such file; the text names it.
        OSError: it cannot be read.
    """
    return _read_annotated(Path(path), "segments_info")


def _read_annotated(path: Path, key: str) -> CocoFile:
    content = read_json(path)
    file = _read_entries(path, content)
    kind = {"segmentation": "instances", "segments_info": "panoptic"}[key]
    for name in ("categories", "annotations"):
        if not isinstance(content.get(name), list):
            raise DataError(f'{printable(path)}: not a COCO file of {kind}: it has no list "{name}"')
    for position, category in enumerate(content["categories"]):
        try:
            file.categories[normalize_image_id(category["id"])] = str(category["name"])
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f'{printable(path)}: entry {position} of "categories" lacks an integer "id" or a "name"'
            ) from None
    if content["annotations"] and not any(isinstance(each, dict) and key in each for each in content["annotations"]):
        raise DataError(f'{printable(path)}: not a COCO file of {kind}: no annotation has "{key}"')
    for position, annotation in enumerate(content["annotations"]):
        try:
            if not isinstance(annotation, dict):
                raise ValueError(f"expected an object, got {show(annotation)}")
            image_id = normalize_image_id(annotation.get("image_id"))
            file._annotations.setdefault(image_id, []).append(annotation)
        except ValueError as error:
            named = annotation.get("image_id") if isinstance(annotation, dict) else None
            file.problems.append(Problem(printable(path), f"an annotation: {error}", entry_label(named, position)))
            continue
        if key not in annotation:
            file.broken.setdefault(image_id, f'annotation {show(annotation.get("id", position))} has no "{key}"')
    return file


def _read_entries(path: Path, content: Any) -> CocoFile:
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f'{printable(path)}: not a COCO file: it has no list "images"')
    file = CocoFile(path, {})
    for position, entry in enumerate(content["images"]):
        if not isinstance(entry, dict):
            entry = {}
        # Karpathy's files have other keys. An entry of COCO's may have `coco_url` and the like, but none of these.
        id_key = next((key for key in ("id", "cocoid", "imgid") if key in entry), "id")
        written = entry.get(id_key)
        try:
            image_id = normalize_image_id(written)
        except ValueError:
            what = f'an entry of "images" lacks an integer "{id_key}"'
            file.problems.append(Problem(printable(path), what, entry_label(written, position)))
            continue
        if image_id in file.images or image_id in file.broken:
            raise DataError(f"{printable(path)}: duplicate image id {image_id}")
        try:
            name = normalize_file_name(entry.get("file_name", entry.get("filename")))
            sides = entry.get("width"), entry.get("height")
            size = None if None in sides else (normalize_side(sides[0]), normalize_side(sides[1]))
        except ValueError as error:
            file.broken[image_id] = str(error)
            file.problems.append(Problem(printable(path), str(error), image_id))
        else:
            file.images[image_id] = CocoImage(image_id, name, size)
    return file


def merge_images(files: Iterable[CocoFile]) -> dict[int, CocoImage]:
    """The images of several files by id. Of names that say the same file the longer one, which says its folder, stays.

    Raises:
        DataError: an id belongs to two files, or one name has two ids.
    """
    images: dict[int, CocoImage] = {}
    place: dict[int, Path] = {}
    id_of: dict[str, int] = {}
    for file in files:
        for image in file.images.values():
            known = images.setdefault(image.image_id, image)
            place.setdefault(image.image_id, file.path)
            longer, shorter = sorted((known.file_name, image.file_name), key=len, reverse=True)
            if longer != shorter and not longer.endswith(f"/{shorter}"):
                raise DataError(
                    f"{printable(file.path)}: image {image.image_id} is {show(image.file_name)} here and "
                    f"{show(known.file_name)} in {printable(place[image.image_id])}"
                )
            images[image.image_id] = CocoImage(image.image_id, longer, known.size or image.size)
            other = id_of.setdefault(image.file_name, image.image_id)
            if other != image.image_id:
                raise DataError(
                    f"{printable(file.path)}: {show(image.file_name)} has the id {image.image_id} here and the id "
                    f"{other} in {printable(place[other])}"
                )
    return images


def normalize_segmentation(value: Any) -> dict | list:
    """The segmentation of an instance in one of COCO's two forms.

    Args:
        value: polygons, one flat polygon, run lengths, or a list that holds run lengths.

    Returns:
        Run lengths `{"size": [height, width], "counts": list of integers or text}`, or a list of parts that together
        are the instance: polygons (lists of x and y in turn), and run lengths where there are several.

    Raises:
        ValueError: it is none of these, or empty; the text says what to do.
    """
    if value is None or value in ([], {}, ""):
        raise ValueError(
            f'"segmentation" is {show(value)}, so that nobody knows its pixels; draw it, or remove the annotation'
        )
    if isinstance(value, Mapping):
        return _run_lengths(value)
    if not isinstance(value, list):
        raise ValueError(f'"segmentation" is {show(value)}, neither polygons nor run lengths')
    value = [part for part in value if part != []]
    if not value:
        raise ValueError('"segmentation" holds empty polygons alone; draw it, or remove the annotation')
    are_points = len(value) > 2 and all(isinstance(part, list) and len(part) == 2 for part in value)
    if are_points or not any(isinstance(part, list | Mapping) for part in value):
        return [_polygon(value)]
    parts = [_run_lengths(part) if isinstance(part, Mapping) else _polygon(part) for part in value]
    return parts[0] if len(parts) == 1 and isinstance(parts[0], dict) else parts


def _polygon(points: Any) -> list[float]:
    if isinstance(points, list) and points and all(isinstance(point, list) and len(point) == 2 for point in points):
        points = [number for point in points for number in point]
    is_numbers = isinstance(points, list) and all(
        isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= LARGEST_SIDE
        for number in points
    )
    if not is_numbers:  # a comparison with NaN is false, so NaN is among what is refused
        raise ValueError(f"a polygon is no list of finite numbers: {show(points)}")
    if len(points) % 2:
        raise ValueError(f"a polygon has {len(points)} values, which are no pairs")
    return points


def _run_lengths(value: Mapping) -> dict[str, Any]:
    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, list) or len(size) != 2:
        raise ValueError(f'run lengths have the "size" {show(size)} in place of [height, width]')
    size = [normalize_side(side) for side in size]
    if isinstance(counts, list):
        if not all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts):
            raise ValueError('the "counts" of run lengths are no list of integers from 0')
    elif not isinstance(counts, str) or not all("0" <= character <= "o" for character in counts):
        raise ValueError(f'run lengths have the "counts" {show(counts)}, which are neither a list nor COCO\'s text')
    return {"size": size, "counts": counts}
