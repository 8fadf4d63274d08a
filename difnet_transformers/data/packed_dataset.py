"""The packed dataset: its columns, the codec of its values, opening it, and its rows as tensors.

`difnet pack` writes it, `datasets.load_from_disk` opens it, or `load_dataset` where it is Parquet (`parquet.py`). In
place of the original's `data/field.py`, which opens the HDF5 file for every item, rows are gathered from the
memory-mapped Arrow file: each is copied once, straight into its place in the batch.

Packing imports this module and stays small in memory: torch is imported where tensors are made.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..command_line import requires
from ..files import check_regular_file, path_inside, printable, read_json
from .grids import grid_shape

with requires("data"):
    from datasets import (
        Array2D,
        Dataset,
        Features,
        List,
        Value,
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

if TYPE_CHECKING:
    import torch


FLOAT16_ERROR = 2**-11
FLOAT16_FLOOR = 2**-10
FLOAT16_SMALLEST_NORMAL = 2**-14
FLOAT16_OVERFLOW = 65520  # rounds to infinity
LARGEST_SEGMENTATION = 2**16  # values; positions are uint16
PACKED_COLUMNS = ("image_id", "file_name", "grid_features", "grid_cells", "captions")
FINGERPRINTED_BYTES = 2**28  # of the grid features of a split; a second of work


def packed_features(
    dtype: str = "float16",
    grid_size: int | Sequence[int] = 7,
    grid_feature_size: int = 2048,
    with_segmentation: bool = True,
) -> Features:
    """The columns of a packed dataset, one row an image.

    `grid_cells` counts the cells that the source had (at most those of `grid_size`); the rows of `grid_features`
    behind them are zeros. `segmentation_features` is what `encode_segmentation` makes; the paper's baseline goes
    without.
    `restval` says whether a training image comes from the part of COCO's validation images that is used for training.

    Args:
        dtype: of the features, "float16" or "float32".
        grid_size: cells along a side, or rows and columns.
        grid_feature_size: values of a cell.
        with_segmentation: whether there are segmentation features.
    """
    columns = {
        "image_id": Value("int64"),
        "file_name": Value("string"),
        "restval": Value("bool"),
        "grid_features": Array2D((math.prod(grid_shape(grid_size)), grid_feature_size), dtype),
        "grid_cells": Value("uint16"),
        "segmentation_features": Value("binary"),
        "captions": List(Value("string")),
    }
    if not with_segmentation:
        del columns["segmentation_features"]
    return Features(columns)


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the progress bars of 🤗 Datasets, which know nothing of how much work there is."""
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def float16_bound(array: np.ndarray) -> np.ndarray:
    """How far a float16 may be from each value: 2^-11 of it, or of a thousandth of the largest where it is smaller."""
    magnitude = np.abs(array)
    return FLOAT16_ERROR * np.maximum(magnitude, FLOAT16_FLOOR * magnitude.max(initial=0))


def to_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """Values as they are stored.

    Equals comparing every value with `float16_bound`. Only values below the smallest normal float16 are looked at,
    because all others keep 11 bits.

    Args:
        array: float32.
        dtype: "float16" or "float32".

    Raises:
        ValueError: float16 would overflow or be off by more than its bound.
    """
    if dtype == "float32":
        return array
    magnitude = np.abs(array)
    largest = magnitude.max(initial=0)
    if largest >= FLOAT16_OVERFLOW:
        raise ValueError("values too large for float16; use --dtype float32")
    small = array.astype(np.float16)
    below = (magnitude < FLOAT16_SMALLEST_NORMAL) & (magnitude > 0)
    errors = np.abs(small[below].astype(np.float32) - array[below])
    if (errors > FLOAT16_ERROR * np.maximum(magnitude[below], FLOAT16_FLOOR * largest)).any():
        raise ValueError("float16 would lose more than 1/2048 of a value; use --dtype float32")
    return small


def encode_segmentation(segmentation: np.ndarray) -> bytes:
    """The bytes of a (classes, height, width) array of float16 or float32, of which few values are not zero.

    Little-endian: four uint16 (classes, height, width, bytes of a value), the flat positions of the values that are
    not zero as uint16, the values. About 0.4 KB where the dense array of 133 x 7 x 7 takes 13 KB.

    Raises:
        ValueError: another shape or type.
    """
    fits = segmentation.ndim == 3 and segmentation.size <= LARGEST_SEGMENTATION
    if not fits or segmentation.dtype not in (np.float16, np.float32):
        raise ValueError(
            "expected float16 or float32 of shape (classes, height, width) with at most 65,536 values, "
            f"got {segmentation.dtype} {segmentation.shape}"
        )
    flat = segmentation.reshape(-1)
    positions = np.flatnonzero(flat)
    header = np.array([*segmentation.shape, flat.itemsize], dtype="<u2")
    values = flat[positions].astype(f"<f{flat.itemsize}")
    return header.tobytes() + positions.astype("<u2").tobytes() + values.tobytes()


