"""Captions and their splits, in the forms that COCO's come in.

The original's four `.npy` id files beside COCO's two files of 2014, Karpathy's `dataset_coco.json` (and his Flickr
files), or COCO caption files named for their splits.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import printable, read_json
from .errors import DataError, Problem, join_ids, raise_problems
from .feature_files import read_npy
from .normalization import entry_label, normalize_caption, normalize_file_name, normalize_image_id, show

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"val": "validation", "dev": "validation", "restval": "train"}
ORIGINAL_IDS = {"train": "train", "restval": "restval", "validation": "dev", "test": "test"}
KARPATHY_FILES = ("dataset_coco.json", "dataset_flickr8k.json", "dataset_flickr30k.json")


class ImageRow(NamedTuple):
    """An image with its captions. Packed folders know their input by the text of these tuples: it must not change.

    Attributes:
        image_id: COCO's.
        file_name: relative, with slashes.
        restval: whether a training image comes from COCO's validation images.
        captions: as they are written.
    """

    image_id: int
    file_name: str
    restval: bool
    captions: tuple[str, ...]


class Captions(NamedTuple):
    """The images of every split in the order of their ids, the files they were read from, and what cannot be used."""

    splits: dict[str, list[ImageRow]]
    files: list[Path]
    problems: list[Problem]


def read_annotations(path: str) -> Captions:
    """The captions of every split.

    Args:
        path: one of Karpathy's files, or a folder in one of the other forms.

    Raises:
        ValueError: there is nothing of the kind, or a file is not what its name says; the text names it.
    """
    source = Path(path)
    if not source.exists():
        raise DataError(
            f"{printable(path)}: no such file or folder; --annotations takes a folder or dataset_coco.json"
        )
    splits, files, problems = _read_folder(source) if source.is_dir() else read_karpathy_file(source)
    split_of: dict[int, str] = {}
    duplicates = []
    for split, rows in splits.items():
        rows.sort(key=lambda row: row.image_id)
        for row in rows:
            if split_of.setdefault(row.image_id, split) != split:
                duplicates.append(row.image_id)
        duplicates += [row.image_id for row, after in itertools.pairwise(rows) if row.image_id == after.image_id]
    if duplicates:
        raise DataError(f"{printable(path)}: duplicate image ids, within a split or in two: {join_ids(duplicates)}")
    ordered = {name: splits[name] for name in SPLITS if splits.get(name)}
    if not ordered:
        raise_problems(problems)
        raise DataError(f"{printable(path)}: no image with a split in it")
    return Captions(ordered, files, problems)


def _read_folder(folder: Path) -> Captions:
    if any(folder.glob("coco_*_ids.npy")):
        return _read_original(folder)
    named: dict[str, Path] = {}
    for file in sorted(folder.glob("*.json")):
        match = re.fullmatch(r"(?:captions_)?(train|restval|validation|val|dev|test)[0-9]*\.json", file.name)
        if match:
            split = "validation" if match[1] in ("val", "dev") else match[1]
            if split in named:
                raise DataError(f"{named[split]} and {file} are both captions of the split {split}; keep one")
            named[split] = file
    if named:
        return _read_files_of_splits(named)
    karpathy = [name for name in KARPATHY_FILES if (folder / name).is_file()]
    if not karpathy:
        raise DataError(
            f"{printable(folder)}: found neither coco_*_ids.npy nor captions_<split>.json nor dataset_coco.json in it"
        )
    if len(karpathy) > 1:
        raise DataError(f"{printable(folder)}: {' and '.join(karpathy)} are in it; give one of them by its name")
    return read_karpathy_file(folder / karpathy[0])


# The original's form


def _read_original(folder: Path) -> Captions:
    """Annotation ids in four `.npy` files, captions in COCO's two files of 2014."""
    id_files = {split: folder / f"coco_{name}_ids.npy" for split, name in ORIGINAL_IDS.items()}
    coco_files = [folder / "captions_train2014.json", folder / "captions_val2014.json"]
    missing = [path.name for path in [*id_files.values(), *coco_files] if not path.is_file()]
    if missing:
        raise DataError(
            f"{printable(folder)}: {', '.join(missing)} not found; the original's form needs all six files"
        )
    splits: dict[str, list[ImageRow]] = {}
    problems: list[Problem] = []
    for path, names in zip(coco_files, (["train"], ["restval", "validation", "test"]), strict=True):
        file = _CaptionFile(path)
        problems += file.problems
        for name in names:
            ids = _read_annotation_ids(id_files[name], file)
            rows = file.rows((file.annotations[index] for index in ids), restval=name == "restval")
            splits.setdefault(SPLIT_NAMES.get(name, name), []).extend(file.without_broken(rows, problems))
    return Captions(splits, [*id_files.values(), *coco_files], problems)


