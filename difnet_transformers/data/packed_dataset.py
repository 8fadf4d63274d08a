"""The packed dataset: its columns, the sparse segmentation codec, and batches for XE, SCST and evaluation.

`scripts/pack_coco.py` writes it, `datasets.load_from_disk` opens it. In place of the original's `data/dataset.py` and
`data/field.py`, which open the HDF5 file for every item, batches are gathered from the memory-mapped Arrow file: every
row is copied once, straight into its place in the batch.

The packing program imports this module and must stay small in memory, which is why torch is imported where batches are
made and not at the top.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..command_line import requires
from ..files import check_regular_file, path_inside, printable, read_json

with requires("data"):
    from datasets import Array2D, Dataset, Features, List, Value

if TYPE_CHECKING:
    import torch

    from processing_difnet import DifnetTokenizer

IGNORED_LABEL = -100
FLOAT16_ERROR = 2**-11
FLOAT16_FLOOR = 2**-10
FLOAT16_SMALLEST_NORMAL = 2**-14
FLOAT16_OVERFLOW = 65520  # rounds to infinity
LARGEST_SEGMENTATION = 2**16  # values; positions are uint16
FINGERPRINTED_BYTES = 2**28  # of the grid features of a split; a second of work


def packed_features(
    dtype: str = "float16", grid_size: int = 7, grid_feature_size: int = 2048, with_segmentation: bool = True
) -> Features:
    """The columns of a packed dataset, one row an image.

    `grid_cells` counts the cells that the source had (at most `grid_size**2`); the rows of `grid_features` behind them
    are zeros. `segmentation_features` is what `encode_segmentation` makes; the paper's baseline goes without.
    `restval` says whether a training image comes from the part of COCO's validation images that is used for training.
    """
    columns = {
        "image_id": Value("int64"),
        "file_name": Value("string"),
        "restval": Value("bool"),
        "grid_features": Array2D((grid_size**2, grid_feature_size), dtype),
        "grid_cells": Value("uint16"),
        "segmentation_features": Value("binary"),
        "captions": List(Value("string")),
    }
    if not with_segmentation:
        del columns["segmentation_features"]
    return Features(columns)


def float16_bound(array: np.ndarray) -> np.ndarray:
    """How far a float16 may be from each value: 2^-11 of it, or of a thousandth of the largest where it is smaller."""
    magnitude = np.abs(array)
    return FLOAT16_ERROR * np.maximum(magnitude, FLOAT16_FLOOR * magnitude.max(initial=0))


def to_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values as they are stored; ValueError where float16 would overflow or be off by more than its bound.

    Equals comparing every value with `float16_bound`. Only values below the smallest normal float16 are looked at,
    because all others keep 11 bits.
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
    """Pack a (classes, height, width) array of float16 or float32, of which few values are not zero.

    Little-endian: four uint16 (classes, height, width, bytes of a value), the flat positions of the values that are
    not zero as uint16, the values. About 0.4 KB where the dense array of 133 x 7 x 7 takes 13 KB.
    """
    if segmentation.ndim != 3 or segmentation.size > 2**16 or segmentation.dtype not in (np.float16, np.float32):
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

PACKED_COLUMNS = ("image_id", "file_name", "grid_features", "grid_cells", "captions")


def packed_splits(folder: str | os.PathLike) -> list[str]:
    """The names of the splits of a packed folder.

    Raises:
        ValueError: the folder is no packed dataset; the text says what it is, or how to make one.
    """
    shown, place = printable(folder, 300), Path(folder)
    names = place / "dataset_dict.json"
    if not names.exists():
        if any(place.glob("data/*.parquet")) or any(place.glob("*.parquet")):
            raise ValueError(
                f"{shown} is packed as Parquet, for the Hub and datasets.load_dataset; this program reads Arrow: pack "
                "without --parquet, or convert it: datasets.load_dataset(FOLDER).save_to_disk(ANOTHER)"
            )
        if (place / "state.json").exists():
            return []
        raise ValueError(f"{shown} is not a packed dataset: scripts/pack_coco.py makes one.")
    content = read_json(names)
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        raise ValueError(f'{printable(names, 300)}: damaged, it has no list of names "splits"; pack again')
    return splits


def load_packed_split(folder: str | os.PathLike, split: str) -> Dataset:
    """One split of a packed dataset.

    Args:
        folder: what `scripts/pack_coco.py` wrote, without `--parquet`.
        split: "train", "validation" or "test".

    Raises:
        ValueError: the folder is no packed dataset, has no such split, or is damaged; the text names the file.
    """
    shown = printable(folder, 300)
    splits = packed_splits(folder)
    if split not in splits:
        found = printable(", ".join(splits)) or "no splits"
        raise ValueError(f"{shown} has no split {split!r}, it has {found}.")
    place = path_inside(folder, split)
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
        raise ValueError(f"{shown} is a dataset, but not a packed one: scripts/pack_coco.py makes it.")
    if len(dataset) == 0:
        raise ValueError(f"{shown}: the split {split!r} is empty.")
    try:
        _check_table(dataset)
    except Exception as error:
        said = printable(" ".join(str(error).split()), 200)
        raise ValueError(f"{printable(place, 300)}: damaged ({said}); pack again") from None
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


def split_fingerprint(dataset: Dataset) -> dict[str, Any]:
    """What a split holds, in three values that are equal for equal content, wherever it lies, however it was sharded.

    Args:
        dataset: one split of a packed dataset.

    Returns:
        `"images"` and `"captions"`, how many there are, and `"sha256"`, over the ids, names, captions, cells and
        segmentation features of all images in their order, and over the grid features: of all images where these take
        up to 256 MB, else of as many as fit, evenly spread. `pack_coco.py --verify` compares every value.
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
        digest.update(np.ascontiguousarray(images.grid(row)).view(np.uint8))
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