def decode_segmentation(packed: Sequence[bytes], dtype: Any = None) -> np.ndarray:
    """The dense array (B, classes, height, width) of B packed ones, in `dtype` or in the type they were packed in.

    Raises:
        ValueError: they differ in shape or type, or one is damaged.
    """
    if any(not isinstance(item, bytes) or len(item) < 8 for item in packed):
        raise ValueError("a packed segmentation is damaged: its header is missing")
    headers = np.array([np.frombuffer(item, "<u2", 4) for item in packed])
    if len(headers) == 0 or (headers != headers[0]).any():
        raise ValueError("expected one or more packed segmentations of one shape and type")
    *shape, itemsize = headers[0].tolist()
    size = shape[0] * shape[1] * shape[2]
    if itemsize not in (2, 4) or not 0 < size <= LARGEST_SEGMENTATION:
        raise ValueError(f"a packed segmentation is damaged: its header says {shape} and {itemsize} bytes a value")
    dense = np.zeros((len(packed), size), dtype=dtype or f"f{itemsize}")
    for row, item in zip(dense, packed, strict=True):
        count, surplus = divmod(len(item) - 8, 2 + itemsize)
        positions = np.frombuffer(item, "<u2", count, 8)
        if surplus or positions.max(initial=0) >= size:
            raise ValueError(f"a packed segmentation is damaged: its positions do not fit the shape {shape}")
        row[positions] = np.frombuffer(item, f"<f{itemsize}", count, 8 + 2 * count)
    return dense.reshape(len(packed), *shape)


# Opening a packed folder


def packed_splits(folder: str | os.PathLike) -> list[str]:
    """The names of the splits of a packed folder, or of a packed dataset of the Hub.

    Raises:
        ValueError: the folder is no packed dataset; the text says how to make one.
    """
    from .parquet import is_parquet, parquet_files

    shown, place = printable(folder, 300), Path(folder)
    names = place / "dataset_dict.json"
    if not names.exists():
        if is_parquet(folder):
            return list(parquet_files(folder))
        if (place / "state.json").exists():
            return []
        raise ValueError(f"{shown} is not a packed dataset: `difnet pack` makes one.")
    content = read_json(names)
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        raise ValueError(f'{printable(names, 300)}: damaged, it has no list of names "splits"; pack again')
    return splits


def load_packed_split(folder: str | os.PathLike, split: str) -> Dataset:
    """One split of a packed dataset.

    Args:
        folder: what `difnet pack` wrote, also with `--parquet`, or the name of such a dataset on the Hub. Of Parquet
            `datasets` keeps a copy as Arrow in its cache on the disk.
        split: "train", "validation" or "test".

    Raises:
        ValueError: the folder is no packed dataset, has no such split, or is damaged; the text names the file.
    """
    from .parquet import is_parquet, load_parquet_split, parquet_files

    shown, place = printable(folder, 300), Path(folder)
    files = parquet_files(folder) if is_parquet(folder) else None
    splits = packed_splits(folder) if files is None else list(files)
    if split not in splits:
        found = printable(", ".join(splits)) or "no splits"
        raise ValueError(f"{shown} has no split {split!r}, it has {found}.")
    if files is None:
        place = path_inside(folder, split)
        dataset = _load_arrow_split(place, shown)
    else:
        dataset = load_parquet_split(files[split], split)
    if len(dataset) == 0:
        raise ValueError(f"{shown}: the split {split!r} is empty.")
    try:
        _check_table(dataset)
    except Exception as error:
        said = printable(" ".join(str(error).split()), 200)
        raise ValueError(f"{printable(place, 300)}: damaged ({said}); pack again") from None
    return dataset


def _load_arrow_split(place: Path, shown: str) -> Dataset:
    """The dataset in the folder of a split."""
    data_files = _data_files(place)
    try:
        dataset = Dataset.load_from_disk(str(place))
        features = dataset.features
    except Exception as error:
        # Damage shows in whatever part of datasets, pyarrow or fsspec it reaches first.
        names = ", ".join(path.name for path in data_files[:3])
        said = printable(" ".join(str(error).split()), 200)
        raise ValueError(
            f"{printable(place, 300)}: damaged ({names}, state.json or dataset_info.json: {type(error).__name__}: "
            f"{said}); pack again"
        ) from None
    if "grid_features" not in features:
        raise ValueError(f"{shown} is a dataset, but not a packed one: `difnet pack` makes it.")
    return dataset


