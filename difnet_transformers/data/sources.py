"""The files that COCO's captions and the original's features come in, and the pictures. The other programs read them.

Annotations: the original's four `.npy` id files beside COCO's two files of 2014, Karpathy's `dataset_coco.json` (and
his Flickr files), or COCO caption files named for their splits. COCO's instances and panoptic files. Features: the
original's HDF5 file, RSTNet's, DLCT's, or unpooled maps.

Types are made equal here, for every program alike: ids are integers, sizes are integers, file names are relative and
have slashes, whatever the tool that wrote the file made of them.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..command_line import requires
from ..files import check_regular_file, path_inside, printable, read_file, read_json

if TYPE_CHECKING:
    import h5py

ORIGINAL_IDS = {"train": "train", "restval": "restval", "validation": "dev", "test": "test"}
KARPATHY_FILES = ("dataset_coco.json", "dataset_flickr8k.json", "dataset_flickr30k.json")
SPLIT_NAMES = {"val": "validation", "dev": "validation"}
LARGEST_ID = 2**63 - 1
LARGEST_SIDE = 2**31 - 1
ARRAY_SIZE_LIMIT = 2**30  # bytes of one image's array; an unpooled map of a large image takes 30 MB
LINES_OF_A_MISTAKE = 50
IDS_OF_A_LINE = 100


class PackingError(ValueError):
    """A mistake in the input; its text names the file and the images."""


class Problem(NamedTuple):
    """Why one image cannot be used. `what` is equal for all images with the same problem.

    `image_id` is a text where an entry has no id that could be used: its id as written, made printable.
    """

    source: str
    what: str
    image_id: int | str


class BrokenImage(ValueError):
    """One image cannot be used; the others can."""

    def __init__(self, source: str | os.PathLike, what: str):
        super().__init__(source, what)
        self.source = printable(source, 300)
        self.what = printable(" ".join(what.split()), 400)

    def __str__(self) -> str:
        return f"{self.source}: {self.what}"


class GridDoesNotFit(ValueError):
    """A grid of another size than the one asked for."""


def raise_for(problems: list[Problem]) -> None:
    """PackingError with one line for each kind of problem, listing all its images; nothing if there is none."""
    grouped: dict[tuple[str, str], list[int | str]] = {}
    for problem in problems:
        grouped.setdefault((problem.source, problem.what), []).append(problem.image_id)
    lines = []
    for (source, what), ids in grouped.items():
        ids = sorted(set(ids), key=_by_number)
        for start in range(0, len(ids), IDS_OF_A_LINE):
            lines.append(f"{source}: {what}: image {listed(ids[start : start + IDS_OF_A_LINE])}")
    if lines:
        rest = len(lines) - LINES_OF_A_MISTAKE
        lines = lines[:LINES_OF_A_MISTAKE] + ([f"and {rest:,} lines more"] if rest > 0 else [])
        raise PackingError(
            "\n".join(lines) + "\n(--skip-missing leaves these images out and says so in provenance.json)"
        )


def _by_number(image_id: int | str) -> tuple[bool, int | str]:
    return isinstance(image_id, str), image_id


# Ids, sizes and names, whatever the tool that wrote them made of them


def normalized_image_id(value: Any) -> int:
    """An id as an integer: 7 for 7 and for "7".

    Raises:
        ValueError: it is no integer from 0 to 2^63 - 1 and no text of digits. Ids become parts of file names, so
            nothing else is taken.
    """
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,30}\s*", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_ID:
        raise ValueError(f"{_shown(value)} is no id; ids are integers from 0, or texts of digits")
    return value


def normalized_side(value: Any) -> int:
    """The width or height of an image in pixels, from an integer, a float without a fraction, or a text of digits.

    Raises:
        ValueError: it is no whole number from 1.
    """
    number = value
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,10}(\.0*)?\s*", value):
        number = int(value.split(".")[0])
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= LARGEST_SIDE:
        raise ValueError(f"{_shown(value)} is no width or height; write whole numbers of pixels")
    return number


def normalized_file_name(name: Any) -> str:
    """The name of an image file, relative and with slashes: `images/158.jpg` for `..\\images\\.\\158.jpg`.

    Drives, leading slashes and steps upwards are left out, so that the result never leads out of a folder. Composed
    and decomposed letters (as macOS writes them) become the same.

    Raises:
        ValueError: `name` is no text, or nothing of it is left.
    """
    if not isinstance(name, str) or "\0" in name:
        raise ValueError(f"{_shown(name)} is no file name")
    parts: list[str] = []
    for part in re.sub(r"^[A-Za-z]:", "", name.strip().replace("\\", "/")).split("/"):
        if part == ".." and parts:
            parts.pop()
        elif part not in ("", ".", ".."):
            parts.append(part)
    if not parts:
        raise ValueError(f"{_shown(name)} is no file name")
    return unicodedata.normalize("NFC", "/".join(parts))


def normalized_caption(caption: Any) -> str:
    """A caption as it is written in a file, without line ends on its right and the blanks around them.

    Blanks alone, within and at the end, stay: the original implementation keeps them as well.

    Raises:
        ValueError: it is no text, or has characters that UTF-8 cannot encode.
    """
    if not isinstance(caption, str):
        raise ValueError(f"a caption is no text but {_shown(caption)}")
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise ValueError("a caption holds half a character (a lone surrogate); write it anew") from None
    return re.sub(r"\s*[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]\s*\Z", "", caption)


def _shown(value: Any) -> str:
    """A value of a JSON file as JSON writes it, one line of bounded length."""
    names = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return names[value]
    return printable(repr(value) if isinstance(value, str) and len(value) < 1000 else value, 80)


def _label(written: Any, position: int) -> str:
    """What stands for the id of an entry that has none."""
    return f"{_shown(written)} (entry {position})"


# COCO files: which images, and what they are annotated with


class CocoImage(NamedTuple):
    """An entry of "images". `size` is (width, height) in pixels, None where the file does not say it."""

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

        Of instances, `"segmentation"` is what `normalized_segmentation` makes of it. Of panoptic, `"file_name"` is
        normalized and `"segments_info"` a list of objects.

        Raises:
            BrokenImage: one of them cannot be used. The text names the file, the image and the annotation, and what
                to do.
        """
        if image_id in self.broken:
            raise BrokenImage(self.path, f"image {image_id}: {self.broken[image_id]}")
        result = []
        for position, annotation in enumerate(self._annotations.get(image_id, [])):
            place = f"annotation {_shown(annotation.get('id', position))}"
            try:
                if "segments_info" in annotation:
                    result.append(self._panoptic(annotation, image_id))
                else:
                    segmentation = normalized_segmentation(annotation.get("segmentation"))
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
            {**self._categorized(segment), "id": normalized_image_id(segment.get("id"))} for segment in segments
        ]
        name = normalized_file_name(annotation.get("file_name"))
        return {**annotation, "image_id": image_id, "file_name": name, "segments_info": segments}

    def _categorized(self, annotation: dict) -> dict:
        try:
            category = normalized_image_id(annotation.get("category_id"))
        except ValueError:
            raise ValueError(
                f'"category_id" is {_shown(annotation.get("category_id"))}; it must be the integer "id" of a category'
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
    return _images_of(Path(path), read_json(path, _without_annotations))


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
    file = _images_of(path, content)
    kind = {"segmentation": "instances", "segments_info": "panoptic"}[key]
    for name in ("categories", "annotations"):
        if not isinstance(content.get(name), list):
            raise PackingError(f'{printable(path)}: not a COCO file of {kind}: it has no list "{name}"')
    for position, category in enumerate(content["categories"]):
        try:
            file.categories[normalized_image_id(category["id"])] = str(category["name"])
        except (KeyError, TypeError, ValueError):
            raise PackingError(
                f'{printable(path)}: entry {position} of "categories" lacks an integer "id" or a "name"'
            ) from None
    if content["annotations"] and not any(isinstance(each, dict) and key in each for each in content["annotations"]):
        raise PackingError(f'{printable(path)}: not a COCO file of {kind}: no annotation has "{key}"')
    for position, annotation in enumerate(content["annotations"]):
        try:
            if not isinstance(annotation, dict):
                raise ValueError(f"expected an object, got {_shown(annotation)}")
            image_id = normalized_image_id(annotation.get("image_id"))
            file._annotations.setdefault(image_id, []).append(annotation)
        except ValueError as error:
            named = annotation.get("image_id") if isinstance(annotation, dict) else None
            file.problems.append(Problem(printable(path), f"an annotation: {error}", _label(named, position)))
            continue
        if key not in annotation:
            file.broken.setdefault(image_id, f'annotation {_shown(annotation.get("id", position))} has no "{key}"')
    return file


def _images_of(path: Path, content: Any) -> CocoFile:
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise PackingError(f'{printable(path)}: not a COCO file: it has no list "images"')
    file = CocoFile(path, {})
    for position, entry in enumerate(content["images"]):
        if not isinstance(entry, dict):
            entry = {}
        # Karpathy's files have other keys. An entry of COCO's may have `coco_url` and the like, but none of these.
        id_key = next((key for key in ("id", "cocoid", "imgid") if key in entry), "id")
        written = entry.get(id_key)
        try:
            image_id = normalized_image_id(written)
        except ValueError:
            what = f'an entry of "images" lacks an integer "{id_key}"'
            file.problems.append(Problem(printable(path), what, _label(written, position)))
            continue
        if image_id in file.images or image_id in file.broken:
            raise PackingError(f"{printable(path)}: duplicate image id {image_id}")
        try:
            name = normalized_file_name(entry.get("file_name", entry.get("filename")))
            sides = entry.get("width"), entry.get("height")
            size = None if None in sides else (normalized_side(sides[0]), normalized_side(sides[1]))
        except ValueError as error:
            file.broken[image_id] = str(error)
            file.problems.append(Problem(printable(path), str(error), image_id))
        else:
            file.images[image_id] = CocoImage(image_id, name, size)
    return file


def normalized_segmentation(value: Any) -> dict | list:
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
            f'"segmentation" is {_shown(value)}, so that nobody knows its pixels; draw it, or remove the annotation'
        )
    if isinstance(value, Mapping):
        return _run_lengths(value)
    if not isinstance(value, list):
        raise ValueError(f'"segmentation" is {_shown(value)}, neither polygons nor run lengths')
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
        raise ValueError(f"a polygon is no list of finite numbers: {_shown(points)}")
    if len(points) % 2:
        raise ValueError(f"a polygon has {len(points)} values, which are no pairs")
    return points