# Batches


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

    def read(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The features of some rows, in the order given.

        Equals stacking `dataset[row]["grid_features"]` over the rows, and `decode_segmentation` of their
        `segmentation_features`, without a copy or an object for each row in between.

        Returns:
            `grid_features` (B, cells, width); `segmentation_features` (B, classes, height, width) where the dataset
            has them; `grid_attention_mask` (B, cells) int64 if a row has padded cells and `mask_padded_cells`.
        """
        import torch

        rows = self._rows_of_table(rows)
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        grids = np.empty((len(rows), *self.cell_shape), dtype=self._grids[0].dtype)
        for position, (chunk, offset) in enumerate(zip(chunks, rows - self._starts[chunks], strict=True)):
            grids[position] = self._grids[chunk][offset]
        batch = {"grid_features": torch.from_numpy(grids)}
        if self._with_segmentation:
            column = self.dataset.data.column("segmentation_features")
            packed = [column[row].as_py() for row in rows.tolist()]
            batch["segmentation_features"] = torch.from_numpy(self._decode(packed, rows))
        if self.dtype is not None:
            batch = {name: tensor.to(self.dtype) for name, tensor in batch.items()}
        cells = self._cells[rows]
        if self.mask_padded_cells and (cells < self.cell_shape[0]).any():
            mask = np.arange(self.cell_shape[0]) < cells[:, None]
            batch["grid_attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return batch

    def _rows_of_table(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows of the Arrow table for rows of the split, which may be a selection."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.min(initial=0) < 0 or rows.max(initial=0) >= len(self):
            raise IndexError(f"the rows of this split are 0 .. {len(self) - 1}, got {rows.min()} .. {rows.max()}")
        return rows if self._table_rows is None else self._table_rows[rows].astype(np.int64)

    def _decode(self, packed: list[bytes], rows: np.ndarray) -> np.ndarray:
        try:
            return decode_segmentation(packed)
        except ValueError:
            # Once more one by one, to find the image.
            for item, row in zip(packed, rows.tolist(), strict=True):
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
        table_row = self._rows_of_table([row])[0]
        chunk = np.searchsorted(self._starts, table_row, side="right") - 1
        return self._grids[chunk][table_row - self._starts[chunk]]

    def cells(self) -> np.ndarray:
        """How many cells each image's grid has without the padded ones, (images,)."""
        return self._cells if self._table_rows is None else self._cells[self._table_rows]

    def captions(self, rows: Sequence[int] | slice) -> list[list[str]]:
        """The captions of some rows."""
        return self.dataset.select_columns("captions").with_format(None)[rows]["captions"]


class _Batches:
    """One epoch of batches an iteration: shuffled, shared out over processes, resumable after any batch.

    Epoch `e` goes through the items in the order `numpy.random.default_rng([seed, e]).permutation(n)`. Batch number
    `b` is given to process `b % num_processes`. With `drop_last` only full batches are made, and the same number for
    every process; without, every item comes exactly once, and some processes may get one batch fewer than others.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        dtype: torch.dtype | None = None,
        mask_padded_cells: bool = True,
    ):
        if batch_size < 1 or not 0 <= process_index < num_processes:
            raise ValueError(
                f"expected batch_size >= 1 and 0 <= process_index < num_processes, got {batch_size}, {process_index} "
                f"and {num_processes}"
            )
        self.images = PackedImages(dataset, dtype, mask_padded_cells)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.epoch = 0
        self._next_batch = 0
        self._resumed = False

    def num_items(self) -> int:
        return len(self.images)

    def make_batch(self, items: np.ndarray) -> dict[str, Any]:
        raise NotImplementedError

    def __len__(self) -> int:
        """Batches of one epoch for this process."""
        if self.drop_last:
            return self.num_items() // (self.batch_size * self.num_processes)
        batches = -(-self.num_items() // self.batch_size)
        return len(range(self.process_index, batches, self.num_processes))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._resumed:
            self._next_batch = 0
        self._resumed = False
        order = np.arange(self.num_items())
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_items())
        for batch in range(self._next_batch, len(self)):
            start = (batch * self.num_processes + self.process_index) * self.batch_size
            self._next_batch = batch + 1
            yield self.make_batch(order[start : start + self.batch_size])
        self.epoch += 1
        self._next_batch = 0

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands: the batch after the one that was given out last."""
        return {"epoch": self.epoch, "next_batch": self._next_batch, "seed": self.seed, "items": self.num_items()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on where `state_dict` was taken.

        Raises:
            ValueError: the seed or the data are others, or the numbers are none that `state_dict` gives.
        """
        fields = ("epoch", "next_batch", "seed", "items")
        if not isinstance(state, Mapping) or any(type(state.get(name)) is not int for name in fields):
            raise ValueError(f"the state of the batches is damaged: it needs the integers {', '.join(fields)}")
        if (state["seed"], state["items"]) != (self.seed, self.num_items()):
            raise ValueError(
                f"the state was saved with seed {state['seed']} and {state['items']} items, this is seed {self.seed} "
                f"and {self.num_items()} items; the order of the batches would not be the same"
            )
        if state["epoch"] < 0 or not 0 <= state["next_batch"] <= len(self):
            raise ValueError(
                f"the state says epoch {state['epoch']} and batch {state['next_batch']}; an epoch has {len(self)} "
                "batches"
            )
        self.epoch, self._next_batch, self._resumed = state["epoch"], state["next_batch"], True


class _TokenizedCaptions:
    """The labels `w1 .. wn <eos>` of every caption, in one flat array; tokenized once, when first needed."""

    def __init__(self, images: PackedImages, tokenizer: DifnetTokenizer, max_length: int | None = None):
        ids, lengths, counts = [], [], []
        for start in range(0, len(images), 1000):
            rows = range(start, min(start + 1000, len(images)))
            for row, captions in zip(rows, images.captions(rows), strict=True):
                counts.append(len(captions))
                for words, caption in zip(tokenizer.encode_captions(captions), captions, strict=True):
                    if max_length is not None and len(words) + 1 > max_length:
                        raise ValueError(
                            f"image {images.dataset[row]['image_id']}: a caption has {len(words) + 1} tokens, the "
                            f"model takes {max_length} (max_position_embeddings); shorten it and pack again, or train "
                            f"a model with a longer position table: {caption[:60]!r}.."
                        )
                    ids.extend([*words, tokenizer.eos_token_id])
                    lengths.append(len(words) + 1)
        self.ids = np.array(ids, dtype=np.int32)
        self.unknown_share = float((self.ids == tokenizer.unk_token_id).mean()) if ids else 0.0
        self.starts = np.cumsum([0, *lengths])
        self.image_starts = np.cumsum([0, *counts])

    def labels(self, captions: np.ndarray) -> torch.Tensor:
        """(captions, length) int64, padded with -100 to the longest."""
        import torch

        lengths = self.starts[captions + 1] - self.starts[captions]
        labels = np.full((len(captions), lengths.max(initial=0)), IGNORED_LABEL, dtype=np.int64)
        for row, start, length in zip(labels, self.starts[captions], lengths, strict=True):
            row[:length] = self.ids[start : start + length]
        return torch.from_numpy(labels)


class CaptionPairBatches(_Batches):
    """Batches of (image, caption) pairs, as in the original's XE training: 50, shuffled, the last one dropped.

    A batch goes into the model as it is, `model(**batch)`: the features as `PackedImages.read` gives them, and
    `labels` (B, length) int64, `w1 .. wn <eos>` padded with -100. With `max_length`, a caption of more tokens
    (`<eos>` counted) raises ValueError, which names its image. The other arguments are those of `_Batches` and
    `PackedImages`. `unknown_share` is the share of `<unk>` among all tokens.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: DifnetTokenizer,
        batch_size: int = 50,
        *,
        shuffle: bool = True,
        drop_last: bool = True,
        max_length: int | None = None,
        **options,
    ):
        super().__init__(dataset, batch_size, shuffle=shuffle, drop_last=drop_last, **options)
        self._captions = _TokenizedCaptions(self.images, tokenizer, max_length)
        self.unknown_share = self._captions.unknown_share

    def num_items(self) -> int:
        return int(self._captions.image_starts[-1])

    def make_batch(self, items: np.ndarray) -> dict[str, Any]:
        rows = np.searchsorted(self._captions.image_starts, items, side="right") - 1
        return {**self.images.read(rows), "labels": self._captions.labels(items)}


class ImageCaptionBatches(_Batches):
    """Batches of images with all their captions, so that the encoder runs once an image.

    Beside the features of B images: `labels` (captions of all B images, length) and `image_index` (captions,) int64,
    the number in the batch of each caption's image, e.g. for `last_hidden_state[batch["image_index"]]`. `max_length`
    and `unknown_share` are those of `CaptionPairBatches`.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: DifnetTokenizer,
        batch_size: int = 10,
        *,
        shuffle: bool = True,
        drop_last: bool = True,
        max_length: int | None = None,
        **options,
    ):
        super().__init__(dataset, batch_size, shuffle=shuffle, drop_last=drop_last, **options)
        self._captions = _TokenizedCaptions(self.images, tokenizer, max_length)
        self.unknown_share = self._captions.unknown_share

    def make_batch(self, items: np.ndarray) -> dict[str, Any]:
        import torch

        starts = self._captions.image_starts
        captions = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in items])
        image_index = np.repeat(np.arange(len(items)), starts[items + 1] - starts[items])
        return {
            **self.images.read(items),
            "labels": self._captions.labels(captions),
            "image_index": torch.from_numpy(image_index),
        }


class ReferenceBatches(_Batches):
    """Batches of images with their raw captions, for SCST (`shuffle=True, drop_last=True`) and for evaluation.

    Beside the features of B images: `image_ids`, a list of B integers, and `references`, B lists of strings.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int = 10, *, shuffle: bool = False, drop_last: bool = False, **options
    ):
        super().__init__(dataset, batch_size, shuffle=shuffle, drop_last=drop_last, **options)
        self._texts = dataset.select_columns(["image_id", "captions"]).with_format(None)

    def make_batch(self, items: np.ndarray) -> dict[str, Any]:
        texts = self._texts[items.tolist()]
        return {**self.images.read(items), "image_ids": texts["image_id"], "references": texts["captions"]}