def _read_annotation_ids(path: Path, file: _CaptionFile) -> list[int]:
    try:
        ids = read_npy(path)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a readable .npy file of annotation ids ({error})") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(f"{path}: expected a list of integers, got {ids.dtype} {ids.shape}")
    unknown = set(ids.tolist()) - file.annotations.keys()
    if unknown:
        raise DataError(f"{path}: annotation ids that {file.path.name} does not have: {join_ids(unknown)}")
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise DataError(f"{path}: duplicate annotation ids: {join_ids(values[counts > 1].tolist())}")
    return ids.tolist()


# COCO caption files


def _read_files_of_splits(files: Mapping[str, Path]) -> Captions:
    """COCO caption files named for the splits, such as `captions_train2017.json`."""
    splits: dict[str, list[ImageRow]] = {}
    problems: list[Problem] = []
    for name, path in files.items():
        rows, broken = read_coco_captions(path, restval=name == "restval")
        splits.setdefault(SPLIT_NAMES.get(name, name), []).extend(rows)
        problems += broken
    return Captions(splits, list(files.values()), problems)


def read_coco_captions(path: Path, restval: bool = False) -> tuple[list[ImageRow], list[Problem]]:
    """The images of a COCO caption file, also those without captions, and what cannot be used.

    Args:
        path: such as `captions_train2017.json`.
        restval: whether they are COCO's validation images that training uses.

    Raises:
        ValueError: it is no such file; the text names it.
        OSError: it cannot be read.
    """
    file = _CaptionFile(path)
    problems = list(file.problems)
    rows = file.rows(file.annotations.values(), restval)
    described = {row.image_id for row in rows}
    rows += [
        ImageRow(image_id, file_name, False, ())
        for image_id, file_name in file.file_names.items()
        if image_id not in described
    ]
    return file.without_broken(rows, problems), problems


class _Image(NamedTuple):
    id: Any
    file_name: Any


class _Annotation(NamedTuple):
    id: Any
    image_id: Any
    caption: Any


def _reduce_coco(entry: dict) -> Any:
    """What is kept of an object of a COCO file, so that millions of them fit into memory."""
    if "caption" in entry and "image_id" in entry:
        return _Annotation(entry.get("id"), entry["image_id"], entry["caption"])
    if "file_name" in entry:
        return _Image(entry.get("id"), entry["file_name"])
    return entry


