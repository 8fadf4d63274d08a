"""Features that were made before, in the place of images: the shards and the items of feature files.

Parquet as `difnet extract --format parquet` and `difnet pack --parquet` write it, with both kinds of features in a row
and keys of any form, from wherever fsspec reads; and HDF5 files on a disk, with the segmentation features beside them.
The original (mrwu-mac/DIFNet, CVPR 2022) captions the splits of one HDF5 file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modeling_difnet.images_difnet import is_url

from ..command_line import requires
from ..data.feature_files import HDF5_SUFFIXES, GridFiles, SegmentationFiles, is_table, options_of_folder
from ..data.feature_records import FeatureRecords, provenance_of_dataset, records_in
from ..data.feature_tables import METADATA_KEY, arrays_of, files_of_output
from ..data.packed_dataset import decode_segmentation
from ..data.parquet import open_parquet
from ..files import printable
from .columns import FEATURE_COLUMN, key_column_of
from .inputs import InputConfig, InputShard, local_stamp
from .places import SUFFIXES_OF, expand, hash_of, stamp_of_place
from .readers import ImageItem, key_of, rows_of_parquet, text_of, value_of

with requires("data"):
    import pyarrow as pa

FEATURE_COLUMNS = (FEATURE_COLUMN, "grid_cells", "segmentation_features")


class StoredFeatures(NamedTuple):
    """The features of an image, the content of an `ImageItem`.

    Args:
        grid: (cells, C), float32.
        segmentation: (classes, rows, columns), or what is wrong with them; `None` where the input has none at all.
        records: of the networks that made them, the same object for all images of a shard.
    """

    grid: np.ndarray
    segmentation: np.ndarray | Exception | None
    records: FeatureRecords

    @property
    def num_bytes(self) -> int:
        return self.grid.nbytes + (self.segmentation.nbytes if isinstance(self.segmentation, np.ndarray) else 0)


# Shards


def feature_shards(config: InputConfig) -> list[InputShard]:
    """The shards of feature files; `InputConfig.places` are files, folders, URLs and patterns.

    Raises:
        ValueError: a place holds no features, or `InputConfig.segmentation` has nothing beside which it lies.
    """
    files = [file for place in config.places for file in feature_files(place)]
    of_hdf5 = [file for file in files if not is_table(file)]
    if config.segmentation is not None and not of_hdf5:
        raise ValueError(
            "--segmentation goes with grid features in HDF5; Parquet files of features have both in a row"
        )
    shards = []
    for file in files:
        shards += table_shards(file, config) if is_table(file) else hdf5_shards(file, config)
    return shards


def feature_files(place: str) -> list[str]:
    """The feature files that a place means; of what `difnet extract` or `difnet pack --parquet` made, those in `data`.

    Raises:
        ValueError: there are none, or not all.
    """
    shown = printable(place, 300)
    if is_url(place) and place.lower().endswith(HDF5_SUFFIXES):
        raise ValueError(f"{shown}: HDF5 files are read from a disk alone; copy it there")
    if os.path.isdir(place):
        if os.path.exists(os.path.join(place, "dataset_dict.json")):
            raise ValueError(f"{shown}: a packed dataset in Arrow; difnet pack --parquet makes files for this")
        made = files_of_output(place)
        if made:
            return made
        if not any(name.lower().endswith(SUFFIXES_OF["parquet"]) for _, _, names in os.walk(place) for name in names):
            options = options_of_folder(place)
            said = "difnet extract makes features" if options is None else f"give {options}"
            raise ValueError(f"{shown}: no Parquet files of features in this folder; {said}")
    return [file for file, _ in expand(place, "parquet")]


def table_shards(file: str, config: InputConfig) -> list[InputShard]:
    """Rows of a Parquet file; one that cannot be read is a shard, whose only row says so."""
    stamp, size = stamp_of_place(file)
    fingerprint = hash_of([file, stamp])
    try:
        with open_parquet(file) as opened:
            num_rows, names = opened.metadata.num_rows, opened.schema_arrow.names
    except ValueError:
        return [InputShard(0, "features", file, fingerprint=fingerprint, num_bytes=size)]
    if FEATURE_COLUMN not in names:
        raise ValueError(
            f"{printable(file, 300)}: no column {FEATURE_COLUMN} among {printable(', '.join(names), 300)}; "
            "difnet extract --format parquet --grid-backbone makes it"
        )
    key_column_of(names, config.key_column, file)
    return _cut(file, num_rows, config.images_per_shard, lambda start, stop: fingerprint)


def hdf5_shards(file: str, config: InputConfig) -> list[InputShard]:
    """Images of an HDF5 file, in the order of their ids; its fingerprints have the segmentation features too."""
    if not os.path.exists(file):
        raise ValueError(f"{printable(file, 300)}: no such file or folder")
    stamp, _ = stamp_of_place(file)
    ids = list(_grids(file, stamp).ids)
    where, names = config.segmentation, dict[int, str]()
    if where is not None:
        stamp += "" if os.path.isdir(where) else stamp_of_place(where)[0]
        names |= _segmentations(where, _stamp_of_segmentations(where)).name_of

    def fingerprint(start: int, stop: int) -> str:
        paths = {
            image_id: os.path.join(where or "", names[image_id]) for image_id in ids[start:stop] if image_id in names
        }
        is_folder = where is not None and os.path.isdir(where)
        stamps = {image_id: local_stamp(path) for image_id, path in paths.items()} if is_folder else {}
        return hash_of(
            [file, stamp, str(where), *(f"{image_id} {stamps.get(image_id)}" for image_id in ids[start:stop])]
        )

    return _cut(file, len(ids), config.images_per_shard, fingerprint)


def _cut(file: str, number: int, per_shard: int, fingerprint: Any) -> list[InputShard]:
    count = max(1, round(number / per_shard))
    edges = [number * index // count for index in range(count + 1)]
    return [
        InputShard(0, "features", file, start, stop, fingerprint=fingerprint(start, stop))
        for start, stop in pairwise(edges)
        if stop > start
    ]


class _Grids(NamedTuple):
    files: GridFiles
    ids: Sequence[int]
    records: FeatureRecords


class _Segmentations(NamedTuple):
    files: SegmentationFiles
    name_of: Mapping[int, str]
    record: dict[str, Any] | None


@lru_cache(maxsize=2)
def _grids(file: str, stamp: str) -> _Grids:
    """An HDF5 file, whose keys take a second to list; `stamp` changes with it."""
    files = GridFiles((file,))
    return _Grids(files, sorted(files.index()), FeatureRecords(grid_backbone=files.grid_backbone()))


@lru_cache(maxsize=2)
def _segmentations(place: str, stamp: str) -> _Segmentations:
    files = SegmentationFiles(place)
    return _Segmentations(files, files.index(), files.record())


def _stamp_of_segmentations(place: str) -> str:
    if not os.path.exists(place):
        raise ValueError(f"{printable(place, 300)}: no such file or folder")
    return stamp_of_place(place)[0]


# Items


def read_features(shard: InputShard, config: InputConfig) -> Iterator[ImageItem]:
    """The images of a shard of features, in its order; of one whose features cannot be used, what is wrong."""
    return read_table(shard, config) if is_table(shard.source) else read_hdf5(shard, config)


def read_table(shard: InputShard, config: InputConfig) -> Iterator[ImageItem]:
    """Rows of a Parquet file. A file that is damaged ends with an item that says so."""
    source, names, records = text_of(shard.source), list[str](), FeatureRecords()

    def columns_of(schema: pa.Schema) -> list[str]:
        nonlocal names, records
        records = records_of_table(schema, shard.source)
        names = [name for name in ("error", *FEATURE_COLUMNS) if name in schema.names]
        key = key_column_of(schema.names, config.key_column, source)
        return names if key is None else [*names, key]

    for first, columns in rows_of_parquet(shard, columns_of):
        if isinstance(columns, Exception):
            yield ImageItem(source, source, columns)
            continue
        values = [_values(column) for column in columns[: len(names)]]
        for row in range(len(columns[0])):
            key = value_of(columns[-1][row]) if len(columns) > len(names) else None
            found = dict(zip(names, (each[row] for each in values), strict=True))
            content: Any = features_of_row(found, records)
            yield ImageItem(key_of(key, f"{source}#{first + row}"), source, content)


def _values(column: pa.Array) -> list[Any]:
    if isinstance(column, pa.ExtensionArray):  # arrays of 🤗 Datasets
        column = column.storage
    return arrays_of(pa.chunked_array([column])) if pa.types.is_list(column.type) else column.to_pylist()


def records_of_table(schema: pa.Schema, file: str | None = None) -> FeatureRecords:
    """What a table of features says of the networks: `difnet extract` in its schema, `difnet pack` beside the file."""
    try:
        said = json.loads((schema.metadata or {})[METADATA_KEY])
    except (KeyError, ValueError):
        said = {} if file is None or is_url(file) else provenance_of_dataset(Path(file).absolute().parent.parent)
    return records_in(said)


def features_of_row(row: Mapping[str, Any], records: FeatureRecords) -> StoredFeatures | Exception:
    """The features of a row of a table, or what is wrong with them.

    Args:
        row: "grid_features", and what there is of "grid_cells", "segmentation_features" and "error".
        records: of the networks.
    """
    if row.get("error") is not None or row.get(FEATURE_COLUMN) is None:
        return ValueError(row.get("error") or f"the row has no {FEATURE_COLUMN}")
    try:
        grid = np.asarray(row[FEATURE_COLUMN], dtype=np.float32)  # (cells, C)
    except (TypeError, ValueError):
        return ValueError(f"its {FEATURE_COLUMN} are no grid: cells of one number of values each")
    if row.get("grid_cells") is not None:
        grid = grid[: row["grid_cells"]]  # the others are padding
    segmentation: np.ndarray | Exception | None = None
    if "segmentation_features" in row:
        try:
            if row["segmentation_features"] is None:
                raise ValueError("the row has no segmentation_features")
            segmentation = decode_segmentation([row["segmentation_features"]], np.float32)[0]
        except ValueError as error:
            segmentation = error
    return StoredFeatures(grid, segmentation, records)


def read_hdf5(shard: InputShard, config: InputConfig) -> Iterator[ImageItem]:
    """Images of an HDF5 file. Their keys are their ids, as text."""
    source = text_of(shard.source)
    grids = _grids(shard.source, stamp_of_place(shard.source)[0])
    where, beside, records = config.segmentation, None, grids.records
    if where is not None:
        beside = _segmentations(where, _stamp_of_segmentations(where))
        records = records._replace(segmentation_model=beside.record)
    for image_id in grids.ids[shard.start : shard.stop]:
        segmentation: np.ndarray | Exception | None = None
        try:
            if beside is not None and image_id not in beside.name_of:
                segmentation = ValueError(f"not in {printable(where)}")
            elif beside is not None:
                segmentation = beside.files.read(beside.name_of[image_id])[0]
        except ValueError as error:
            segmentation = error
        try:
            content: Any = StoredFeatures(grids.files.read(shard.source, image_id), segmentation, records)
        except ValueError as error:
            content = error
        yield ImageItem(str(image_id), source, content)