class CaptionPairs:
    """(image, caption) pairs as a map-style dataset, for `transformers.Seq2SeqTrainer` or a `DataLoader`.

    Item `i` is a dictionary of tensors: `grid_features` (cells, width), where the dataset has them
    `segmentation_features` (classes, height, width), where any image of the split has padded cells
    `grid_attention_mask` (cells,), and `labels` (length,) int64, `w1 .. wn <eos>`. `CaptionCollator` makes a batch of
    items. The pairs of an image follow one another, in the order of the split.

    Args:
        dataset, dtype, mask_padded_cells: as for `PackedImages`.
        tokenizer: the model's.
        max_length: a caption of more tokens (`<eos>` counted) raises ValueError, which names its image.
        captions_per_image: how many of an image's captions to take, the first ones; None (default) takes all. With 1
            every image comes once, which is what generating captions for an evaluation needs.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: DifnetTokenizer,
        *,
        captions_per_image: int | None = None,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        mask_padded_cells: bool = True,
    ):
        if captions_per_image is not None and captions_per_image < 1:
            raise ValueError(f"expected captions_per_image >= 1, or None for all captions, got {captions_per_image}")
        self.images = PackedImages(dataset, dtype, mask_padded_cells)
        self._captions = _TokenizedCaptions(self.images, tokenizer, max_length)
        starts = self._captions.image_starts
        counts = np.diff(starts)
        if captions_per_image is not None:
            counts = np.minimum(counts, captions_per_image)
        # The image and the caption of each pair.
        self._rows = np.repeat(np.arange(len(counts)), counts)
        first_pairs = np.cumsum([0, *counts])[:-1]
        self._numbers = starts[self._rows] + np.arange(len(self._rows)) - first_pairs[self._rows]
        self._has_padded_cells = mask_padded_cells and bool((self.images.cells() < self.images.cell_shape[0]).any())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Several items, read together; `DataLoader` prefers it."""
        import torch

        indices = np.asarray(indices)
        rows = self._rows[indices]
        features = self.images.read(rows)
        if self._has_padded_cells and "grid_attention_mask" not in features:
            features["grid_attention_mask"] = torch.ones(features["grid_features"].shape[:2], dtype=torch.int64)
        items = [dict(zip(features, tensors, strict=True)) for tensors in zip(*features.values(), strict=True)]
        for item, number in zip(items, self._numbers[indices], strict=True):
            item["labels"] = self._captions.labels(np.array([number]))[0]
        return items


