"""Inputs of many images, cut into shards: folders, tars, Parquet, 🤗 datasets and lists, on disks or anywhere else.

The same inputs give the same shards in every process, so that processes share them without talking to each other. A
shard has a fingerprint, which changes when what it is made of changes. What is read of an input here is its listing,
or the footers of Parquet files; lists are read once. The original (mrwu-mac/DIFNet, CVPR 2022) captions the splits of
its feature file only.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any

from modeling_difnet.images_difnet import is_url

from ..command_line import reason_of, requires
from ..data.image_files import IMAGE_SUFFIXES, leads_out
from ..data.packed_dataset import quiet_datasets
from ..data.parquet import open_parquet
from ..files import check_regular_file, printable
from .columns import image_column_of, key_column_of
from .places import (
    check_applies,
    expand,
    file_system,
    hash_of,
    is_local,
    is_web,
    named,
    no_images,
    note_left_out,
    stamp_of,
    stamp_of_place,
)

KINDS = ("auto", "images", "tar", "parquet", "list", "dataset")
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class InputConfig:
    """What is to be captioned.

    Args:
        places: images, folders, tars, Parquet files, lists or datasets: paths, or URLs of anything that fsspec opens,
            with `*` for several; names of datasets of the Hub.
        kind: one of `KINDS`, or "features"; "auto" goes by names and by what is there.
        images_per_shard: of folders, lists, Parquet files and datasets. A tar is one shard.
        image_column: of tables: the column of images, or of their paths or URLs; of tars the suffix. By default the
            usual names.
        key_column: of tables. By default the usual names, else a number of the row.
        split: of datasets.
        dataset_config: of datasets that have several.
        revision: of datasets of the Hub.
        streaming: whether datasets are read from where they lie; then each of their files is a shard.
        segmentation: of the kind "features", which is of feature files in the place of images: where the segmentation
            features beside grid features in HDF5 are, a folder of `<image id>.npy` or an HDF5 file.
    """

    places: tuple[str, ...]
    kind: str = "auto"
    images_per_shard: int = 1000
    image_column: str | None = None
    key_column: str | None = None
    split: str | None = None
    dataset_config: str | None = None
    revision: str | None = None
    streaming: bool = False
    segmentation: str | None = None


@dataclass(frozen=True)
class InputShard:
    """A part of the inputs whose captions are made, written and counted together.

    Args:
        index: its place among all shards.
        kind: "images", "tar", "parquet", "list", "features", "dataset", or "stream" of a dataset that is streamed.
        source: the place that it is a part of; of images the first one's path.
        start, stop: rows of a table, or, of a stream, which of its parts; `stop` is `None` where it is not known.
        parts: of a stream: how many there are.
        offset: of a list: where its first row begins, in bytes.
        files: paths or URLs of images.
        fingerprint: changes with the shard's content.
        num_bytes: size of the file, where it is known.
    """

    index: int
    kind: str
    source: str
    start: int = 0
    stop: int | None = None
    parts: int = 0
    offset: int = 0
    files: tuple[str, ...] = ()
    fingerprint: str = ""
    num_bytes: int | None = None

    @property
    def num_images(self) -> int | None:
        """As far as it is known without reading it."""
        if self.kind == "images":
            return len(self.files)
        return None if self.stop is None else self.stop - self.start

    @property
    def name(self) -> str:
        """For messages."""
        if self.kind == "images":
            last = f" to {printable(self.files[-1], 200)}" if len(self.files) > 1 else ""
            return f"{printable(self.source, 200)}{last}"
        rows = "" if self.stop is None else f", rows {self.start:,} to {self.stop - 1:,}"
        rows = f", part {self.start:,} of {self.parts:,}" if self.kind == "stream" else rows
        return f"{printable(self.source, 300)}{rows}"


def plan_shards(config: InputConfig) -> list[InputShard]:
    """The shards of the inputs, in an order that depends on the inputs alone.

    Raises:
        ValueError: a place does not exist, holds nothing to caption, or cannot be read; the text names it.
    """
    if config.images_per_shard < 1:
        raise ValueError("images_per_shard must be at least 1")
    images: dict[str, str] = {}  # path to stamp; what is given twice is captioned once
    shards: list[InputShard] = []
    kinds = {"features"} if config.kind == "features" else set()
    if config.kind == "features":
        from .stored_features import feature_shards

        shards = feature_shards(config)
    for place in config.places if config.kind != "features" else ():
        for path, kind in expand(place, config.kind):
            kinds.add(kind)
            with named(path):
                if kind == "images":
                    images |= list_images(path)
                elif kind == "tar":
                    shards.append(whole_file(path))
                elif kind == "parquet":
                    shards += parquet_shards(path, config)
                elif kind == "list":
                    shards += list_shards(path, config)
                else:
                    shards += dataset_shards(path, config)
    check_options(config, kinds)
    paths = list(images)
    chunks = [
        paths[start : start + config.images_per_shard] for start in range(0, len(paths), config.images_per_shard)
    ]
    of_images = [
        InputShard(0, "images", chunk[0], files=tuple(chunk), fingerprint=hash_of(f"{p} {images[p]}" for p in chunk))
        for chunk in chunks
    ]
    found = [replace(shard, index=index) for index, shard in enumerate([*of_images, *shards])]
    if not found:
        raise ValueError(f"{', '.join(printable(place) for place in config.places)}: nothing to caption")
    check_places(found)
    return found


def check_options(config: InputConfig, kinds: set[str]) -> None:
    """Raises `ValueError` where an option is given that no input heeds."""
    tables = ("parquet", "list", "dataset")
    for option, value in (
        ("--split", config.split),
        ("--dataset-config", config.dataset_config),
        ("--streaming", config.streaming),
    ):
        check_applies(value, option, kinds, ("dataset",), "datasets")
    check_applies(config.key_column, "--key-column", kinds, (*tables, "features"), "Parquet files, lists and datasets")
    check_applies(
        config.image_column, "--image-column", kinds, ("tar", *tables), "tars, Parquet files, lists and datasets"
    )


def check_places(shards: Sequence[InputShard]) -> None:
    """Raises `ValueError` where a file is given twice: each key is captioned once."""
    seen = set()
    for shard in shards:
        place = (shard.kind, shard.source, shard.start, shard.offset)
        if place in seen:
            raise ValueError(f"{shard.name} is given twice")
        seen.add(place)


# Files and images


def whole_file(path: str) -> InputShard:
    stamp, size = stamp_of_place(path)
    return InputShard(0, "tar", path, fingerprint=hash_of([path, stamp]), num_bytes=size)


def list_images(place: str) -> dict[str, str]:
    """The images of a file or a folder, sorted by path, each with its stamp.

    Raises:
        ValueError: a folder holds none.
    """
    if is_web(place):
        return {place: ""}
    fs, path = file_system(place)
    if is_local(fs):
        return local_images(place if not is_url(place) else path)
    if not fs.isdir(path):
        return {place: stamp_of(fs.info(path))}
    length = len(path.rstrip("/"))
    files = fs.find(path, detail=True)
    found = {
        f"{place.rstrip('/')}{name[length:]}": stamp_of(info)
        for name, info in sorted(files.items())
        if name.lower().endswith(IMAGE_SUFFIXES)
    }
    if not found:
        raise no_images(place, files)
    note_left_out(place, "images", files)
    return found


def local_images(place: str) -> dict[str, str]:
    """As `list_images`; links that lead out of the folder are left out, as by `find_images`."""
    if not os.path.isdir(place):
        return {place: local_stamp(place)}
    found: list[str] = []
    others: list[str] = []
    for folder, folders, files in os.walk(place):
        folders.sort()
        others += (file for file in files if not file.lower().endswith(IMAGE_SUFFIXES))
        for file in files:
            path = os.path.join(folder, file)
            if file.lower().endswith(IMAGE_SUFFIXES) and not (
                os.path.islink(path) and leads_out(Path(path), Path(place))
            ):
                found.append(path)
    if not found:
        raise no_images(place, others)
    note_left_out(place, "images", others)
    return {path: local_stamp(path) for path in sorted(found)}


def local_stamp(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:  # a link that leads nowhere: its row says so
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


# Parquet


def parquet_shards(path: str, config: InputConfig) -> list[InputShard]:
    """Rows of one file; a file that cannot be read is a shard, whose only row says so.

    Raises:
        ValueError: it has no column of images, or of keys.
    """
    stamp, size = stamp_of_place(path)
    fingerprint = hash_of([path, stamp])
    try:
        with open_parquet(path) as file:
            num_rows, schema = file.metadata.num_rows, file.schema_arrow
    except ValueError:
        return [InputShard(0, "parquet", path, fingerprint=fingerprint, num_bytes=size)]
    _check_columns(schema.names, config, path, schema)
    count = max(1, round(num_rows / config.images_per_shard))
    edges = [num_rows * index // count for index in range(count + 1)]
    return [
        InputShard(0, "parquet", path, start, stop, fingerprint=fingerprint, num_bytes=(size or 0) // count or None)
        for start, stop in pairwise(edges)
        if stop > start
    ]


def _check_columns(names: Sequence[str], config: InputConfig, source: str, schema: Any = None) -> None:
    image_column_of(names, config.image_column, source, schema)
    key_column_of(names, config.key_column, source)


# Lists


def list_shards(path: str, config: InputConfig) -> list[InputShard]:
    """Rows of a list of paths or URLs; its shards know where they begin, so that nobody reads it to there.

    Raises:
        ValueError: a row cannot be read, or the first has no column of images, or of keys.
    """
    shards = []
    with open_list(path) as file:
        if file.read(2) in UTF16:
            raise ValueError(f"{printable(path, 300)}: text in UTF-16; save it as UTF-8")
        file.seek(0)
        lines = CountedLines(file)
        rows = list_rows(lines, path)
        start, number = 0, 0
        while True:
            offset = lines.offset
            lines.digest = hashlib.sha256()
            number = 0
            for row in islice(rows, config.images_per_shard):
                if start == number == 0:
                    _check_columns([name for name in row if name is not None], config, path)
                number += 1
            if not number:
                break
            fingerprint = lines.digest.hexdigest()
            shards.append(InputShard(0, "list", path, start, start + number, offset=offset, fingerprint=fingerprint))
            start += number
    return shards


def open_list(path: str) -> IO[bytes]:
    """A list as a file in which places can be found again; what a server sends without its size is read whole."""
    fs, inner = file_system(path)
    if is_local(fs):
        check_regular_file(inner)
    file = fs.open(inner, "rb")
    if is_web(path) and getattr(file, "size", None) is None:
        file.close()
        return io.BytesIO(fs.cat_file(inner))
    return file


class CountedLines:
    """The lines of a file in UTF-8, with the place of the next one and a hash of those that were read."""

    def __init__(self, file: IO[bytes], offset: int = 0) -> None:
        self.file = file
        self.offset = offset
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        text = line.decode("utf-8-sig" if self.offset == 0 else "utf-8", "surrogateescape")
        self.offset += len(line)
        self.digest.update(line)
        return text


def list_rows(lines: Iterator[str], path: str, header: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a list. Those of .txt have the column "path"; empty lines are none.

    Args:
        lines: of the file.
        path: whose suffix says what they are.
        header: of .csv and .tsv, where `lines` do not begin with it.

    Raises:
        ValueError: a row cannot be read.
    """
    shown = printable(path, 300)
    suffix = path.partition("?")[0].rpartition(".")[2].lower()
    if suffix in ("csv", "tsv"):
        reader = csv.DictReader(lines, header, delimiter="\t" if suffix == "tsv" else ",", strict=True)
        last = 0
        try:
            for row in reader:
                yield row
                last = reader.line_num
        except csv.Error as error:
            where = f", that from line {last + 1:,} on," if header is None else ""
            raise ValueError(f"{shown}: a row{where} cannot be read ({error})") from None
    elif suffix == "jsonl":
        for line in lines:
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    raise ValueError(f"{shown}: a line is no JSON object: {printable(line.strip(), 100)}")
                yield row
    else:
        for line in lines:
            if line.strip():
                yield {"path": line.strip()}


