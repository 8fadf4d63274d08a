"""Training data that does not fit on the disk: Parquet files, of a folder or of the Hub, read as they are trained on.

One pass over the captions alone, kept beside the run, says what an epoch needs to know: how many images and captions
every file has, the words of the vocabulary and the document frequencies of CIDEr-D. Grid features are read when their
turn comes, by `datasets.load_dataset(.., streaming=True)`.

`IterableDataset.shuffle` loses what is in its buffer when it resumes. Here an epoch goes through the files in a random
order, in blocks of `shuffle_buffer` images, and each block is permuted by a seed of its own. A position is then the
state of the `IterableDataset` at the beginning of a block and the number of items that were taken of it: a run resumes
with the item that would have come next. The original (mrwu-mac/DIFNet, CVPR 2022) reads any item from the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from ..command_line import reason_of, requires
from ..files import atomic_output, printable
from .batches import Batches, CaptionPairBatches, ReferenceBatches, TokenizedCaptions, check_same_order
from .parquet import (
    KINDS_OF_COLUMNS,
    ParquetSummary,
    is_parquet,
    open_parquet,
    parquet_files,
    stream_parquet,
    summarize_split,
)

with requires("data"):
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset, DatasetInfo, Features
    from datasets.table import InMemoryTable

if TYPE_CHECKING:
    import torch

    from processing_difnet import DifnetTokenizer

SAMPLE_ROWS = 16  # images that are read at once to compare the features with a model
CAPTIONS_AT_ONCE = 10_000  # images whose captions are tokenized together
METADATA_KEY = b"difnet"


@dataclass(frozen=True)
class StreamedImages:
    """A split whose images are read from Parquet files as they are trained on.

    `images["captions"]`, and `"image_id"` and `"file_name"` likewise, are columns as those of a map-style dataset.

    Args:
        files: paths or URLs, in the order of the split.
        file_rows: number of images in each of them.
        features: types of the columns.
        digest: SHA-256 of the footers of the files.
        captions: `image_id`, `file_name` and `captions` of every image, memory-mapped.
        sample: the first images with their features.
    """

    files: tuple[str, ...]
    file_rows: tuple[int, ...]
    features: Features
    digest: str
    captions: Dataset
    sample: Dataset

    cache_files = ()  # as a map-style dataset that lies in memory has none

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, column: str) -> Any:
        return self.captions[column]

    def fingerprint(self) -> dict[str, Any]:
        """What the split holds, in the form of `split_fingerprint`; the order of an epoch depends on the files too."""
        digest = hashlib.sha256(json.dumps([self.file_rows, self.digest]).encode())
        captions = 0
        for batch in self.captions.iter(1000):
            captions += sum(map(len, batch["captions"]))
            digest.update(repr((batch["image_id"], batch["captions"])).encode("utf-8", "backslashreplace"))
        return {"images": len(self), "captions": captions, "sha256": digest.hexdigest()}


def open_stream(source: str | os.PathLike, split: str, cache: str | os.PathLike) -> StreamedImages:
    """A split to stream, after one pass over its captions, which is made once.

    Args:
        source: folder of Parquet files, or name of a dataset of the Hub.
        split: "train", "validation" or "test".
        cache: folder that keeps the captions, as `SPLIT_captions.arrow`; it is made if it is not there.

    Raises:
        ValueError: the source is no such dataset, lacks the split, or a file is damaged or foreign.
    """
    shown = printable(source, 300)
    if not is_parquet(source):
        if Path(source, "dataset_dict.json").exists():
            raise ValueError(
                f"{shown} is packed as Arrow, which is read from the disk without loading it: leave out --streaming, "
                "or pack with --parquet"
            )
        raise ValueError(
            f"{shown}: no folder of Parquet files and no name of a dataset on the Hub (USER/NAME); "
            "`difnet pack --parquet` makes such a folder"
        )
    splits = parquet_files(source)
    if split not in splits:
        raise ValueError(f"{shown} has no split {split!r}, it has {printable(', '.join(splits))}.")
    files = splits[split]
    path = Path(cache, f"{split}_captions.arrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # the first process makes the pass, the others wait for it
        state = state_of_files(files)
        known = read_cached_captions(path, state)
        if known is None:
            write_captions(path, files, state)
            known = read_cached_captions(path, state)
        if known is None:
            raise ValueError(f"{printable(path, 300)} was written and cannot be read; look at the disk")
        captions = Dataset.from_file(str(path))
    features = Features.from_dict(known["features"])
    first = next(number for number, rows in enumerate(known["rows"]) if rows)
    sample = next(iter(_blocks_of(files[first:], features, SAMPLE_ROWS)))
    return StreamedImages(
        tuple(files), tuple(known["rows"]), features, known["digest"], captions, as_dataset(sample, features)
    )


def _blocks_of(files: list[str], features: Features, block_size: int) -> Iterator[pa.Table]:
    return stream_parquet(files, features).iter(block_size)


def as_dataset(table: pa.Table, features: Features) -> Dataset:
    """Rows that were read, as a map-style dataset in memory, without a copy."""
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=features), fingerprint="streamed")


# The captions, kept beside a run


def state_of_files(files: list[str]) -> list[list[Any]]:
    """What tells whether files are what they were, without reading them: URLs of the Hub name their commit."""
    states: list[list[Any]] = []
    for file in files:
        if "://" in file:
            states.append([file])
        else:
            status = os.stat(file)
            states.append([os.path.abspath(file), status.st_size, status.st_mtime_ns])
    return states


def read_cached_captions(path: Path, state: list[list[Any]]) -> dict[str, Any] | None:
    """What the file of captions says about the split; `None` where there is none, or it is of other files."""
    try:
        with pa.memory_map(str(path)) as file:
            said = (pa.ipc.open_stream(file).schema.metadata or {}).get(METADATA_KEY)
        known = json.loads(said or b"null")
    except (OSError, ValueError, pa.ArrowException):
        return None
    return known if isinstance(known, dict) and known.get("state") == state else None


def write_captions(path: Path, files: list[str], state: list[list[Any]]) -> None:
    """Reads ids, names and captions of the images of all files, and no other columns, into one Arrow file.

    Raises:
        ValueError: a file is damaged or foreign.
    """
    summaries: list[ParquetSummary] = summarize_split(files)
    rows = [summary.rows for summary in summaries]
    known = {
        "state": state,
        "rows": rows,
        "features": summaries[0].features.to_dict(),
        "digest": hashlib.sha256("".join(summary.digest for summary in summaries).encode()).hexdigest(),
    }
    columns = {"image_id": pa.int64(), "file_name": pa.string(), "captions": pa.list_(pa.string())}
    schema = pa.schema(columns.items(), metadata={METADATA_KEY: json.dumps(known).encode()})
    with (
        atomic_output(path, overwrite=True) as unfinished,
        tqdm(total=sum(rows), unit=" images", desc="captions", disable=None) as progress,
        pa.OSFile(str(unfinished), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for file in files:
            with open_parquet(file) as parquet:
                for batch in parquet.iter_batches(columns=list(columns)):
                    table = pa.Table.from_batches([batch]).select(list(columns)).cast(schema)
                    captions = table.column("captions")
                    columns_and_words = (*table.columns, pc.list_flatten(captions))
                    if any(column.null_count for column in columns_and_words):
                        raise ValueError(
                            f"{printable(file, 300)}: an image lacks its id, its name or a caption; pack again"
                        )
                    writer.write_table(table)
                    progress.update(len(table))


# Batches


class _Share(NamedTuple):
    """What a process reads in an epoch.

    Attributes:
        files: in the order that they are read in.
        images: numbers in the split of the images in `files`, up to the last one of this process, (n,).
        start: the first of `images` that is this process's; those before are another's.
        first_items: number of items before each of the process's images and before the end, (n - start + 1,).
        num_items: items that batches are made of.
    """

    files: list[str]
    images: np.ndarray
    start: int
    first_items: np.ndarray
    num_items: int


class _Block(NamedTuple):
    """Images that are in memory.

    Attributes:
        number: in the share, from 0.
        table: their rows.
        first_item: number of the share's items before those of the block.
        rows: the row of each item, in the order of the epoch.
        captions: the number of each item's caption among those of its image; of pairs alone.
    """

    number: int
    table: pa.Table
    first_item: int
    rows: np.ndarray
    captions: np.ndarray

    def stop(self) -> int:
        return self.first_item + len(self.rows)


class StreamedBatches:
    """Batches of a split that is streamed: as those of `form`, shuffled within blocks, resumable after any batch.

    Epoch `e` goes through the files in the order `numpy.random.default_rng([seed, e]).permutation(files)`. This
    sequence of images is cut into `num_processes` parts of equal length, one for each process. A process reads its
    part in blocks of `shuffle_buffer` images, of which three are in memory at most, and takes the items of block `b`
    in the order `default_rng([seed, e, process_index, b]).permutation(n)`.

    Args:
        form: `CaptionPairBatches`, `ImageCaptionBatches` or `ReferenceBatches`: what a batch holds.
        images: the split.
        batch_size: items in a batch.
        tokenizer: of the model; `ReferenceBatches` needs none.
        shuffle_buffer: images in a block.
        shuffle: whether files and blocks are shuffled; else images come in the order of the split.
        drop_last: whether only full batches are made, and the same number for every process.
        max_length: a caption of more tokens (`<eos>` counted) raises ValueError, which names its image.
        seed: of the order.
        process_index, num_processes: which share of the images is read.
        dtype, mask_padded_cells: as for `PackedImages`.

    Attributes:
        unknown_share: the share of `<unk>` among all tokens.
    """

    def __init__(
        self,
        form: type[Batches],
        images: StreamedImages,
        batch_size: int,
        *,
        tokenizer: DifnetTokenizer | None = None,
        shuffle_buffer: int = 1000,
        shuffle: bool = True,
        drop_last: bool = True,
        max_length: int | None = None,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        dtype: torch.dtype | None = None,
        mask_padded_cells: bool = True,
    ):
        if min(batch_size, shuffle_buffer) < 1 or not 0 <= process_index < num_processes:
            raise ValueError(
                "expected batch_size >= 1, shuffle_buffer >= 1 and 0 <= process_index < num_processes, got "
                f"{batch_size}, {shuffle_buffer}, {process_index} and {num_processes}"
            )
        if (tokenizer is None) != (form is ReferenceBatches):
            raise ValueError("a tokenizer is for CaptionPairBatches and ImageCaptionBatches, which need it")
        self.form: Callable[..., Batches] = form
        self.images = images
        self.batch_size = batch_size
        self.tokenizer = tokenizer
        self.shuffle_buffer = shuffle_buffer
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.epoch = 0
        self._next_batch = 0
        self._resumed = False
        self._states: dict[int, dict[str, Any] | None] = {}  # of the stream, before the blocks of these numbers
        self._known_share: tuple[int, _Share] | None = None
        self._options: dict[str, Any] = {"dtype": dtype, "mask_padded_cells": mask_padded_cells}
        self._image_ids = images.captions.data.column("image_id").to_numpy()  # (images,)
        self._counts = pc.list_value_length(images.captions.data.column("captions")).to_numpy()  # (images,)
        if tokenizer is not None:
            self.unknown_share = check_captions(images.captions, tokenizer, max_length)

    @property
    def _of_pairs(self) -> bool:
        return self.form is CaptionPairBatches

    def num_items(self) -> int:
        """Items in an epoch of all processes."""
        return int(self._counts.sum()) if self._of_pairs else len(self.images)

    def __len__(self) -> int:
        """Batches for this process of the epoch that is under way."""
        batches, rest = divmod(self._share().num_items, self.batch_size)
        return batches if self.drop_last or not rest else batches + 1

    def _share(self) -> _Share:
        """What this process reads in the epoch that is under way."""
        if self._known_share is None or self._known_share[0] != self.epoch:
            self._known_share = self.epoch, self._make_share()
        return self._known_share[1]

    def _make_share(self) -> _Share:
        file_rows = np.array(self.images.file_rows)
        order = np.arange(len(file_rows))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(file_rows))
        file_starts = np.cumsum([0, *file_rows[order]])  # in the sequence of the epoch
        bounds = [len(self.images) * process // self.num_processes for process in range(self.num_processes + 1)]
        start, stop = bounds[self.process_index], bounds[self.process_index + 1]
        first = int(np.searchsorted(file_starts, start, side="right")) - 1
        last = max(first, int(np.searchsorted(file_starts, stop, side="left")) - 1)
        first = min(first, len(order) - 1)
        split_starts = np.cumsum([0, *file_rows])
        ranges = [np.arange(split_starts[file], split_starts[file + 1]) for file in order]
        sequence = np.concatenate(ranges)  # (images,), all of the epoch
        counts = self._counts[sequence] if self._of_pairs else np.ones(len(sequence), dtype=np.int64)
        items = [int(counts[bounds[process] : bounds[process + 1]].sum()) for process in range(self.num_processes)]
        return _Share(
            files=[self.images.files[file] for file in order[first : last + 1]],
            images=sequence[file_starts[first] : stop],
            start=int(start - file_starts[first]),
            first_items=np.cumsum([0, *counts[start:stop]]),
            num_items=min(items) if self.drop_last else items[self.process_index],
        )

    def _block_of(self, share: _Share, item: int) -> int:
        """The number of the block that holds an item, or the last one."""
        image = int(np.searchsorted(share.first_items, item, side="right")) - 1
        return min(share.start + image, len(share.images) - 1) // self.shuffle_buffer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._resumed:
            self._next_batch, self._states = 0, {}
        self._resumed = False
        share = self._share()
        blocks = self._read_blocks(share, self._next_batch * self.batch_size)
        held: list[_Block] = []
        for batch in range(self._next_batch, len(self)):
            start = batch * self.batch_size
            stop = min(start + self.batch_size, share.num_items)
            held = [block for block in held if block.stop() > start]
            while not held or held[-1].stop() < stop:
                held.append(next(blocks))
            self._next_batch = batch + 1
            yield self._make_batch(held, start, stop)
        self.epoch += 1
        self._next_batch, self._states = 0, {}

    def _read_blocks(self, share: _Share, item: int) -> Iterator[_Block]:
        """The blocks of a share from the one on that holds an item."""
        wanted = self._block_of(share, item)
        state = self._states.get(wanted)
        tables = self._read_tables(share, 0, None)
        if state is not None:
            resumed = self._read_tables(share, wanted, state)
            try:
                tables = chain([next(resumed)], resumed)
            except ValueError:
                state = None  # of another version of datasets, or damaged: the epoch is read from its beginning
        self._states = {wanted: state}
        for number, table, state_after in tables:
            self._states[number + 1] = state_after
            if number >= wanted:
                # Only those that the next batch begins in, or that lie behind it, are asked for.
                first_needed = self._block_of(share, self._next_batch * self.batch_size)
                self._states = {each: kept for each, kept in self._states.items() if each >= first_needed}
                yield self._make_block(share, number, table)

    def _read_tables(
        self, share: _Share, first: int, state: dict[str, Any] | None
    ) -> Iterator[tuple[int, pa.Table, dict[str, Any]]]:
        """Number, rows and the state of the stream behind them, of each block from `first` on, where `state` is."""
        stream = stream_parquet(share.files, self.images.features)
        if state is not None:
            stream.load_state_dict(state)
        tables = stream.iter(self.shuffle_buffer)

        def read() -> tuple[pa.Table | None, dict[str, Any]]:
            return next(tables, None), stream.state_dict()

        # Parquet decodes the next block, without Python's lock, while the network trains on this one.
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(read)
            last = (len(share.images) - 1) // self.shuffle_buffer
            for number in range(first, last + 1):
                table, state_after = self._result(coming, share, number)
                if number < last:
                    coming = reader.submit(read)
                yield number, table, state_after

    def _result(self, coming: Future, share: _Share, number: int) -> tuple[pa.Table, dict[str, Any]]:
        """The rows of a block, which are those of its images, and the state of the stream behind it."""
        start = number * self.shuffle_buffer
        images = share.images[start : start + self.shuffle_buffer]
        try:
            table, state = coming.result()
        except Exception as error:
            # The network, a damaged page, or a state that is none: each with errors of its own.
            said = printable(reason_of(error), 300)
            raise ValueError(
                f"{self._files_of(images)}: cannot be read ({said}); mend or replace it, then resume: --resume last"
            ) from None
        found = np.array([]) if table is None else table.column("image_id").to_numpy()
        if not np.array_equal(found[: len(images)], self._image_ids[images]):
            raise ValueError(
                f"{self._files_of(images)}: other images than those whose captions were read; the dataset has "
                "changed: start the run again with --resume last"
            )
        return table, state

    def _files_of(self, images: np.ndarray) -> str:
        """The files that some images of the split are in, for a message."""
        numbers = np.unique(np.searchsorted(np.cumsum(self.images.file_rows), images, side="right"))
        names = ", ".join(printable(self.images.files[number], 300) for number in numbers[:3])
        return names + (f" and {len(numbers) - 3} files more" if len(numbers) > 3 else "")

    def _make_block(self, share: _Share, number: int, table: pa.Table) -> _Block:
        """Puts the items of a block in the order of the epoch."""
        for name in KINDS_OF_COLUMNS:
            if name in table.column_names and table.column(name).null_count:
                images = share.images[number * self.shuffle_buffer :][: len(table)]
                raise ValueError(f"{self._files_of(images)}: an image has no {name}; pack again")
        start = number * self.shuffle_buffer
        own = range(max(start, share.start), min(start + len(table), len(share.images)))
        counts = share.first_items[own.start - share.start + 1 : own.stop - share.start + 1]
        counts = counts - share.first_items[own.start - share.start : own.stop - share.start]  # items of each image
        rows = np.repeat(np.arange(own.start - start, own.stop - start), counts)
        captions = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.arange(len(rows))
        if self.shuffle:
            seed = [self.seed, self.epoch, self.process_index, number]
            order = np.random.default_rng(seed).permutation(len(rows))
        first_item = int(share.first_items[own.start - share.start])
        return _Block(number, table, first_item, rows[order], captions[order])

    def _make_batch(self, held: list[_Block], start: int, stop: int) -> dict[str, Any]:
        """The batch of the items `start` to `stop`, as `form` makes it of these rows alone."""
        rows, captions = [], []
        for block in held:
            for item in range(max(start - block.first_item, 0), min(stop - block.first_item, len(block.rows))):
                row = block.table.slice(int(block.rows[item]), 1)
                rows.append(row)
                if self._of_pairs:
                    captions.append([row.column("captions")[0][int(block.captions[item])].as_py()])
        table = pa.concat_tables(rows)
        if self._of_pairs:
            index = table.column_names.index("captions")
            field = table.schema.field(index)
            table = table.set_column(index, field, pa.array(captions, type=field.type))
        dataset = as_dataset(table, self.images.features)
        arguments = () if self.tokenizer is None else (self.tokenizer,)
        batches = self.form(dataset, *arguments, self.batch_size, shuffle=False, drop_last=False, **self._options)
        return batches.make_batch(np.arange(batches.num_items()))

    # Position

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands, as JSON: the batch after the one that was given out last.

        `stream` is the state of the `IterableDataset` before the block that this batch begins in.
        """
        block = self._block_of(self._share(), self._next_batch * self.batch_size)
        return {
            "epoch": self.epoch,
            "next_batch": self._next_batch,
            "seed": self.seed,
            "items": self.num_items(),
            "block": block,
            "stream": self._states.get(block),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the next iteration resume where `state_dict` was taken.

        Without a `stream`, or with one that leads elsewhere (of another version of datasets), the epoch is read from
        its beginning and what was given out is passed over: the batches are the same.

        Raises:
            ValueError: the seed or the data are others, or the numbers are none that `state_dict` gives.
        """
        check_same_order(state, self.seed, self.num_items())
        if state["epoch"] < 0:
            raise ValueError(f"the state says epoch {state['epoch']}")
        self.epoch = state["epoch"]
        if not 0 <= state["next_batch"] <= len(self):
            raise ValueError(f"the state says batch {state['next_batch']}; an epoch has {len(self)} batches")
        self._next_batch, self._resumed, self._states = state["next_batch"], True, {}
        block = self._block_of(self._share(), self._next_batch * self.batch_size)
        if isinstance(state.get("stream"), Mapping) and state.get("block") == block:
            self._states = {block: dict(state["stream"])}


def check_captions(captions: Dataset, tokenizer: DifnetTokenizer, max_length: int | None = None) -> float:
    """The share of `<unk>` among the tokens of all captions.

    Raises:
        ValueError: a caption has more than `max_length` tokens (`<eos>` counted); the text names its image.
    """
    unknown, tokens = 0.0, 0
    for start in range(0, len(captions), CAPTIONS_AT_ONCE):
        rows = captions.select(range(start, min(start + CAPTIONS_AT_ONCE, len(captions))))
        tokenized = TokenizedCaptions(rows, tokenizer, max_length)
        unknown += tokenized.unknown_share * len(tokenized.ids)
        tokens += len(tokenized.ids)
    return unknown / max(tokens, 1)