@dataclass
class CaptionCollator:
    """Makes a batch for `model(**batch)` of the items of `CaptionPairs`.

    Features are stacked; an item without a mask, beside others with one, has only real cells. `labels` (B, length)
    are padded with -100 to the longest. `decoder_input_ids` (B, length), `<bos> w1 .. wn <pad> ..`, are what the model
    makes of the labels by itself; they are there for a loss that is computed outside of the model, such as the
    Trainer's label smoothing. Items without `labels`, images to predict captions for, make a batch without both.

    Args:
        tokenizer: the model's.

    Raises:
        ValueError: something that only some of the items have.
    """

    tokenizer: DifnetTokenizer

    def __call__(self, items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        import torch

        names = dict.fromkeys(name for item in items for name, value in item.items() if value is not None)
        batch = {}
        for name in names:
            values = [item.get(name) for item in items]
            given = next(value for value in values if value is not None)
            missing = next((i for i, value in enumerate(values) if value is None), None)
            if name.endswith("_attention_mask"):
                values = [torch.ones_like(given) if value is None else value for value in values]
            elif missing is not None:
                raise ValueError(
                    f"`{name}` is missing in item {missing} of a batch whose other items have it: give it to all or "
                    "to none."
                )
            if name != "labels":
                batch[name] = torch.stack(values)
        if "labels" not in names:
            return batch
        labels = [item["labels"] for item in items]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)
        words = batch["labels"][:, :-1].masked_fill(
            batch["labels"][:, :-1] == IGNORED_LABEL, self.tokenizer.pad_token_id
        )
        batch["decoder_input_ids"] = torch.nn.functional.pad(words, (1, 0), value=self.tokenizer.bos_token_id)
        return batch
