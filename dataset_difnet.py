"""The packed dataset: its columns, the sparse segmentation codec, and batches for XE, SCST and evaluation.

`scripts/pack_coco.py` writes it, `datasets.load_from_disk` opens it. In place of the original's `data/dataset.py` and
`data/field.py`, which open the HDF5 file for every item, batches are gathered from the memory-mapped Arrow file: every
row is copied once, straight into its place in the batch.

The packing program imports this module and must stay small in memory, which is why torch is imported where batches are
made and not at the top.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Array2D, Dataset, DatasetDict, Features, List, Value, load_from_disk

if TYPE_CHECKING:
    import torch

    from processing_difnet import DifnetTokenizer

IGNORED_LABEL = -100
FLOAT16_ERROR = 2**-11
FLOAT16_FLOOR = 2**-10
FLOAT16_SMALLEST_NORMAL = 2**-14
FLOAT16_OVERFLOW = 65520  # rounds to infinity


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
    """The dense array (B, classes, height, width) of B packed ones, in `dtype` or in the type they were packed in."""
    headers = np.array([np.frombuffer(item, "<u2", 4) for item in packed])
    if len(headers) == 0 or (headers != headers[0]).any():
        raise ValueError("expected one or more packed segmentations of one shape and type")
    *shape, itemsize = headers[0].tolist()
    dense = np.zeros((len(packed), int(np.prod(shape))), dtype=dtype or f"f{itemsize}")
    for row, item in zip(dense, packed, strict=True):
        count = (len(item) - 8) // (2 + itemsize)
        row[np.frombuffer(item, "<u2", count, 8)] = np.frombuffer(item, f"<f{itemsize}", count, 8 + 2 * count)
    return dense.reshape(len(packed), *shape)


def load_packed_split(folder: str | Path, split: str) -> Dataset:
    """One split of a packed dataset.

    Raises:
        ValueError: the folder is no packed dataset, or has no such split.
    """
    try:
        packed = load_from_disk(str(folder))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} is not a packed dataset: scripts/pack_coco.py makes one.") from None
    if not isinstance(packed, DatasetDict) or split not in packed:
        found = ", ".join(packed) if isinstance(packed, DatasetDict) else "no splits"
        raise ValueError(f"{folder} has no split {split!r}, it has {found}.")
    if "grid_features" not in packed[split].features:
        raise ValueError(f"{folder} is a dataset, but not a packed one: scripts/pack_coco.py makes it.")
    if len(packed[split]) == 0:
        raise ValueError(f"{folder}: the split {split!r} is empty.")
    return packed[split]


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
        self.cell_shape = dataset.features["grid_features"].shape
        chunks = [chunk.storage.flatten().flatten() for chunk in dataset.data.column("grid_features").chunks]
        self._grids = [chunk.to_numpy(zero_copy_only=True).reshape(-1, *self.cell_shape) for chunk in chunks]
        self._starts = np.cumsum([0] + [len(grids) for grids in self._grids])
        self._table_rows = None if dataset._indices is None else dataset._indices.column(0).to_numpy()
        self._cells = dataset.data.column("grid_cells").to_numpy()
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

        rows = np.asarray(rows, dtype=np.int64)
        if rows.min(initial=0) < 0 or rows.max(initial=0) >= len(self):
            raise IndexError(f"the rows of this split are 0 .. {len(self) - 1}, got {rows.min()} .. {rows.max()}")
        if self._table_rows is not None:
            rows = self._table_rows[rows].astype(np.int64)
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        grids = np.empty((len(rows), *self.cell_shape), dtype=self._grids[0].dtype)
        for position, (chunk, offset) in enumerate(zip(chunks, rows - self._starts[chunks], strict=True)):
            grids[position] = self._grids[chunk][offset]
        batch = {"grid_features": torch.from_numpy(grids)}
        if self._with_segmentation:
            column = self.dataset.data.column("segmentation_features")
            packed = [column[row].as_py() for row in rows.tolist()]
            batch["segmentation_features"] = torch.from_numpy(decode_segmentation(packed))
        if self.dtype is not None:
            batch = {name: tensor.to(self.dtype) for name, tensor in batch.items()}
        cells = self._cells[rows]
        if self.mask_padded_cells and (cells < self.cell_shape[0]).any():
            mask = np.arange(self.cell_shape[0]) < cells[:, None]
            batch["grid_attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return batch

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
        """Let the next iteration go on where `state_dict` was taken; ValueError if seed or data are others."""
        if (state["seed"], state["items"]) != (self.seed, self.num_items()):
            raise ValueError(
                f"the state was saved with seed {state['seed']} and {state['items']} items, this is seed {self.seed} "
                f"and {self.num_items()} items; the order of the batches would not be the same"
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