def _run_lengths(value: Mapping) -> dict:
    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, list) or len(size) != 2:
        raise ValueError(f'run lengths have the "size" {_shown(size)} in place of [height, width]')
    size = [normalized_side(side) for side in size]
    if isinstance(counts, list):
        if not all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts):
            raise ValueError('the "counts" of run lengths are no list of integers from 0')
    elif not isinstance(counts, str) or not all("0" <= character <= "o" for character in counts):
        raise ValueError(f'run lengths have the "counts" {_shown(counts)}, which are neither a list nor COCO\'s text')
    return {"size": size, "counts": counts}


def listed_images(files: Iterable[CocoFile]) -> dict[int, CocoImage]:
    """The images of several files by id. Of names that say the same file the longer one, which says its folder, stays.

    Raises:
        PackingError: an id belongs to two files, or one name has two ids.
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
                raise PackingError(
                    f"{printable(file.path)}: image {image.image_id} is {_shown(image.file_name)} here and "
                    f"{_shown(known.file_name)} in {printable(place[image.image_id])}"
                )
            images[image.image_id] = CocoImage(image.image_id, longer, known.size or image.size)
            other = id_of.setdefault(image.file_name, image.image_id)
            if other != image.image_id:
                raise PackingError(
                    f"{printable(file.path)}: {_shown(image.file_name)} has the id {image.image_id} here and the id "
                    f"{other} in {printable(place[other])}"
                )
    return images


class ImageMatches(NamedTuple):
    """Which file is which image. `missing` are ids without a file, `problems` those with more than one that fits."""

    paths: dict[int, Path]
    missing: list[int]
    problems: list[Problem]


def match_images(paths: Sequence[Path], file_names: Mapping[int, str]) -> ImageMatches:
    """Finds the image file of each name in an annotation file: by relative path first, then by its base name.

    Args:
        paths: image files, such as `find_pictures` finds.
        file_names: by image id, as `normalized_file_name` makes them.

    Returns:
        The matches. A base name that fits two files, or two entries that fit one, is a problem whose text names both.
    """
    parts_of = {path: _parts(path) for path in paths}
    by_base: dict[str, list[Path]] = {}
    for path, parts in parts_of.items():
        by_base.setdefault(parts[-1], []).append(path)
    matches = ImageMatches({}, [], [])
    by_base_name_alone: dict[str, list[int]] = {}
    for image_id, name in file_names.items():
        wanted = tuple(name.split("/"))
        candidates = by_base.get(wanted[-1], [])
        fitting = [path for path in candidates if parts_of[path][-len(wanted) :] == wanted]
        if len(fitting) == 1:
            matches.paths[image_id] = fitting[0]
        elif fitting:
            matches.problems.append(Problem(name, _fits_two(fitting), image_id))
        elif candidates:
            by_base_name_alone.setdefault(wanted[-1], []).append(image_id)
        else:
            matches.missing.append(image_id)
    taken: dict[Path, list[int]] = {}
    for image_id, path in matches.paths.items():
        taken.setdefault(path, []).append(image_id)
    for path, ids in taken.items():
        for image_id in ids if len(ids) > 1 else []:
            names = " and ".join(printable(file_names[other]) for other in ids[:2])
            problem = f"{names} both fit {printable(path)}; put the folder into every file_name"
            matches.problems.append(Problem(file_names[image_id], problem, image_id))
            del matches.paths[image_id]
    for base, ids in by_base_name_alone.items():
        free = [path for path in by_base[base] if path not in taken]
        for image_id in ids:
            if not free:
                matches.missing.append(image_id)
            elif len(free) == len(ids) == 1:
                matches.paths[image_id] = free[0]
            elif len(free) > 1:
                matches.problems.append(Problem(file_names[image_id], _fits_two(free), image_id))
            else:
                others = ", ".join(file_names[other] for other in ids[:3] if other != image_id)
                problem = f"{printable(free[0])} could be this image or {printable(others)}; give the folder above"
                matches.problems.append(Problem(file_names[image_id], problem, image_id))
    return matches


def _fits_two(paths: list[Path]) -> str:
    return (
        f"{printable(paths[0])} and {printable(paths[1])} both fit; put the folder into file_name, or give only "
        "one of the folders"
    )


def _parts(path: Path) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", part) for part in Path(os.path.abspath(path)).parts)


class ImageRow(NamedTuple):
    image_id: int
    file_name: str
    restval: bool
    captions: tuple[str, ...]


# Captions: which images, in which split, with which captions


class Captions(NamedTuple):
    """The images of every split in the order of their ids, the files they were read from, and what cannot be used."""

    splits: dict[str, list[ImageRow]]
    files: list[Path]
    problems: list[Problem]


class _Annotation(NamedTuple):
    id: Any
    image_id: Any
    caption: Any


def _keep_of_coco(entry: dict) -> Any:
    if "caption" in entry and "image_id" in entry:
        return _Annotation(entry.get("id"), entry["image_id"], entry["caption"])
    if "file_name" in entry:
        return (entry.get("id"), entry["file_name"])
    return entry


def _storable_name(name: Any) -> str:
    name = normalized_file_name(name)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the file name {_shown(name)} cannot be written as UTF-8; rename the file") from None
    return name


class _CocoCaptions:
    """A COCO captions file: file names by image id, annotations by annotation id, and reasons by image id."""

    def __init__(self, path: Path):
        self.path = path
        self.file_names: dict[int, str] = {}
        self.annotations: dict[int, _Annotation] = {}
        self.broken: dict[int, str] = {}
        self.problems: list[Problem] = []
        self._orphans: set[int] = set()
        content = read_json(path, _keep_of_coco)
        is_captions = isinstance(content, dict) and all(
            isinstance(content.get(name), list) for name in ("images", "annotations")
        )
        if not is_captions:
            raise PackingError(
                f'{printable(path)}: expected a COCO captions file, an object with lists "images" and "annotations"'
            )
        for position, entry in enumerate(content["images"]):
            self._add_image(position, entry)
        self._lacks_ids = bool(self.problems)  # then annotations without an image only follow from it
        for position, entry in enumerate(content["annotations"]):
            self._add_annotation(position, entry)

    def _note(self, what: str, image_id: Any, position: int) -> None:
        self.problems.append(Problem(printable(self.path), what, _label(image_id, position)))

    def _add_image(self, position: int, entry: Any) -> None:
        if isinstance(entry, _Annotation):
            entry = (entry.id, None)
        elif not isinstance(entry, tuple):
            entry = (entry.get("id"), None) if isinstance(entry, dict) else (None, None)
        try:
            image_id = normalized_image_id(entry[0])
        except ValueError:
            self._note('an entry of "images" lacks an integer "id"', entry[0], position)
            return
        if image_id in self.file_names:
            raise PackingError(f"{printable(self.path)}: duplicate image id {image_id}")
        try:
            self.file_names[image_id] = _storable_name(entry[1])
        except ValueError as error:
            self.file_names[image_id] = ""
            self.broken[image_id] = f'an entry of "images" lacks a usable "file_name": {error}'

    def _add_annotation(self, position: int, entry: Any) -> None:
        if not isinstance(entry, _Annotation):
            image_id = entry.get("image_id") if isinstance(entry, dict) else None
            what = 'an entry of "annotations" lacks an "image_id" or a "caption"'
            try:
                self.broken.setdefault(normalized_image_id(image_id), what)
            except ValueError:
                self._note(what, image_id, position)
            return
        try:
            image_id = normalized_image_id(entry.image_id)
        except ValueError:
            self._note('an entry of "annotations" lacks an integer "image_id"', entry.image_id, position)
            return
        try:
            index = normalized_image_id(entry.id)
        except ValueError:
            self.broken.setdefault(image_id, 'an entry of "annotations" lacks an integer "id"')
            return
        if index in self.annotations:
            raise PackingError(f"{printable(self.path)}: duplicate annotation id {index}")
        if image_id not in self.file_names:
            if image_id not in self._orphans and not self._lacks_ids:
                what = f'annotation {index} is of image {image_id}, which is not in "images"'
                self.problems.append(Problem(printable(self.path), what, image_id))
            self._orphans.add(image_id)
            return
        try:
            caption = normalized_caption(entry.caption)
        except ValueError as error:
            self.broken.setdefault(image_id, f"annotation {index}: {error}")
            caption = ""
        self.annotations[index] = _Annotation(index, image_id, caption)

    def rows(self, annotations: Iterable[_Annotation], restval: bool) -> list[ImageRow]:
        captions: dict[int, list[str]] = {}
        for annotation in annotations:
            captions.setdefault(annotation.image_id, []).append(annotation.caption)
        return [
            ImageRow(image_id, self.file_names[image_id], restval, tuple(captions[image_id])) for image_id in captions
        ]

    def without_broken(self, rows: list[ImageRow], problems: list[Problem]) -> list[ImageRow]:
        """The rows that can be used; the others go to `problems`."""
        for row in rows:
            if row.image_id in self.broken:
                problems.append(Problem(printable(self.path), self.broken[row.image_id], row.image_id))
        return [row for row in rows if row.image_id not in self.broken]


def _read_original(folder: Path) -> Captions:
    """The original's form: annotation ids in four `.npy` files, captions in COCO's two files of 2014."""
    id_files = {split: folder / f"coco_{name}_ids.npy" for split, name in ORIGINAL_IDS.items()}
    coco_files = [folder / "captions_train2014.json", folder / "captions_val2014.json"]
    missing = [path.name for path in [*id_files.values(), *coco_files] if not path.is_file()]
    if missing:
        raise PackingError(
            f"{printable(folder)}: {', '.join(missing)} not found; the original's form needs all six files"
        )
    splits: dict[str, list[ImageRow]] = {}
    problems: list[Problem] = []
    for path, names in zip(coco_files, (["train"], ["restval", "validation", "test"]), strict=True):
        file = _CocoCaptions(path)
        problems += file.problems
        for name in names:
            try:
                ids = read_npy(id_files[name])
            except (ValueError, OSError) as error:
                raise PackingError(f"{id_files[name]}: not a readable .npy file of annotation ids ({error})") from None
            if ids.ndim != 1 or ids.dtype.kind not in "iu":
                raise PackingError(f"{id_files[name]}: expected a list of integers, got {ids.dtype} {ids.shape}")
            unknown = sorted(set(ids.tolist()) - file.annotations.keys())
            if unknown:
                raise PackingError(
                    f"{id_files[name]}: annotation ids that {path.name} does not have: {listed(unknown)}"
                )
            values, counts = np.unique(ids, return_counts=True)
            if (counts > 1).any():
                raise PackingError(
                    f"{id_files[name]}: duplicate annotation ids: {listed(values[counts > 1].tolist())}"
                )
            rows = file.rows([file.annotations[index] for index in ids.tolist()], restval=name == "restval")
            rows = file.without_broken(rows, problems)
            splits.setdefault("train" if name == "restval" else name, []).extend(rows)
    return Captions(splits, [*id_files.values(), *coco_files], problems)


def _keep_of_karpathy(entry: dict) -> Any:
    if "raw" in entry:
        return (entry["raw"],)
    if "sentences" in entry:
        # A tuple of a list, so that no other value of the file is mistaken for an image.
        return ([entry.get(key) for key in ("cocoid", "imgid", "filename", "split", "sentences")],)
    return entry


def _read_karpathy(path: Path) -> Captions:
    """Karpathy's `dataset_coco.json`, or his `dataset_flickr8k.json` and `dataset_flickr30k.json`.

    The Flickr files have no `cocoid`; there `imgid` is the image id.
    """
    content = read_json(path, _keep_of_karpathy)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise PackingError(f'{printable(path)}: expected Karpathy\'s form, an object with a list "images"')
    is_image = [isinstance(entry, tuple) and isinstance(entry[0], list) for entry in content["images"]]
    entries = [entry[0] if fits else [None] * 5 for entry, fits in zip(content["images"], is_image, strict=True)]
    key = "cocoid" if any(entry[0] is not None for entry in entries) or not any(is_image) else "imgid"
    splits: dict[str, list[ImageRow]] = {}
    problems: list[Problem] = []
    for position, (cocoid, imgid, file_name, split, sentences) in enumerate(entries):
        written = cocoid if key == "cocoid" else imgid
        try:
            image_id = normalized_image_id(written)
        except ValueError:
            what = f'an entry of "images" lacks an integer "{key}", or "sentences"'
            problems.append(Problem(printable(path), what, _label(written, position)))
            continue
        try:
            if split not in ("train", "restval", "val", "test"):
                raise ValueError(f"has the split {_shown(split)}, not train, restval, val or test")
            if not isinstance(sentences, list) or not all(isinstance(each, tuple) for each in sentences):
                raise ValueError('has "sentences" without "raw"')
            captions = tuple(normalized_caption(sentence[0]) for sentence in sentences)
            row = ImageRow(image_id, _storable_name(file_name), split == "restval", captions)
        except ValueError as error:
            problems.append(Problem(printable(path), str(error), image_id))
            continue
        splits.setdefault("train" if split == "restval" else SPLIT_NAMES.get(split, split), []).append(row)
    return Captions(splits, [path], problems)


def _read_plain(files: dict[str, Path]) -> Captions:
    """COCO caption files named for the splits, such as `captions_train2017.json`."""
    splits: dict[str, list[ImageRow]] = {}
    problems: list[Problem] = []
    for name, path in files.items():
        file = _CocoCaptions(path)
        problems += file.problems
        rows = file.rows(file.annotations.values(), restval=name == "restval")
        described = {row.image_id for row in rows}
        rows += [
            ImageRow(index, file.file_names[index], False, ()) for index in file.file_names if index not in described
        ]
        splits.setdefault("train" if name == "restval" else name, []).extend(file.without_broken(rows, problems))
    return Captions(splits, list(files.values()), problems)


def read_annotations(path: str) -> Captions:
    """The captions of every split.

    Args:
        path: one of Karpathy's files, or a folder in one of the other forms.

    Raises:
        ValueError: there is nothing of the kind, or a file is not what its name says; the text names it.
    """
    source = Path(path)
    if not source.exists():
        raise PackingError(
            f"{printable(path)}: no such file or folder; --annotations takes a folder or dataset_coco.json"
        )
    if not source.is_dir():
        read = _read_karpathy(source)
    elif any(source.glob("coco_*_ids.npy")):
        read = _read_original(source)
    else:
        named: dict[str, Path] = {}
        for file in sorted(source.glob("*.json")):
            match = re.fullmatch(r"(?:captions_)?(train|restval|validation|val|dev|test)[0-9]*\.json", file.name)
            if match:
                split = SPLIT_NAMES.get(match[1], match[1])
                if split in named:
                    raise PackingError(f"{named[split]} and {file} are both captions of the split {split}; keep one")
                named[split] = file
        karpathy = [name for name in KARPATHY_FILES if (source / name).is_file()]
        if named:
            read = _read_plain(named)
        elif len(karpathy) == 1:
            read = _read_karpathy(source / karpathy[0])
        elif karpathy:
            raise PackingError(f"{printable(path)}: {' and '.join(karpathy)} are in it; give one of them by its name")
        else:
            raise PackingError(
                f"{printable(path)}: found neither coco_*_ids.npy nor captions_<split>.json nor dataset_coco.json in "
                "it"
            )
    splits = read.splits
    split_of: dict[int, str] = {}
    duplicates = []
    for split, rows in splits.items():
        rows.sort(key=lambda row: row.image_id)
        for row in rows:
            if split_of.setdefault(row.image_id, split) != split:
                duplicates.append(row.image_id)
        duplicates += [row.image_id for row, following in itertools.pairwise(rows) if row[0] == following[0]]
    if duplicates:
        raise PackingError(f"{printable(path)}: duplicate image ids, within a split or in two: {listed(duplicates)}")
    ordered = {name: splits[name] for name in ("train", "validation", "test") if splits.get(name)}
    if not ordered:
        raise_for(read.problems)
        raise PackingError(f"{printable(path)}: no image with a split in it")
    return read._replace(splits=ordered)


def listed(ids: Iterable[int | str]) -> str:
    return ", ".join(map(str, sorted(set(ids), key=_by_number)))


# Pictures: which files, and their ids

# Of the formats that Pillow reads, those that pictures come in.
PICTURE_SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def find_pictures(places: Iterable[str], leave_out: Callable[[Path, str], object] | None = None) -> list[Path]:
    """Pictures in the order of `places`; of a folder all in it and below, sorted by path.

    Args:
        places: files, which are taken whatever their names, and folders.
        leave_out: called with the path and the reason for what is in a folder and cannot be used: a symbolic link
            that leads out of it. Without it such links are left out without a word.

    Raises:
        ValueError: a place does not exist, or a folder has no pictures.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if "\0" in str(place):
            raise ValueError(f"{printable(place)}: not a file name")
        if place.is_dir():
            paths = [path for path in sorted(place.rglob("*")) if path.suffix.lower() in PICTURE_SUFFIXES]
            paths = [path for path in paths if not path.is_dir()]
            inside = [path for path in paths if not leads_out(path, place)]
            if leave_out is not None:
                for path in sorted(set(paths) - set(inside)):
                    leave_out(path, f"a symbolic link that leads out of {printable(place)}; give the file itself")
            if not inside:
                raise ValueError(f"{printable(place)}: no pictures in this folder ({' '.join(PICTURE_SUFFIXES)})")
            found += inside
        elif place.exists():
            found.append(place)
        else:
            raise ValueError(f"{printable(place)}: no such file or folder")
    return list(dict.fromkeys(found))


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path that was found in a folder leads to a place outside it, by symbolic links."""
    # Unlike `Path.resolve`, `realpath` does not fail on a link that leads to itself; opening it says what is wrong.
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def image_ids_of(paths: Sequence[Path]) -> list[int]:
    """The ids in COCO's file names, such as `COCO_val2014_000000000042.jpg` or `000000000042.jpg`.

    If one name is of another kind, or an id occurs twice, all pictures are numbered in order from 1.
    """
    matches = [re.fullmatch(r"(?:COCO_[a-z]+[0-9]+_)?([0-9]{1,18})", path.stem) for path in paths]
    ids = [int(match[1]) for match in matches if match]
    return ids if len(set(ids)) == len(paths) else list(range(1, len(paths) + 1))


# Features: where those of an image are, and what they must look like


def read_npy(path: str | os.PathLike, content: bytes | None = None, limit: int = ARRAY_SIZE_LIMIT) -> np.ndarray:
    """The array of a `.npy` file. Its header is held against the size of the file before anything is allocated.

    Args:
        path: the file.
        content: its bytes, where they have been read already.
        limit: the largest size in bytes.

    Raises:
        ValueError: it is no regular file, no `.npy` file, damaged, too large, or holds Python objects. The text does
            not name the file.
        OSError: it cannot be read.
    """
    if content is None:
        content = _read_regular(path, limit)
    if content[:2] == b"PK":
        raise ValueError("a .npz archive of arrays, where .npy is expected; write the one array with numpy.save")
    if not content:
        raise ValueError("No data left in file: it is empty")
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        header = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
        shape, _, dtype = header(stream)
    except Exception as error:  # the header is parsed as Python, which fails in as many ways as Python does
        raise ValueError(f"not a readable .npy file ({printable(str(error), 100)})") from None
    if dtype.hasobject:
        raise ValueError("holds Python objects, which are not read")
    expected, found = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
    if any(side < 0 for side in shape) or expected != found:
        raise ValueError(f"the header says {expected:,} bytes of shape {_shown(shape)}, the file holds {found:,}")
    stream.seek(0)
    return np.load(stream, allow_pickle=False)


def _read_regular(path: str | os.PathLike, limit: int) -> bytes:
    """`read_file` without the name, which the callers put in front."""
    try:
        return read_file(path, limit)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{printable(path)}: ")) from None


def _open_hdf5(path: str) -> h5py.File:
    with requires("data"):
        import h5py

    try:
        check_regular_file(path)
    except OSError as error:
        raise PackingError(f"{printable(path)}: not a readable HDF5 file ({error.strerror})") from None
    try:
        return h5py.File(path, "r")
    except (OSError, ValueError, RuntimeError) as error:
        raise PackingError(f"{printable(path)}: not a readable HDF5 file ({printable(str(error), 300)})") from None


def _keys(file: h5py.File, path: str) -> list[str]:
    try:
        # A name that is not UTF-8 comes as bytes.
        return [key if isinstance(key, str) else os.fsdecode(key) for key in file]
    except Exception as error:  # h5py has an exception of its own for every way in which a tree can be damaged
        raise PackingError(
            f"{printable(path)}: damaged, its keys cannot be listed ({printable(str(error), 300)})"
        ) from None


def _read_hdf5(file: h5py.File, path: str, key: str) -> np.ndarray:
    """One dataset as an array; BrokenImage for whatever is no ordinary array of numbers that lies in this file."""
    try:
        dataset = _linked(file, key)
        _check_dataset(dataset)
        return dataset[()]
    except BrokenImage:
        raise
    except Exception as error:
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise BrokenImage(path, f"{printable(key)}: {said}") from None


def _linked(group: Any, name: str, depth: int = 0) -> Any:
    """What a name in an HDF5 file leads to. Links are followed by hand: h5py would open other files."""
    import h5py

    if depth > 10:
        raise ValueError("a chain of links without an end")
    for part in name.split("/"):
        if part in ("", "."):
            continue
        if not isinstance(group, h5py.Group):
            raise ValueError("a link to something below a dataset")
        link = group.get(part, getlink=True)
        if link is None:
            raise ValueError("a link to nothing" if depth else "no such key")
        if isinstance(link, h5py.SoftLink):
            start = group.file if link.path.startswith("/") else group
            group = _linked(start, link.path, depth + 1)
        elif isinstance(link, h5py.HardLink):
            group = group[part]
        else:
            raise ValueError("a link to another file, which is not followed; copy the features into one file")
    return group


def _check_dataset(dataset: Any) -> None:
    import h5py

    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"a {type(dataset).__name__.lower()}, where a dataset is expected")
    if dataset.shape is None:
        raise ValueError("an empty dataset (h5py.Empty) without a shape")
    if dataset.dtype.kind not in "fiub":
        raise ValueError(f"expected floating point numbers, got {printable(str(dataset.dtype), 60)}")
    size = dataset.size * dataset.dtype.itemsize
    if size > ARRAY_SIZE_LIMIT:
        raise ValueError(
            f"{size:,} bytes of shape {_shown(dataset.shape)}; at most {ARRAY_SIZE_LIMIT:,} are read for an image"
        )
    if dataset.is_virtual or dataset.external:
        raise ValueError("its values lie in other files, which are not read; copy the features into one file")
    if not size:
        return
    if dataset.id.get_storage_size() == 0:
        raise ValueError("never written: the file holds its shape alone")
    if dataset.chunks is not None:
        chunks = math.prod(-(-side // chunk) for side, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        written = dataset.id.get_num_chunks()
        if written < chunks:
            raise ValueError(f"only {written} of its {chunks} chunks were ever written")


def _ids_of_keys(keys: Iterable[str], pattern: str) -> Iterator[tuple[int, re.Match]]:
    """Keys in the order given; the digits may have zeros before them, as in COCO's file names."""
    for key in keys:
        match = re.fullmatch(pattern, key)
        if match and int(match[1]) <= LARGEST_ID:
            yield int(match[1]), match