def _data_files(split: Path) -> list[Path]:
    """The Arrow files of a split. `datasets` would follow their names to wherever they lead."""
    state_file = split / "state.json"
    state = read_json(state_file)
    entries = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f'{printable(state_file, 300)}: damaged, it has no list "_data_files"; pack again')
    paths = []
    for entry in entries:
        try:
            path = path_inside(split, entry.get("filename"))
            check_regular_file(path)
        except FileNotFoundError:
            raise ValueError(
                f"{printable(split / entry['filename'], 300)}: missing, though state.json names it; copy the whole "
                "folder, or pack again"
            ) from None
        except ValueError as error:
            raise ValueError(f"{printable(state_file, 300)}: {error}") from None
        paths.append(path)
    if not isinstance(read_json(split / "dataset_info.json"), dict):
        raise ValueError(f"{printable(split / 'dataset_info.json', 300)}: damaged, it is no object; pack again")
    return paths


def _check_table(dataset: Dataset) -> None:
    """ValueError or Arrow's error for a table whose offsets lead out of its buffers: reading it would end Python."""
    missing = [name for name in PACKED_COLUMNS if name not in dataset.features]
    if missing:
        raise ValueError(f"it has no column {', '.join(missing)}")
    columns = [name for name in (*PACKED_COLUMNS, "segmentation_features") if name in dataset.features]
    for name in columns:
        column = dataset.data.column(name)
        column.validate(full=True)
        nulls = column.null_count
        if name == "captions":
            nulls += sum(chunk.flatten().null_count for chunk in column.chunks)
        if nulls:
            raise ValueError(f"{nulls:,} rows without {name}")


# Reading rows