def header_of(path: str) -> list[str] | None:
    """The names of the columns of a .csv or .tsv, `None` of other lists."""
    suffix = path.partition("?")[0].rpartition(".")[2].lower()
    if suffix not in ("csv", "tsv"):
        return None
    with open_list(path) as file:
        names = csv.DictReader(CountedLines(file), delimiter="\t" if suffix == "tsv" else ",").fieldnames
    return list(names or [])


# Datasets


def dataset_shards(name: str, config: InputConfig) -> list[InputShard]:
    """Rows of a dataset; of one that is streamed its files."""
    dataset = open_dataset(name, config.split, config.dataset_config, config.revision, config.streaming)
    if dataset.column_names:  # which are not known of every stream
        columns_of_dataset(dataset, config, name)
    if config.streaming and hasattr(dataset, "num_shards"):  # those of `save_to_disk` lie on the disk already
        parts = dataset.num_shards
        said = (config.dataset_config, config.split, config.revision, _builder_hash(name, config))
        fingerprint = hash_of([name, *map(str, said)])
        return [InputShard(0, "stream", name, part, parts=parts, fingerprint=fingerprint) for part in range(parts)]
    starts = range(0, len(dataset), config.images_per_shard)
    return [
        InputShard(
            0,
            "dataset",
            name,
            start,
            min(start + config.images_per_shard, len(dataset)),
            fingerprint=str(dataset._fingerprint),
        )
        for start in starts
    ]


