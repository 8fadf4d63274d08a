"""The files that COCO's captions and the original's features come in, and the pictures. The other programs read them.

Annotations: the original's four `.npy` id files beside COCO's two files of 2014, Karpathy's `dataset_coco.json`, or
COCO caption files named for their splits. Features: the original's HDF5 file, RSTNet's, DLCT's, or unpooled maps.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

ORIGINAL_IDS = {"train": "train", "restval": "restval", "validation": "dev", "test": "test"}
SPLIT_NAMES = {"val": "validation", "dev": "validation"}


class PackingError(ValueError):
    """A mistake in the input; its text names the file and the images."""


class Problem(NamedTuple):
    """Why one image cannot be packed. `what` is equal for all images with the same problem."""

    source: str
    what: str
    image_id: int


class BrokenImage(ValueError):
    def __init__(self, source: str, what: str):
        super().__init__(f"{source}: {what}")
        self.source = source
        self.what = " ".join(what.split())


def raise_for(problems: list[Problem]) -> None:
    """PackingError with one line for each kind of problem, listing all its images; nothing if there is none."""
    grouped: dict[tuple[str, str], list[int]] = {}
    for problem in problems:
        grouped.setdefault((problem.source, problem.what), []).append(problem.image_id)
    if grouped:
        lines = [f"{source}: {what}: image {listed(ids)}" for (source, what), ids in grouped.items()]
        raise PackingError(
            "\n".join(lines) + "\n(--skip-missing leaves these images out and says so in provenance.json)"
        )


class ImageRow(NamedTuple):
    image_id: int
    file_name: str
    restval: bool
    captions: tuple[str, ...]


# Annotations: which images, in which split, with which captions


class _Annotation(NamedTuple):
    id: int
    image_id: int
    caption: str


def _read_json(path: Path, keep: Callable[[dict], Any]) -> Any:
    """Parse a JSON file; `keep` reduces every object as soon as it is read, so that big files stay small in memory."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=lambda pairs: keep(dict(pairs)))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PackingError(f"{path}: malformed JSON ({error})") from None


def _keep_of_coco(entry: dict) -> Any:
    if "caption" in entry and "image_id" in entry:
        return _Annotation(entry.get("id"), entry["image_id"], entry["caption"])
    if "file_name" in entry:
        return (entry.get("id"), entry["file_name"])
    return entry


def _read_coco_captions(path: Path) -> tuple[dict[int, str], dict[int, _Annotation]]:
    """File names by image id, and annotations by annotation id."""
    content = _read_json(path, _keep_of_coco)
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise PackingError(f'{path}: expected a COCO captions file, an object with "images" and "annotations"')
    file_names: dict[int, str] = {}
    for entry in content["images"]:
        if not isinstance(entry, tuple) or not isinstance(entry[0], int):
            raise PackingError(
                f'{path}: an entry of "images" lacks an integer "id" or a "file_name": {str(entry)[:80]}'
            )
        if entry[0] in file_names:
            raise PackingError(f"{path}: duplicate image id {entry[0]}")
        file_names[entry[0]] = entry[1]
    annotations: dict[int, _Annotation] = {}
    for entry in content["annotations"]:
        if not isinstance(entry, _Annotation) or not isinstance(entry.id, int) or not isinstance(entry.caption, str):
            raise PackingError(
                f'{path}: an entry of "annotations" lacks an integer "id", an "image_id" or a "caption": '
                f"{str(entry)[:80]}"
            )
        if entry.id in annotations:
            raise PackingError(f"{path}: duplicate annotation id {entry.id}")
        if entry.image_id not in file_names:
            raise PackingError(f'{path}: annotation {entry.id} is of image {entry.image_id}, which is not in "images"')
        annotations[entry.id] = entry
    return file_names, annotations


def _rows_of(file_names: dict[int, str], annotations: list[_Annotation], restval: bool) -> list[ImageRow]:
    captions: dict[int, list[str]] = {}
    for annotation in annotations:
        captions.setdefault(annotation.image_id, []).append(annotation.caption)
    return [ImageRow(image_id, file_names[image_id], restval, tuple(captions[image_id])) for image_id in captions]