class GridFiles:
    """Grid features in HDF5 files: one dataset an image, `<id>_grids` or `<id>_features`.

    In a file that has both, as DLCT's, `_features` are regions and `_grids` are meant. A file with `_features` beside
    `_boxes` holds the regions of a detector alone, and is refused.
    """

    KEY = r"([0-9]{1,30})_(grids|features)"
    KEY_OF_REGIONS = r"[0-9]{1,30}_(boxes|bboxes|bbox|cls_prob|num_boxes|objects_id|objects_conf)"

    def __init__(self, paths: tuple[str, ...]):
        self.paths = paths
        self._open: dict[str, h5py.File] = {}
        self._keys_of: dict[str, dict[int, str]] = {}

    def index(self) -> dict[int, str]:
        """The file of every image; PackingError where an image is in two files, or a file has regions alone."""
        file_of: dict[int, str] = {}
        for path in self.paths:
            ids = list(self._keys(path))
            twice = [image_id for image_id in ids if image_id in file_of]
            if twice:
                others = sorted({file_of[image_id] for image_id in twice})
                raise PackingError(f"{path} and {', '.join(others)}: duplicate image ids: {listed(twice)}")
            file_of.update(dict.fromkeys(ids, path))
        return file_of

    def _file(self, path: str) -> h5py.File:
        if path not in self._open:
            self._open[path] = _open_hdf5(path)
        return self._open[path]

    def _keys(self, path: str) -> dict[int, str]:
        """The key of every image of a file."""
        if path in self._keys_of:
            return self._keys_of[path]
        keys = _keys(self._file(path), path)
        by_suffix: dict[str, list[tuple[int, str]]] = {"grids": [], "features": []}
        for image_id, match in _ids_of_keys(keys, self.KEY):
            by_suffix[match[2]].append((image_id, match[0]))
        found = by_suffix["grids"] or by_suffix["features"]
        if not found:
            raise PackingError(f"{printable(path)}: no dataset is called <image id>_features or <image id>_grids")
        region_key = next((key for key in keys if re.fullmatch(self.KEY_OF_REGIONS, key)), None)
        if not by_suffix["grids"] and region_key is not None:
            raise PackingError(
                f"{printable(path)}: region features of a detector ({found[0][1]} beside {region_key}), which are no "
                "grid; give a file of grid features, <image id>_grids or <image id>_features alone, such as "
                "coco_grid_feats2.hdf5 or what extract_features.py makes"
            )
        result = dict(found)
        if len(result) < len(found):
            ids = [image_id for image_id, _ in found]
            repeated = [image_id for image_id in result if ids.count(image_id) > 1][:IDS_OF_A_LINE]
            raise PackingError(f"{printable(path)}: duplicate image ids: {listed(repeated)}")
        self._keys_of[path] = result
        return result

    def read(self, path: str, image_id: int) -> np.ndarray:
        """The features of an image.

        Raises:
            BrokenImage: they are no array of numbers that lies in this file.
            PackingError: the file cannot be read at all.
        """
        file = self._file(path)
        # Listing all keys of a file takes a second; it is done only where the plain names are not there.
        plain = (f"{image_id}_grids", f"{image_id}_features") if path not in self._keys_of else ()
        key = next((name for name in plain if name in file), None) or self._keys(path).get(image_id)
        if key is None:
            raise BrokenImage(path, f"no features of image {image_id}")
        return _read_hdf5(file, path, key)