def columns_of_dataset(dataset: Any, config: InputConfig, source: str) -> tuple[str, str | None, bool]:
    """The columns of images and of keys, and whether `datasets` knows the first for images.

    Raises:
        ValueError: there is none.
    """
    from datasets import Image

    names = list(dataset.column_names or [])
    of_images = [name for name, kind in (dataset.features or {}).items() if isinstance(kind, Image)]
    image = of_images[0] if of_images and not config.image_column else None
    image = image or image_column_of(names, config.image_column, source)
    return image, key_column_of(names, config.key_column, source), image in of_images


def _builder_hash(name: str, config: InputConfig) -> str:
    """Changes with the files of a dataset, or with the commit of its repository."""
    from datasets import load_dataset_builder

    with quiet_datasets():
        return str(load_dataset_builder(name, config.dataset_config, revision=config.revision).hash)


@lru_cache(maxsize=4)
def open_dataset(
    name: str, split: str | None, config: str | None = None, revision: str | None = None, streaming: bool = False
) -> Any:
    """A split of a dataset of the Hub, or of a folder that `datasets` loads.

    Args:
        name: repository or folder.
        split: may be left out where there is one.
        config, revision: of the Hub.
        streaming: whether it is read from where it lies.

    Raises:
        ValueError: it cannot be loaded, or has several splits and none is named.
    """
    with requires("data"):
        from datasets import Dataset, IterableDataset, load_dataset, load_from_disk

    shown = printable(name, 300)
    try:
        with quiet_datasets():
            if {"state.json", "dataset_dict.json"} & set(os.listdir(name) if os.path.isdir(name) else ()):
                loaded = load_from_disk(name)
            else:
                loaded = load_dataset(name, config, revision=revision, streaming=streaming)
    except Exception as error:
        # Loading reaches datasets, huggingface_hub, fsspec, YAML and the network, each with errors of its own.
        cause = error.__cause__ or error  # "An error occurred while generating the dataset" says nothing
        raise ValueError(
            f"{shown}: no such file, and no dataset that can be loaded ({printable(reason_of(cause), 300)})"
        ) from None
    if isinstance(loaded, Dataset | IterableDataset):
        if split is not None and str(loaded.split or "train") != split:
            raise ValueError(f"{shown}: has no splits; leave --split out")
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        splits = ", ".join(map(str, loaded))
        said = "give --split, one of" if split is None else f"no split {printable(split)}; it has"
        raise ValueError(f"{shown}: {said} {splits}")
    return loaded[split]