class PackedImages:
    """Rows of one split of a packed dataset as tensors.

    Args:
        dataset: a split that `load_from_disk` opened; also one that was selected from or shuffled.
        dtype: torch type of the features; None (default) is the type they are stored in, which is fastest.
        mask_padded_cells: whether batches with padded cells carry a `grid_attention_mask`. The original attends to
            padded cells: False.
    """

    def __init__(self, dataset: Dataset, dtype: torch.dtype | None = None, mask_padded_cells: bool = True):
        if not isinstance(dataset, Dataset) or "grid_features" not in dataset.features:
            raise ValueError(
                "expected one split of a packed dataset, e.g. load_from_disk(folder)['train']; "
                f"got {type(dataset).__name__}"
            )
        self.dataset = dataset
        self.dtype = dtype
        self.mask_padded_cells = mask_padded_cells
        try:
            self.cell_shape = tuple(dataset.features["grid_features"].shape)
            chunks = [chunk.storage.flatten().flatten() for chunk in dataset.data.column("grid_features").chunks]
            self._grids = [chunk.to_numpy(zero_copy_only=True).reshape(-1, *self.cell_shape) for chunk in chunks]
            self._cells = dataset.data.column("grid_cells").to_numpy()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the packed grid features are damaged ({printable(str(error))}); pack again") from None
        self._starts = np.cumsum([0] + [len(grids) for grids in self._grids])
        if self._starts[-1] != len(self._cells):
            raise ValueError(
                f"the packed grid features are damaged ({self._starts[-1]:,} grids of {len(self._cells):,} images); "
                "pack again"
            )
        self._table_rows = None if dataset._indices is None else dataset._indices.column(0).to_numpy()
        wrong = np.flatnonzero((self._cells < 1) | (self._cells > self.cell_shape[0]))
        if len(wrong):
            raise ValueError(
                f"image {dataset.data.column('image_id')[int(wrong[0])]}: grid_cells is {self._cells[wrong[0]]}, the "
                f"grid has {self.cell_shape[0]} cells; pack again"
            )
        self._with_segmentation = "segmentation_features" in dataset.features

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, rows: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """The features of some rows, in the order given.

        Equals stacking `dataset[row]["grid_features"]` over the rows, and `decode_segmentation` of their
        `segmentation_features`, without a copy or an object for each row in between.

        Returns:
            `grid_features` (B, cells, width); `segmentation_features` (B, classes, height, width) where the dataset
            has them; `grid_attention_mask` (B, cells) int64 if a row has padded cells and `mask_padded_cells`.
        """
        import torch

        table_rows = self._table_rows_of(rows)
        chunks = np.searchsorted(self._starts, table_rows, side="right") - 1
        grids = np.empty((len(table_rows), *self.cell_shape), dtype=self._grids[0].dtype)  # (B, cells, width)
        for position, (chunk, offset) in enumerate(zip(chunks, table_rows - self._starts[chunks], strict=True)):
            grids[position] = self._grids[chunk][offset]
        batch = {"grid_features": torch.from_numpy(grids)}
        if self._with_segmentation:
            column = self.dataset.data.column("segmentation_features")
            packed = [column[row].as_py() for row in table_rows.tolist()]
            batch["segmentation_features"] = torch.from_numpy(self._decode(packed, table_rows))
        if self.dtype is not None:
            batch = {name: tensor.to(self.dtype) for name, tensor in batch.items()}
        cells = self._cells[table_rows]  # (B,)
        if self.mask_padded_cells and (cells < self.cell_shape[0]).any():
            mask = np.arange(self.cell_shape[0]) < cells[:, None]
            batch["grid_attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return batch

    def _table_rows_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows of the Arrow table for rows of the split, which may be a selection."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.min(initial=0) < 0 or rows.max(initial=0) >= len(self):
            raise IndexError(f"the rows of this split are 0 .. {len(self) - 1}, got {rows.min()} .. {rows.max()}")
        return rows if self._table_rows is None else self._table_rows[rows].astype(np.int64)

    def _decode(self, packed: list[bytes], table_rows: np.ndarray) -> np.ndarray:
        try:
            return decode_segmentation(packed)
        except ValueError:
            # Once more one by one, to find the image.
            for item, row in zip(packed, table_rows.tolist(), strict=True):
                try:
                    decode_segmentation([item])
                except ValueError as error:
                    image_id = self.dataset.data.column("image_id")[row]
                    raise ValueError(f"image {image_id}: {error}; pack again") from None
            raise

    @property
    def grid_dtype(self) -> np.dtype:
        """The type that grid features are stored in."""
        return self._grids[0].dtype if self._grids else np.dtype(np.float16)

    def grid(self, row: int) -> np.ndarray:
        """The grid features of one row as they are stored, (cells, width), without a copy."""
        table_row = self._table_rows_of([row])[0]
        chunk = np.searchsorted(self._starts, table_row, side="right") - 1
        return self._grids[chunk][table_row - self._starts[chunk]]

    def cells(self) -> np.ndarray:
        """How many cells each image's grid has without the padded ones, (images,)."""
        return self._cells if self._table_rows is None else self._cells[self._table_rows]

    def captions(self, rows: Sequence[int] | slice) -> list[list[str]]:
        """The captions of some rows."""
        return self.dataset.select_columns("captions").with_format(None)[rows]["captions"]


# Fingerprints


def split_fingerprint(dataset: Dataset) -> dict[str, Any]:
    """What a split holds, in three values that are equal for equal content, wherever it lies, however it was sharded.

    Args:
        dataset: one split of a packed dataset.

    Returns:
        `"images"` and `"captions"`, how many there are, and `"sha256"`, over the ids, names, captions, cells and
        segmentation features of all images in their order, and over the grid features: of all images where these take
        up to 256 MB, else of as many as fit, evenly spread. `difnet pack --verify` compares every value.
    """
    images = PackedImages(dataset)
    digest = hashlib.sha256()
    captions = 0
    columns = [
        name
        for name in ("image_id", "file_name", "restval", "grid_cells", "captions", "segmentation_features")
        if name in dataset.features
    ]
    rows = dataset.select_columns(columns).with_format(None)
    for batch in rows.iter(1000):
        captions += sum(map(len, batch["captions"]))
        for name in columns:
            for value in batch[name]:
                digest.update(value if isinstance(value, bytes) else repr(value).encode("utf-8", "backslashreplace"))
                digest.update(b"\n")
    digest.update(repr((images.cell_shape, str(images.grid_dtype))).encode())
    row_bytes = int(np.prod(images.cell_shape)) * images.grid_dtype.itemsize
    count = max(1, min(len(images), FINGERPRINTED_BYTES // row_bytes))
    for row in np.linspace(0, len(images) - 1, count).astype(np.int64):
        digest.update(np.ascontiguousarray(images.grid(row)).tobytes())
    return {"images": len(images), "captions": captions, "sha256": digest.hexdigest()}


def split_fingerprints(packed: str | os.PathLike | Mapping[str, Dataset]) -> dict[str, dict[str, Any]]:
    """The fingerprint of every split, to tell whether data is what it was: see `split_fingerprint`.

    Args:
        packed: a packed folder, or its splits by name (a `DatasetDict`).

    Raises:
        ValueError: the folder is no packed dataset, or is damaged.
    """
    if not isinstance(packed, Mapping):
        packed = {name: load_packed_split(packed, name) for name in packed_splits(packed)}
    return {name: split_fingerprint(dataset) for name, dataset in packed.items()}