class SegmentationFiles:
    """Segmentation features: a folder with `<id>.npy` in it or in folders below, or an HDF5 file."""

    HDF5_KEY = r"([0-9]{1,30})(?:_segmentation|_segmentation_features|_pixel|_pixels)?"

    def __init__(self, path: str):
        self.path = path
        self._file: h5py.File | None = None

    def index(self) -> dict[int, str]:
        """What leads to every image: the path within the folder or the key within the file."""
        found: dict[int, str] = {}
        if os.path.isdir(self.path):
            names = (
                os.path.relpath(os.path.join(folder, name), self.path)
                for folder, _, files in sorted(os.walk(self.path))
                for name in sorted(files)
            )
            matches = (
                (match[1], name) for name in names if (match := re.fullmatch(r"(?:.*/)?([0-9]{1,30})\.npy", name))
            )
        else:
            matches = (
                (match[1], match[0]) for _, match in _ids_of_keys(_keys(self._hdf5(), self.path), self.HDF5_KEY)
            )
        for digits, name in matches:
            image_id = int(digits)
            if image_id in found:
                raise PackingError(
                    f"{printable(self.path)}: duplicate image id {image_id}: {found[image_id]} and {printable(name)}"
                )
            found[image_id] = name
        if not found:
            raise PackingError(
                f"{printable(self.path)}: neither a folder with <image id>.npy nor an HDF5 file with <image id>"
            )
        return found

    def states(self) -> Iterator[os.stat_result]:
        """Size and time of every file, which tell whether a file was changed since."""
        if not os.path.isdir(self.path):
            yield os.stat(self.path)
        for folder, folders, files in os.walk(self.path):
            folders.sort()
            yield from (os.lstat(os.path.join(folder, name)) for name in sorted(files))

    def _hdf5(self) -> h5py.File:
        if self._file is None:
            if not os.path.exists(self.path):
                raise PackingError(f"{printable(self.path)}: no such file or folder")
            self._file = _open_hdf5(self.path)
        return self._file

    def read(self, name: str) -> tuple[np.ndarray, str]:
        """The array and, for a `.npy` file, the SHA-256 of its bytes.

        Raises:
            BrokenImage: it is no array of numbers that lies in this folder or file.
        """
        if not os.path.isdir(self.path):
            return _read_hdf5(self._hdf5(), self.path, name), ""
        path = os.path.join(self.path, name)
        try:
            path_inside(self.path, name)
            content = _read_regular(path, ARRAY_SIZE_LIMIT)
            return read_npy(path, content), hashlib.sha256(content).hexdigest()
        except OSError as error:
            raise BrokenImage(path, error.strerror or str(error)) from None
        except ValueError as error:
            raise BrokenImage(path, str(error)) from None


