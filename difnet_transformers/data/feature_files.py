"""Feature files: grid features in HDF5, segmentation features in HDF5 or as a folder of `.npy` files; both in Parquet.

Grid features as the original has them (`coco_grid_feats2.hdf5`), as RSTNet and DLCT have them, or as unpooled maps.
Nothing outside the file or folder that is given is ever opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..command_line import requires
from ..files import check_regular_file, path_inside, printable, read_file, read_json
from .errors import IDS_PER_LINE, BrokenImage, DataError, join_ids
from .feature_records import records_in
from .normalization import LARGEST_ID, show

if TYPE_CHECKING:
    import h5py

    from .feature_tables import FeatureTable

HDF5_SUFFIXES = (".hdf5", ".h5")
SEGMENTATIONS = "segmentations"  # folder of segmentation features in the output of `difnet extract`
ARRAY_SIZE_LIMIT = 2**30  # bytes of one image's array; an unpooled map of a large image takes 30 MB


def is_table(path: str | os.PathLike) -> bool:
    """Whether a file of features is one that `difnet extract --format parquet` writes, by its name."""
    return os.fspath(path).lower().endswith(".parquet")


def options_of_folder(folder: str) -> str | None:
    """The options that name the HDF5 file of a folder, and the segmentation features beside it; `None` without one."""
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(HDF5_SUFFIXES))
    if not names:
        return None
    beside = os.path.join(folder, SEGMENTATIONS)
    said = os.path.join(folder, names[0]) + (f" --segmentation {beside}" if os.path.isdir(beside) else "")
    return printable(said, 400)


def check_are_files(places: Sequence[str]) -> None:
    """Raises `ValueError` where features are no files on a disk, which `difnet caption` takes with --output alone."""
    for place in places:
        shown = printable(place, 300)
        if os.path.isdir(place):
            options = options_of_folder(place)
            said = "folders of features need --output FOLDER" if options is None else f"give --features {options}"
            raise ValueError(f"{shown}: a folder, where a file is expected; {said}")
        if not os.path.lexists(place) and ("://" in place or any(each in place for each in "*?[")):
            raise ValueError(f"{shown}: features of URLs and patterns need --output FOLDER")


def _open_table(path: str) -> FeatureTable:
    from .feature_tables import FeatureTable  # needs pyarrow

    return FeatureTable(path)


class GridFiles:
    """Grid features in HDF5 files: one dataset an image, `<id>_grids` or `<id>_features`.

    In a file that has both, as DLCT's, `_features` are regions and `_grids` are meant. A file with `_features` beside
    `_boxes` holds the regions of a detector alone, and is refused.
    """

    KEY = r"([0-9]{1,30})_(grids|features)"
    KEY_OF_REGIONS = r"[0-9]{1,30}_(boxes|bboxes|bbox|cls_prob|num_boxes|objects_id|objects_conf)"

    def __init__(self, paths: tuple[str, ...]):
        self.paths = paths
        self._tables = {path: _open_table(path) for path in paths if is_table(path)}
        self._files: dict[str, h5py.File] = {}
        self._keys: dict[str, dict[int, str]] = {}

    def index(self) -> dict[int, str]:
        """The file of every image.

        Raises:
            DataError: an image is in two files, or a file is no readable HDF5 file or has no grids.
        """
        file_of: dict[int, str] = {}
        for path in self.paths:
            ids = list(self._tables[path].rows() if path in self._tables else self._keys_of(path))
            twice = [image_id for image_id in ids if image_id in file_of]
            if twice:
                others = sorted({file_of[image_id] for image_id in twice})
                raise DataError(f"{path} and {', '.join(others)}: duplicate image ids: {join_ids(twice)}")
            file_of.update(dict.fromkeys(ids, path))
        return file_of

    def _file(self, path: str) -> h5py.File:
        if path not in self._files:
            self._files[path] = _open_hdf5(path)
        return self._files[path]

    def _keys_of(self, path: str) -> dict[int, str]:
        """The key of every image of a file."""
        if path in self._keys:
            return self._keys[path]
        keys = _list_keys(self._file(path), path)
        by_suffix: dict[str, list[tuple[int, str]]] = {"grids": [], "features": []}
        for image_id, match in _match_keys(keys, self.KEY):
            by_suffix[match[2]].append((image_id, match[0]))
        found = by_suffix["grids"] or by_suffix["features"]
        if not found:
            raise DataError(f"{printable(path)}: no dataset is called <image id>_features or <image id>_grids")
        region_key = next((key for key in keys if re.fullmatch(self.KEY_OF_REGIONS, key)), None)
        if not by_suffix["grids"] and region_key is not None:
            raise DataError(
                f"{printable(path)}: region features of a detector ({found[0][1]} beside {region_key}), which are no "
                "grid; give a file of grid features, <image id>_grids or <image id>_features alone, such as "
                "coco_grid_feats2.hdf5 or what `difnet extract` makes"
            )
        result = dict(found)
        if len(result) < len(found):
            ids = [image_id for image_id, _ in found]
            repeated = [image_id for image_id in result if ids.count(image_id) > 1][:IDS_PER_LINE]
            raise DataError(f"{printable(path)}: duplicate image ids: {join_ids(repeated)}")
        self._keys[path] = result
        return result

    def grid_backbone(self) -> dict[str, Any] | None:
        """What `difnet extract` wrote into the files about the network that made them; `None` where one says nothing.

        Raises:
            DataError: two files were made by different networks.
        """
        found: list[dict[str, Any]] = []
        for path in self.paths:
            try:
                table = self._tables.get(path)
                said = table.record("grid_backbone") if table else json.loads(self._file(path).attrs["grid_backbone"])
            except (KeyError, TypeError, ValueError):
                return None
            if not isinstance(said, dict):
                return None
            hashes = [each.get("parameters_sha256") for each in (*found[:1], said)]
            if hashes[0] != hashes[-1]:
                raise DataError(f"{printable(self.paths[0])} and {printable(path)} were made by different networks")
            found.append(said)
        return found[0] if found else None

    def read(self, path: str, image_id: int) -> np.ndarray:
        """The features of an image.

        Raises:
            BrokenImage: they are no array of numbers that lies in this file.
            DataError: the file cannot be read at all.
        """
        if path in self._tables:
            return self._tables[path].read_grid(image_id)
        file = self._file(path)
        # Listing all keys of a file takes a second; it is done only where the plain names are not there.
        plain = (f"{image_id}_grids", f"{image_id}_features") if path not in self._keys else ()
        key = next((name for name in plain if name in file), None) or self._keys_of(path).get(image_id)
        if key is None:
            raise BrokenImage(path, f"no features of image {image_id}")
        return _read_hdf5(file, path, key)


class SegmentationFiles:
    """Segmentation features: a folder with `<id>.npy` in it or in folders below, or an HDF5 file."""

    HDF5_KEY = r"([0-9]{1,30})(?:_segmentation|_segmentation_features|_pixel|_pixels)?"

    def __init__(self, path: str):
        self.path = path
        self._table = _open_table(path) if is_table(path) else None
        self._file: h5py.File | None = None

    def index(self) -> dict[int, str]:
        """What leads to every image: the path within the folder or the key within the file.

        Raises:
            DataError: an image is there twice, or there is nothing of the kind.
        """
        found: dict[int, str] = {}
        if self._table is not None:
            return {image_id: str(image_id) for image_id in self._table.rows()}
        if os.path.isdir(self.path):
            names = (
                Path(folder, name).relative_to(self.path).as_posix()
                for folder, _, files in sorted(os.walk(self.path))
                for name in sorted(files)
            )
            matches = (
                (match[1], name) for name in names if (match := re.fullmatch(r"(?:.*/)?([0-9]{1,30})\.npy", name))
            )
        else:
            matches = (
                (match[1], match[0]) for _, match in _match_keys(_list_keys(self._hdf5(), self.path), self.HDF5_KEY)
            )
        for digits, name in matches:
            image_id = int(digits)
            if image_id in found:
                raise DataError(
                    f"{printable(self.path)}: duplicate image id {image_id}: {found[image_id]} and {printable(name)}"
                )
            found[image_id] = name
        if not found:
            raise DataError(
                f"{printable(self.path)}: neither a folder with <image id>.npy nor an HDF5 file with <image id>"
            )
        return found

    def record(self) -> dict[str, Any] | None:
        """What `difnet extract` says about what made them: in its manifest, or an attribute of an HDF5 file.

        Raises:
            DataError: the folder holds several extractions.
        """
        if self._table is not None:
            return records_in({"segmentation_model": self._table.record("segmentation_model")}).segmentation_model
        if not os.path.isdir(self.path):
            attributes = self._hdf5().attrs
            # A damaged attribute shows in whatever part of h5py it reaches first.
            with contextlib.suppress(KeyError, TypeError, ValueError, OSError, RuntimeError):
                return records_in({"segmentation_model": json.loads(attributes["segmentation_model"])})[1]
            return None
        folder = Path(os.path.abspath(self.path))
        # The manifest lies in the output of `difnet extract`, the features in its folder `segmentations`.
        within = next((parent for parent in (folder, folder.parent) if parent.name == SEGMENTATIONS), None)
        for place in [folder, *([] if within is None else [within.parent])]:
            record = _record_in_manifest(place / "manifest.json")
            if record is not None:
                return record
        several = [path.parent for path in sorted(folder.glob("*/manifest.json")) if _record_in_manifest(path)]
        if several:
            raise DataError(
                f"{printable(self.path)} holds what `difnet extract` made in {printable(several[0].name)}; give its "
                f"folder {SEGMENTATIONS}, or those of several: --segmentation A/{SEGMENTATIONS} B/{SEGMENTATIONS}"
            )
        return None

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
                raise DataError(f"{printable(self.path)}: no such file or folder")
            self._file = _open_hdf5(self.path)
        return self._file

    def read(self, name: str) -> tuple[np.ndarray, str]:
        """The array and, for a `.npy` file, the SHA-256 of its bytes.

        Raises:
            BrokenImage: it is no array of numbers that lies in this folder or file.
        """
        if self._table is not None:
            return self._table.read_segmentation(int(name)), ""
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


def _record_in_manifest(path: Path) -> dict[str, Any] | None:
    try:
        return records_in(read_json(path)).segmentation_model
    except (OSError, ValueError):
        return None


# HDF5 files: only ordinary arrays of numbers that lie in the file itself are read


def _open_hdf5(path: str) -> h5py.File:
    with requires("data"):
        import h5py

    try:
        check_regular_file(path)
    except OSError as error:
        raise DataError(f"{printable(path)}: not a readable HDF5 file ({error.strerror})") from None
    try:
        return h5py.File(path, "r")
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{printable(path)}: not a readable HDF5 file ({printable(str(error), 300)})") from None


def _list_keys(file: h5py.File, path: str) -> list[str]:
    try:
        # A name that is not UTF-8 comes as bytes.
        return [key if isinstance(key, str) else os.fsdecode(key) for key in file]
    except Exception as error:  # h5py has an exception of its own for every way in which a tree can be damaged
        raise DataError(
            f"{printable(path)}: damaged, its keys cannot be listed ({printable(str(error), 300)})"
        ) from None


def _read_hdf5(file: h5py.File, path: str, key: str) -> np.ndarray:
    """One dataset as an array. Raises BrokenImage for whatever is no ordinary array of numbers."""
    try:
        dataset = _follow(file, key)
        _check_dataset(dataset)
        return dataset[()]
    except BrokenImage:
        raise
    except Exception as error:
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise BrokenImage(path, f"{printable(key)}: {said}") from None


def _follow(group: Any, name: str, depth: int = 0) -> Any:
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
            group = _follow(start, link.path, depth + 1)
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
            f"{size:,} bytes of shape {show(dataset.shape)}; at most {ARRAY_SIZE_LIMIT:,} are read for an image"
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


def _match_keys(keys: Iterable[str], pattern: str) -> Iterator[tuple[int, re.Match]]:
    """Image ids with the matches of their keys. The digits may start with zeros, as in COCO's file names."""
    for key in keys:
        match = re.fullmatch(pattern, key)
        if match and int(match[1]) <= LARGEST_ID:
            yield int(match[1]), match


# .npy files


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
        raise ValueError(f"the header says {expected:,} bytes of shape {show(shape)}, the file holds {found:,}")
    stream.seek(0)
    return np.load(stream, allow_pickle=False)


def _read_regular(path: str | os.PathLike, limit: int) -> bytes:
    """`read_file` without the name, which the callers put in front."""
    try:
        return read_file(path, limit)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{printable(path)}: ")) from None