class _CaptionFile:
    """A COCO caption file.

    Attributes:
        file_names: by image id.
        annotations: by annotation id.
        broken: reasons by image id.
        problems: entries without an image that could be named.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file_names: dict[int, str] = {}
        self.annotations: dict[int, _Annotation] = {}
        self.broken: dict[int, str] = {}
        self.problems: list[Problem] = []
        self._orphans: set[int] = set()
        content = read_json(path, _reduce_coco)
        if not isinstance(content, dict) or not all(
            isinstance(content.get(name), list) for name in ("images", "annotations")
        ):
            raise DataError(
                f'{printable(path)}: expected a COCO captions file, an object with lists "images" and "annotations"'
            )
        for position, entry in enumerate(content["images"]):
            self._add_image(position, entry)
        self._lacks_ids = bool(self.problems)  # then annotations without an image only follow from it
        for position, entry in enumerate(content["annotations"]):
            self._add_annotation(position, entry)

    def _add_problem(self, what: str, image_id: Any, position: int) -> None:
        self.problems.append(Problem(printable(self.path), what, entry_label(image_id, position)))

    def _add_image(self, position: int, entry: Any) -> None:
        if isinstance(entry, _Annotation):
            entry = _Image(entry.id, None)
        elif not isinstance(entry, _Image):
            entry = _Image(entry.get("id") if isinstance(entry, dict) else None, None)
        try:
            image_id = normalize_image_id(entry.id)
        except ValueError:
            self._add_problem('an entry of "images" lacks an integer "id"', entry.id, position)
            return
        if image_id in self.file_names:
            raise DataError(f"{printable(self.path)}: duplicate image id {image_id}")
        try:
            self.file_names[image_id] = storable_name(entry.file_name)
        except ValueError as error:
            self.file_names[image_id] = ""
            self.broken[image_id] = f'an entry of "images" lacks a usable "file_name": {error}'

    def _add_annotation(self, position: int, entry: Any) -> None:
        if not isinstance(entry, _Annotation):
            image_id = entry.get("image_id") if isinstance(entry, dict) else None
            what = 'an entry of "annotations" lacks an "image_id" or a "caption"'
            try:
                self.broken.setdefault(normalize_image_id(image_id), what)
            except ValueError:
                self._add_problem(what, image_id, position)
            return
        try:
            image_id = normalize_image_id(entry.image_id)
        except ValueError:
            self._add_problem('an entry of "annotations" lacks an integer "image_id"', entry.image_id, position)
            return
        try:
            index = normalize_image_id(entry.id)
        except ValueError:
            self.broken.setdefault(image_id, 'an entry of "annotations" lacks an integer "id"')
            return
        if index in self.annotations:
            raise DataError(f"{printable(self.path)}: duplicate annotation id {index}")
        if image_id not in self.file_names:
            if image_id not in self._orphans and not self._lacks_ids:
                what = f'annotation {index} is of image {image_id}, which is not in "images"'
                self.problems.append(Problem(printable(self.path), what, image_id))
            self._orphans.add(image_id)
            return
        try:
            caption = normalize_caption(entry.caption)
        except ValueError as error:
            self.broken.setdefault(image_id, f"annotation {index}: {error}")
            caption = ""
        self.annotations[index] = _Annotation(index, image_id, caption)

    def rows(self, annotations: Iterable[_Annotation], restval: bool) -> list[ImageRow]:
        """The images of some annotations, with the captions in the order given."""
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


def storable_name(name: Any) -> str:
    """`normalize_file_name` of a name that can be written as UTF-8.

    Raises:
        ValueError: it is no such name.
    """
    name = normalize_file_name(name)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the file name {show(name)} cannot be written as UTF-8; rename the file") from None
    return name


# Karpathy's splits


class _KarpathyImage(NamedTuple):
    cocoid: Any = None
    imgid: Any = None
    filename: Any = None
    split: Any = None
    sentences: Any = None


class _KarpathySentence(NamedTuple):
    raw: Any


def _reduce_karpathy(entry: dict) -> Any:
    """What is kept of an object of Karpathy's files, without the tokens."""
    if "raw" in entry:
        return _KarpathySentence(entry["raw"])
    if "sentences" in entry:
        return _KarpathyImage(*(entry.get(name) for name in _KarpathyImage._fields))
    return entry


def read_karpathy_file(path: Path) -> Captions:
    """Karpathy's `dataset_coco.json`, or his `dataset_flickr8k.json` and `dataset_flickr30k.json`.

    The Flickr files have no `cocoid`; there `imgid` is the image id.

    Raises:
        ValueError: it is no such file; the text names it.
        OSError: it cannot be read.
    """
    content = read_json(path, _reduce_karpathy)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f'{printable(path)}: expected Karpathy\'s form, an object with a list "images"')
    images = [image if isinstance(image, _KarpathyImage) else _KarpathyImage() for image in content["images"]]
    is_flickr = any(image.imgid is not None for image in images) and all(image.cocoid is None for image in images)
    key = "imgid" if is_flickr else "cocoid"
    splits: dict[str, list[ImageRow]] = {}
    problems: list[Problem] = []
    for position, image in enumerate(images):
        written = image.imgid if is_flickr else image.cocoid
        try:
            image_id = normalize_image_id(written)
        except ValueError:
            what = f'an entry of "images" lacks an integer "{key}", or "sentences"'
            problems.append(Problem(printable(path), what, entry_label(written, position)))
            continue
        try:
            split, sentences = image.split, image.sentences
            if split not in ("train", "restval", "val", "test"):
                raise ValueError(f"has the split {show(split)}, not train, restval, val or test")
            if not isinstance(sentences, list) or not all(isinstance(each, _KarpathySentence) for each in sentences):
                raise ValueError('has "sentences" without "raw"')
            captions = tuple(normalize_caption(sentence.raw) for sentence in sentences)
            row = ImageRow(image_id, storable_name(image.filename), split == "restval", captions)
        except ValueError as error:
            problems.append(Problem(printable(path), str(error), image_id))
            continue
        splits.setdefault(SPLIT_NAMES.get(split, split), []).append(row)
    return Captions(splits, [path], problems)
