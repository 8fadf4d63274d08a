"""Features in Parquet files, as `difnet extract --format parquet` writes them: a row for each image.

Rows are read a group at a time, and the last groups are kept, because images come in about the order of their rows.
The original (mrwu-mac/DIFNet, CVPR 2022) has one HDF5 file and a folder of `.npy` files.
"""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..command_line import requires
from ..files import check_regular_file, printable
from .errors import IDS_PER_LINE, BrokenImage, DataError, join_ids
from .packed_dataset import decode_segmentation

with requires("data"):
    import pyarrow as pa
    import pyarrow.parquet as pq

SUFFIX = ".parquet"
METADATA_KEY = b"difnet"
GROUPS_KEPT = 4  # of 64 images, 13 MB each
NUMBERED = re.compile(r"(.+)-[0-9]+-of-([0-9]{1,9})")
KEY_WITH_ID = re.compile(r"(?:COCO_[a-z]+[0-9]+_)?([0-9]{1,18})")


def expand_folders(paths: Sequence[str]) -> list[str]:
    """Paths, of which outputs of `difnet extract --format parquet` are replaced by the files in them.

    Raises:
        DataError: one of these is not finished.
    """
    found: list[str] = []
    for path in paths:
        found += files_of_output(path) or [path]
    return found


def files_of_output(folder: str) -> list[str]:
    """The files of what `difnet extract --format parquet` or `difnet pack --parquet` made; none of anything else.

    Raises:
        DataError: it is not finished: `NAME-00003-of-00008` is there, and another one is not.
    """
    files = sorted(map(str, Path(folder, "data").glob(f"*{SUFFIX}"))) if os.path.isdir(folder) else []
    matches = [match for file in files if (match := NUMBERED.fullmatch(Path(file).stem))]
    for name, number in sorted({(match[1], match[2]) for match in matches}):
        there = sum((match[1], match[2]) == (name, number) for match in matches)
        if there < int(number):
            raise DataError(
                f"{printable(folder, 300)}: {there:,} of {int(number):,} files of {printable(name)} are there; the "
                "command that made them resumes and makes the others (to take these alone, name them: "
                f"{printable(folder, 300)}/data/*{SUFFIX})"
            )
    return files


class FeatureTable:
    """The features in one file.

    Args:
        path: of the file.

    Raises:
        DataError: it is no such file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._groups: OrderedDict[int, dict[str, list[Any]]] = OrderedDict()
        try:
            check_regular_file(path)
            self.file = pq.ParquetFile(path)
        except (OSError, ValueError, pa.ArrowException) as error:
            said = printable(" ".join(str(error).split()), 200)
            raise DataError(f"{printable(path)}: not a readable Parquet file ({said})") from None
        names = self.file.schema_arrow.names
        if "key" not in names or not {"grid_features", "segmentation_features"} & set(names):
            raise DataError(
                f"{printable(path)}: no columns key and grid_features or segmentation_features; "
                "`difnet extract --format parquet` makes such files (difnet caption --output takes those of difnet "
                "pack --parquet too)"
            )
        self._rows: dict[int, int] | None = None

    def rows(self) -> dict[int, int]:
        """The row of every image that has features, by the id in its key.

        Raises:
            DataError: a key has no id, or two have the same.
        """
        if self._rows is None:
            names = ["key"] + (["error"] if "error" in self.file.schema_arrow.names else [])
            table = self.file.read(names).to_pydict()
            errors = table.get("error") or [None] * len(table["key"])
            found: dict[int, int] = {}
            twice = []
            for row, (key, error) in enumerate(zip(table["key"], errors, strict=True)):
                if error is not None:
                    continue
                match = KEY_WITH_ID.fullmatch(PurePosixPath(key).name.partition(".")[0])
                if match is None:
                    raise DataError(
                        f"{printable(self.path)}: the key {printable(key)} has no image id, such as 42 or "
                        "COCO_val2014_000000000042.jpg; extract with --key-column of the ids (difnet caption --output "
                        "takes any key)"
                    )
                twice += [int(match[1])] if int(match[1]) in found else []
                found[int(match[1])] = row
            if twice:
                raise DataError(f"{printable(self.path)}: duplicate image ids: {join_ids(twice[:IDS_PER_LINE])}")
            self._rows = found
        return self._rows

    def record(self, name: str) -> dict[str, Any] | None:
        """What `difnet extract` says about the network "grid_backbone" or "segmentation_model"."""
        try:
            said = json.loads((self.file.schema_arrow.metadata or {})[METADATA_KEY])[name]
        except (KeyError, TypeError, ValueError):
            return None
        return said if isinstance(said, dict) else None

    def read_grid(self, image_id: int) -> np.ndarray:
        """Grid features (cells, C) of an image.

        Raises:
            BrokenImage: there are none, or they are damaged.
        """
        value = self._cell("grid_features", image_id)
        try:
            return np.array(value, dtype=np.float32)
        except (TypeError, ValueError):
            raise BrokenImage(self.path, f"the grid of image {image_id} is damaged") from None

    def read_segmentation(self, image_id: int) -> np.ndarray:
        """Segmentation features (classes, rows, columns) of an image.

        Raises:
            BrokenImage: there are none, or they are damaged.
        """
        try:
            return decode_segmentation([self._cell("segmentation_features", image_id)], np.float32)[0]
        except BrokenImage:
            raise
        except ValueError as error:
            raise BrokenImage(self.path, f"image {image_id}: {error}") from None

    def _cell(self, column: str, image_id: int) -> Any:
        row = self.rows().get(image_id)
        if row is None or column not in self.file.schema_arrow.names:
            raise BrokenImage(self.path, f"no {column} of image {image_id}")
        group = 0
        while row >= self.file.metadata.row_group(group).num_rows:
            row -= self.file.metadata.row_group(group).num_rows
            group += 1
        if group not in self._groups:
            names = [
                name for name in ("grid_features", "segmentation_features") if name in self.file.schema_arrow.names
            ]
            try:
                table = self.file.read_row_group(group, names)
            except (OSError, pa.ArrowException) as error:
                said = printable(" ".join(str(error).split()), 200)
                raise DataError(f"{printable(self.path)}: damaged or cut off ({said})") from None
            self._groups[group] = {name: arrays_of(table.column(name)) for name in names}
            while len(self._groups) > GROUPS_KEPT:
                self._groups.popitem(last=False)
        return self._groups[group][column][row]


def arrays_of(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column: bytes as they are, lists of lists as arrays (cells, C) without a copy of each number."""
    if pa.types.is_binary(column.type):
        return column.to_pylist()
    found: list[Any] = []
    for chunk in column.chunks:
        for each in chunk:
            if not each.is_valid:
                found.append(None)
                continue
            cells = each.values  # a list for each cell
            flat = cells.flatten().to_numpy(zero_copy_only=False)
            found.append(flat.reshape(len(cells), -1))
    return found