def average_pool(feature_map: np.ndarray, size: int) -> np.ndarray:
    """(C, H, W) to (size * size, C), row by row: adaptive average pooling as torch does it.

    The mean over a rectangle is the mean over its rows of the means over its columns, so two small matrices do it.
    """
    rows, columns = (_pooling_matrix(length, size) for length in feature_map.shape[1:])
    return (rows @ feature_map @ columns.T).reshape(len(feature_map), size * size).T


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


def grid_of(array: np.ndarray, grid_size: int, width: int, fit: str = "refuse") -> tuple[np.ndarray, int]:
    """Grid features in the size asked for.

    Args:
        array: (N, width) cells row by row, or an unpooled (width, H, W), which is averaged.
        grid_size: cells along a side.
        width: values of a cell.
        fit: what becomes of a square grid of another size: "refuse" a larger one and pad a smaller one with zeros at
            its end, "pool" (average) it to the size asked for, or "cut" a larger one to its first cells and pad a
            smaller one, as the original implementation does.

    Returns:
        Float32 (grid_size**2, width), and the number of cells that are not padded.

    Raises:
        ValueError: another shape, or a grid that does not fit; the text says what to do.
    """
    cells = grid_size**2
    is_map = array.ndim == 3 and array.shape[0] == width
    if not (is_map or (array.ndim == 2 and array.shape[1] == width)) or not array.size:
        raise ValueError(f"expected the shape (cells, {width}) or ({width}, height, width), got {_shown(array.shape)}")
    if is_map:
        return average_pool(_as_float32(array), grid_size), cells
    side = math.isqrt(len(array))
    if len(array) != cells and fit == "pool":
        if side**2 != len(array):
            raise GridDoesNotFit(
                f"{len(array)} cells are no square grid, so that --pool cannot know their height and width; give "
                f"unpooled maps ({width}, height, width)"
            )
        return average_pool(_as_float32(array).T.reshape(width, side, side), grid_size), cells
    if len(array) > cells and fit != "cut":
        raise GridDoesNotFit(_too_many_cells(len(array), side, grid_size))
    grid = _as_float32(array[:cells])
    padded = np.zeros((cells, width), dtype=np.float32)
    padded[: len(grid)] = grid
    return padded, len(grid)


def _too_many_cells(count: int, side: int, grid_size: int) -> str:
    cut = f"--cut (keeps the first {grid_size**2} cells, the upper part of the image, as the original does)"
    if side**2 == count:
        return (
            f"a grid of {side} x {side} cells where {grid_size} x {grid_size} are asked for; give --grid-size {side} "
            f"(keeps all {count} cells), --pool (averages them to {grid_size} x {grid_size}) or {cut}"
        )
    return (
        f"{count} cells, which are no square grid (regions of a detector, or height and width differ), where "
        f"{grid_size} x {grid_size} are asked for; give square grids, unpooled maps, or {cut}"
    )


def segmentation_of(array: np.ndarray, expected: tuple[int, int, int]) -> np.ndarray:
    """Float32, or ValueError for another shape than `expected`."""
    if array.shape != expected:
        raise ValueError(f"expected the shape {expected}, got {_shown(array.shape)}")
    return _as_float32(array)
