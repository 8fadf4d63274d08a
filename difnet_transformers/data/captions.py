"""Captions and their splits, in the forms that COCO's come in.

The original's four `.npy` id files beside COCO's two files of 2014, Karpathy's `dataset_coco.json` (and his Flickr
files), or COCO caption files named for their splits.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import printable, read_json
from .errors import PackingError, Problem, join_ids, raise_problems
from .feature_files import read_npy
from .normalization import entry_label, normalize_caption, normalize_file_name, normalize_image_id, show

ORIGINAL_IDS = {"train": "train", "restval": "restval", "validation": "dev", "test": "test"}
KARPATHY_FILES = ("dataset_coco.json", "dataset_flickr8k.json", "dataset_flickr30k.json")
SPLIT_NAMES = {"val": "validation", "dev": "validation"}


class ImageRow(NamedTuple):
    image_id: int
    file_name: str
    restval: bool
    captions: tuple[str, ...]


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
    name = normalize_file_name(name)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the file name {show(name)} cannot be written as UTF-8; rename the file") from None
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
        self.problems.append(Problem(printable(self.path), what, entry_label(image_id, position)))

    def _add_image(self, position: int, entry: Any) -> None:
        if isinstance(entry, _Annotation):
            entry = (entry.id, None)
        elif not isinstance(entry, tuple):
            entry = (entry.get("id"), None) if isinstance(entry, dict) else (None, None)
        try:
            image_id = normalize_image_id(entry[0])
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
                self.broken.setdefault(normalize_image_id(image_id), what)
            except ValueError:
                self._note(what, image_id, position)
            return
        try:
            image_id = normalize_image_id(entry.image_id)
        except ValueError:
            self._note('an entry of "annotations" lacks an integer "image_id"', entry.image_id, position)
            return
        try:
            index = normalize_image_id(entry.id)
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
            caption = normalize_caption(entry.caption)
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
                    f"{id_files[name]}: annotation ids that {path.name} does not have: {join_ids(unknown)}"
                )
            values, counts = np.unique(ids, return_counts=True)
            if (counts > 1).any():
                raise PackingError(
                    f"{id_files[name]}: duplicate annotation ids: {join_ids(values[counts > 1].tolist())}"
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
            image_id = normalize_image_id(written)
        except ValueError:
            what = f'an entry of "images" lacks an integer "{key}", or "sentences"'
            problems.append(Problem(printable(path), what, entry_label(written, position)))
            continue
        try:
            if split not in ("train", "restval", "val", "test"):
                raise ValueError(f"has the split {show(split)}, not train, restval, val or test")
            if not isinstance(sentences, list) or not all(isinstance(each, tuple) for each in sentences):
                raise ValueError('has "sentences" without "raw"')
            captions = tuple(normalize_caption(sentence[0]) for sentence in sentences)
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
        raise PackingError(f"{printable(path)}: duplicate image ids, within a split or in two: {join_ids(duplicates)}")
    ordered = {name: splits[name] for name in ("train", "validation", "test") if splits.get(name)}
    if not ordered:
        raise_problems(read.problems)
        raise PackingError(f"{printable(path)}: no image with a split in it")
    return read._replace(splits=ordered)