def _read_original(folder: Path) -> tuple[dict[str, list[ImageRow]], list[Path]]:
    """The original's form: annotation ids in four `.npy` files, captions in COCO's two files of 2014."""
    id_files = {split: folder / f"coco_{name}_ids.npy" for split, name in ORIGINAL_IDS.items()}
    coco_files = [folder / "captions_train2014.json", folder / "captions_val2014.json"]
    missing = [path.name for path in [*id_files.values(), *coco_files] if not path.is_file()]
    if missing:
        raise PackingError(f"{folder}: {', '.join(missing)} not found; the original's form needs all six files")
    splits: dict[str, list[ImageRow]] = {}
    for path, names in zip(coco_files, (["train"], ["restval", "validation", "test"]), strict=True):
        file_names, annotations = _read_coco_captions(path)
        for name in names:
            try:
                ids = np.load(id_files[name], allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise PackingError(f"{id_files[name]}: not a readable .npy file of annotation ids ({error})") from None
            if ids.ndim != 1 or ids.dtype.kind not in "iu":
                raise PackingError(f"{id_files[name]}: expected a list of integers, got {ids.dtype} {ids.shape}")
            unknown = sorted(set(ids.tolist()) - annotations.keys())
            if unknown:
                raise PackingError(
                    f"{id_files[name]}: annotation ids that {path.name} does not have: {listed(unknown)}"
                )
            values, counts = np.unique(ids, return_counts=True)
            if (counts > 1).any():
                raise PackingError(
                    f"{id_files[name]}: duplicate annotation ids: {listed(values[counts > 1].tolist())}"
                )
            rows = _rows_of(file_names, [annotations[index] for index in ids.tolist()], restval=name == "restval")
            splits.setdefault("train" if name == "restval" else name, []).extend(rows)
    return splits, [*id_files.values(), *coco_files]


def _keep_of_karpathy(entry: dict) -> Any:
    if "raw" in entry:
        return entry["raw"]
    if "sentences" in entry:
        return tuple(entry.get(key) for key in ("cocoid", "filename", "split", "sentences"))
    return entry


def _read_karpathy(path: Path) -> tuple[dict[str, list[ImageRow]], list[Path]]:
    """Karpathy's `dataset_coco.json`."""
    content = _read_json(path, _keep_of_karpathy)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise PackingError(f'{path}: expected Karpathy\'s form, an object with a list "images"')
    splits: dict[str, list[ImageRow]] = {}
    for entry in content["images"]:
        if not isinstance(entry, tuple) or not isinstance(entry[0], int) or None in entry:
            raise PackingError(
                f'{path}: an entry of "images" lacks an integer "cocoid", "filename", "split" or "sentences": '
                f"{str(entry)[:80]}"
            )
        image_id, file_name, split, sentences = entry
        if split not in ("train", "restval", "val", "test") or not all(isinstance(text, str) for text in sentences):
            raise PackingError(f'{path}: image {image_id} has the split {split!r} or a sentence without "raw"')
        row = ImageRow(image_id, file_name, split == "restval", tuple(sentences))
        splits.setdefault("train" if split == "restval" else SPLIT_NAMES.get(split, split), []).append(row)
    return splits, [path]


def _read_plain(files: dict[str, Path]) -> tuple[dict[str, list[ImageRow]], list[Path]]:
    """COCO caption files named for the splits, such as `captions_train2017.json`."""
    splits: dict[str, list[ImageRow]] = {}
    for name, path in files.items():
        file_names, annotations = _read_coco_captions(path)
        rows = _rows_of(file_names, list(annotations.values()), restval=name == "restval")
        described = {row.image_id for row in rows}
        rows += [ImageRow(index, file_names[index], False, ()) for index in file_names if index not in described]
        splits.setdefault("train" if name == "restval" else name, []).extend(rows)
    return splits, list(files.values())


def read_annotations(path: str) -> tuple[dict[str, list[ImageRow]], list[Path]]:
    """Rows of every split in the order of their image ids, and the files they were read from."""
    source = Path(path)
    if not source.exists():
        raise PackingError(f"{path}: no such file or folder; --annotations takes a folder or dataset_coco.json")
    if source.is_file():
        splits, files = _read_karpathy(source)
    elif any(source.glob("coco_*_ids.npy")):
        splits, files = _read_original(source)
    else:
        named: dict[str, Path] = {}
        for file in sorted(source.glob("*.json")):
            match = re.fullmatch(r"(?:captions_)?(train|restval|validation|val|dev|test)\d*\.json", file.name)
            if match:
                split = SPLIT_NAMES.get(match[1], match[1])
                if split in named:
                    raise PackingError(f"{named[split]} and {file} are both captions of the split {split}; keep one")
                named[split] = file
        if named:
            splits, files = _read_plain(named)
        elif (source / "dataset_coco.json").is_file():
            splits, files = _read_karpathy(source / "dataset_coco.json")
        else:
            raise PackingError(
                f"{path}: found neither coco_*_ids.npy nor captions_<split>.json nor dataset_coco.json in it"
            )
    split_of: dict[int, str] = {}
    duplicates = []
    for split, rows in splits.items():
        rows.sort(key=lambda row: row.image_id)
        for row in rows:
            if split_of.setdefault(row.image_id, split) != split:
                duplicates.append(row.image_id)
        duplicates += [row.image_id for row, following in itertools.pairwise(rows) if row[0] == following[0]]
    if duplicates:
        raise PackingError(f"{path}: duplicate image ids, within a split or in two: {listed(duplicates)}")
    ordered = {name: splits[name] for name in ("train", "validation", "test") if splits.get(name)}
    if not ordered:
        raise PackingError(f"{path}: no image with a split in it")
    return ordered, files


def listed(ids: list[int]) -> str:
    return ", ".join(map(str, sorted(set(ids))))


# Pictures: which files, and their ids

# Of the formats that Pillow reads, those that pictures come in.
PICTURE_SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def find_pictures(places: Iterable[str]) -> list[Path]:
    """Pictures in the order of `places`; of a folder all in it and below, sorted by path.

    ValueError for a place that does not exist or a folder without pictures. A file is taken whatever its name.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = [
                path for path in sorted(place.rglob("*")) if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
            ]
            if not inside:
                raise ValueError(f"{place}: no pictures in this folder ({' '.join(PICTURE_SUFFIXES)})")
            found += inside
        elif place.exists():
            found.append(place)
        else:
            raise ValueError(f"{place}: no such file or folder")
    return list(dict.fromkeys(found))


def image_ids_of(paths: Sequence[Path]) -> list[int]:
    """The ids in COCO's file names, such as `COCO_val2014_000000000042.jpg` or `000000000042.jpg`.

    If one name is of another kind, or an id occurs twice, all pictures are numbered in order from 1.
    """
    matches = [re.fullmatch(r"(?:COCO_[a-z]+\d+_)?(\d+)", path.stem) for path in paths]
    ids = [int(match[1]) for match in matches if match]
    return ids if len(set(ids)) == len(paths) else list(range(1, len(paths) + 1))


# Features: where those of an image are, and what they must look like


class GridFiles:
    """Grid features in HDF5 files: one dataset an image, `<id>_grids` or `<id>_features`.

    In a file that has both, as DLCT's, `_features` are regions and `_grids` are meant.
    """

    def __init__(self, paths: tuple[str, ...]):
        self.paths = paths
        self._open: dict[str, h5py.File] = {}

    def index(self) -> dict[int, str]:
        """The file of every image; PackingError where an image is in two files."""
        file_of: dict[int, str] = {}
        for path in self.paths:
            by_suffix: dict[str, list[int]] = {"grids": [], "features": []}
            for key in self._file(path):
                match = re.fullmatch(r"(\d+)_(grids|features)", key)
                if match:
                    by_suffix[match[2]].append(int(match[1]))
            ids = by_suffix["grids"] or by_suffix["features"]
            if not ids:
                raise PackingError(f"{path}: no dataset is called <image id>_features or <image id>_grids")
            twice = [image_id for image_id in ids if image_id in file_of]
            if twice or len(set(ids)) < len(ids):
                others = sorted({file_of[image_id] for image_id in twice}) or [path]
                repeated = twice or [image_id for image_id in set(ids) if ids.count(image_id) > 1]
                raise PackingError(f"{path} and {', '.join(others)}: duplicate image ids: {listed(repeated)}")
            file_of.update(dict.fromkeys(ids, path))
        return file_of

    def _file(self, path: str) -> h5py.File:
        if path not in self._open:
            try:
                self._open[path] = h5py.File(path, "r")
            except OSError as error:
                raise PackingError(f"{path}: not a readable HDF5 file ({error})") from None
        return self._open[path]

    def read(self, path: str, image_id: int) -> np.ndarray:
        file = self._file(path)
        key = f"{image_id}_grids" if f"{image_id}_grids" in file else f"{image_id}_features"
        return file[key][()]


class SegmentationFiles:
    """Segmentation features: a folder with `<id>.npy` in it or in folders below, or an HDF5 file."""

    HDF5_KEY = r"(\d+)(?:_segmentation|_segmentation_features|_pixel|_pixels)?"

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
            matches = ((re.fullmatch(r"(?:.*/)?(\d+)\.npy", name), name) for name in names)
        else:
            matches = ((re.fullmatch(self.HDF5_KEY, key), key) for key in self._hdf5())
        for match, name in matches:
            if match:
                image_id = int(match[1])
                if image_id in found:
                    raise PackingError(f"{self.path}: duplicate image id {image_id}: {found[image_id]} and {name}")
                found[image_id] = name
        if not found:
            raise PackingError(f"{self.path}: neither a folder with <image id>.npy nor an HDF5 file with <image id>")
        return found

    def states(self) -> Iterator[os.stat_result]:
        """Size and time of every file, which tell whether a file was changed since."""
        if not os.path.isdir(self.path):
            yield os.stat(self.path)
        for folder, folders, files in os.walk(self.path):
            folders.sort()
            yield from (os.stat(os.path.join(folder, name)) for name in sorted(files))

    def _hdf5(self) -> h5py.File:
        if self._file is None:
            try:
                self._file = h5py.File(self.path, "r")
            except OSError as error:
                raise PackingError(f"{self.path}: neither a folder nor a readable HDF5 file ({error})") from None
        return self._file

    def read(self, name: str) -> tuple[np.ndarray, str]:
        """The array and, for a `.npy` file, the SHA-256 of its bytes."""
        if not os.path.isdir(self.path):
            return self._hdf5()[name][()], ""
        content = Path(self.path, name).read_bytes()
        return np.load(io.BytesIO(content), allow_pickle=False), hashlib.sha256(content).hexdigest()


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


def grid_of(array: np.ndarray, grid_size: int, width: int) -> tuple[np.ndarray, int]:
    """Float32 (grid_size**2, width) and the number of real cells, from (N, width) or an unpooled (width, H, W).

    Fewer cells are padded with zeros and more are cut, as in the original. ValueError for anything else.
    """
    cells = grid_size**2
    if array.ndim == 3 and array.shape[0] == width and array.size:
        grid = average_pool(_as_float32(array), grid_size)
    elif array.ndim == 2 and array.shape[1] == width and array.size:
        grid = _as_float32(array[:cells])
    else:
        raise ValueError(f"expected the shape (cells, {width}) or ({width}, height, width), got {array.shape}")
    padded = np.zeros((cells, width), dtype=np.float32)
    padded[: len(grid)] = grid
    return padded, len(grid)


def segmentation_of(array: np.ndarray, expected: tuple[int, int, int]) -> np.ndarray:
    """Float32, or ValueError for another shape than `expected`."""
    if array.shape != expected:
        raise ValueError(f"expected the shape {expected}, got {array.shape}")
    return _as_float32(array)
