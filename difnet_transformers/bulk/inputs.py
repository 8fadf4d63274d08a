"""Inputs of many images, cut into shards: folders, tars, Parquet, 🤗 datasets and lists, on disks or anywhere else.

The same inputs give the same shards in every process, so that processes share them without talking to each other. A
shard has a fingerprint, which changes when what it is made of changes. What is read of an input here is its listing,
or the footers of Parquet files; lists are read once. The original (mrwu-mac/DIFNet, CVPR 2022) captions the splits of
its feature file only.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any

from modeling_difnet.images_difnet import is_url

from ..command_line import reason_of, requires
from ..data.image_files import IMAGE_SUFFIXES, leads_out
from ..data.packed_dataset import quiet_datasets
from ..data.parquet import hub_name, open_parquet
from ..files import printable

with requires("data"):
    import fsspec

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")
KINDS = ("auto", "images", "tar", "parquet", "list", "dataset")
STAMPS = ("size", "mtime", "ETag", "etag", "md5Hash", "md5", "sha256", "LastModified", "last_modified", "updated")
"""What file systems say of a file that changes with it."""


@dataclass(frozen=True)
class InputConfig:
    """What is to be captioned.

    Args:
        places: images, folders, tars, Parquet files, lists or datasets: paths, or URLs of anything that fsspec opens,
            with `*` for several; names of datasets of the Hub.
        kind: one of `KINDS`; "auto" goes by names and by what is there.
        images_per_shard: of folders, lists, Parquet files and datasets. A tar is one shard.
        image_column: of tables: the column of images, or of their paths or URLs; of tars the suffix. By default the
            usual names.
        key_column: of tables. By default the usual names, else a number of the row.
        split: of datasets.
        dataset_config: of datasets that have several.
        revision: of datasets of the Hub.
        streaming: whether datasets are read from where they lie; then each of their files is a shard.
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


@dataclass(frozen=True)
class InputShard:
    """A part of the inputs whose captions are made, written and counted together.

    Args:
        index: its place among all shards.
        kind: "images", "tar", "parquet", "list", "dataset", or "stream" of a dataset that is streamed.
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
    for place in config.places:
        for path, kind in expand(place, config.kind):
            if kind == "images":
                images |= list_images(path)
            elif kind == "tar":
                shards.append(whole_file(path))
            elif kind == "parquet":
                shards += parquet_shards(path, config.images_per_shard)
            elif kind == "list":
                shards += list_shards(path, config.images_per_shard)
            else:
                shards += dataset_shards(path, config)
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


def check_places(shards: Sequence[InputShard]) -> None:
    """Raises `ValueError` where a file is given twice: each key is captioned once."""
    seen = set()
    for shard in shards:
        place = (shard.kind, shard.source, shard.start, shard.offset)
        if place in seen:
            raise ValueError(f"{shard.name} is given twice")
        seen.add(place)


# Places


def expand(place: str, kind: str) -> Iterator[tuple[str, str]]:
    """The files, folders and datasets that a place means, each with its kind.

    Raises:
        ValueError: there is no such place, or nothing in it.
    """
    shown = printable(place, 300)
    if kind == "dataset":
        yield place, kind
        return
    is_hub_name = kind == "auto" and not is_url(place) and hub_name(place) is not None
    if is_hub_name and not place.lower().endswith((*IMAGE_SUFFIXES, *TAR_SUFFIXES, *LIST_SUFFIXES, ".parquet")):
        yield place, "dataset"
        return
    if place.startswith(("http://", "https://")):  # which have no folders
        yield place, kind_of_file(place.partition("?")[0], kind)
        return
    fs, path = file_system(place)
    try:
        if any(character in place for character in "*?[") and not (is_local(fs) and os.path.lexists(path)):
            matches = sorted(fs.glob(path))
            if not matches:
                raise ValueError(f"{shown}: no such files")
            for match in matches:
                name = match if is_local(fs) and not is_url(place) else fs.unstrip_protocol(match)
                yield from expand_one(fs, match, name, kind)
        else:
            yield from expand_one(fs, path, place, kind)
    except FileNotFoundError:
        raise ValueError(f"{shown}: no such file or folder") from None


def expand_one(fs: Any, path: str, name: str, kind: str) -> Iterator[tuple[str, str]]:
    """See `expand`; `name` is what messages and keys call `path`."""
    if not fs.isdir(path):
        if not fs.exists(path) and not (is_local(fs) and os.path.lexists(path)):
            raise FileNotFoundError(name)
        yield name, kind_of_file(name, kind)
        return
    children = {entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] for entry in fs.ls(path, detail=True)}
    if kind == "auto" and {"dataset_dict.json", "dataset_info.json"} & set(children):
        yield name, "dataset"
        return
    suffixes = {"tar": TAR_SUFFIXES, "parquet": (".parquet",), "list": LIST_SUFFIXES}
    for other in suffixes if kind == "auto" else [kind] if kind in suffixes else []:
        within = fs.find(path) if other == "parquet" or kind != "auto" else [f"{path}/{child}" for child in children]
        files = sorted(file for file in within if file.lower().endswith(suffixes[other]))
        is_of_images = any(child.lower().endswith(IMAGE_SUFFIXES) for child in children)
        if files and not (kind == "auto" and (is_of_images or other == "list")):
            for file in files:
                yield f"{name.rstrip('/')}{file[len(path.rstrip('/')) :]}", other
            return
    if kind not in ("auto", "images"):
        raise ValueError(f"{printable(name, 300)}: no {' or '.join(suffixes[kind])} in this folder")
    yield name, "images"


def kind_of_file(name: str, kind: str) -> str:
    """The kind of a file by its name, unless it is said."""
    if kind != "auto":
        return kind
    name = name.lower()
    for suffixes, found in ((TAR_SUFFIXES, "tar"), ((".parquet",), "parquet"), (LIST_SUFFIXES, "list")):
        if name.endswith(suffixes):
            return found
    return "images"


def file_system(place: str) -> tuple[Any, str]:
    """The fsspec file system of a place, and its path there.

    Raises:
        ValueError: no installed package knows such places.
    """
    try:
        return fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{printable(place, 300)}: cannot be opened ({printable(reason_of(error), 200)})") from None


def is_local(fs: Any) -> bool:
    return isinstance(fs, fsspec.implementations.local.LocalFileSystem)


# Fingerprints


def hash_of(parts: Iterable[str]) -> str:
    """SHA-256 of texts, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()


def stamp_of(info: dict[str, Any]) -> str:
    """What a file system says of a file that changes with it, such as its size and time."""
    return json.dumps({key: str(info[key]) for key in STAMPS if info.get(key) is not None})


def whole_file(path: str) -> InputShard:
    fs, inner = file_system(path)
    info = fs.info(inner)
    return InputShard(0, "tar", path, fingerprint=hash_of([path, stamp_of(info)]), num_bytes=info.get("size"))


# Images


def list_images(place: str) -> dict[str, str]:
    """The images of a file or a folder, sorted by path, each with its stamp.

    Raises:
        ValueError: a folder holds none.
    """
    fs, path = file_system(place) if not place.startswith(("http://", "https://")) else (None, place)
    if fs is None:
        return {place: ""}
    if is_local(fs):
        return local_images(place if not is_url(place) else path)
    if not fs.isdir(path):
        return {place: stamp_of(fs.info(path))}
    length = len(path.rstrip("/"))
    found = {
        f"{place.rstrip('/')}{name[length:]}": stamp_of(info)
        for name, info in sorted(fs.find(path, detail=True).items())
        if name.lower().endswith(IMAGE_SUFFIXES)
    }
    if not found:
        raise ValueError(f"{printable(place, 300)}: no images in this folder ({' '.join(IMAGE_SUFFIXES)})")
    return found


def local_images(place: str) -> dict[str, str]:
    """As `list_images`; links that lead out of the folder are left out, as by `find_images`."""
    if not os.path.isdir(place):
        return {place: local_stamp(place)}
    found: list[str] = []
    for folder, folders, files in os.walk(place):
        folders.sort()
        for file in files:
            path = os.path.join(folder, file)
            if file.lower().endswith(IMAGE_SUFFIXES) and not (
                os.path.islink(path) and leads_out(Path(path), Path(place))
            ):
                found.append(path)
    if not found:
        raise ValueError(f"{printable(place, 300)}: no images in this folder ({' '.join(IMAGE_SUFFIXES)})")
    return {path: local_stamp(path) for path in sorted(found)}


def local_stamp(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:  # a link that leads nowhere: its row says so
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


# Parquet


def parquet_shards(path: str, images_per_shard: int) -> list[InputShard]:
    """Rows of one file; a file that cannot be read is a shard, whose only row says so."""
    fs, inner = file_system(path)
    info = fs.info(inner)
    fingerprint, size = hash_of([path, stamp_of(info)]), info.get("size")
    try:
        with open_parquet(path) as file:
            num_rows = file.metadata.num_rows
    except ValueError:
        return [InputShard(0, "parquet", path, fingerprint=fingerprint, num_bytes=size)]
    count = max(1, round(num_rows / images_per_shard))
    edges = [num_rows * index // count for index in range(count + 1)]
    return [
        InputShard(0, "parquet", path, start, stop, fingerprint=fingerprint, num_bytes=(size or 0) // count or None)
        for start, stop in pairwise(edges)
        if stop > start
    ]


# Lists


def list_shards(path: str, images_per_shard: int) -> list[InputShard]:
    """Rows of a list of paths or URLs; its shards know where they begin, so that nobody reads it to there."""
    shards = []
    fs, inner = file_system(path)
    with fs.open(inner, "rb") as file:
        lines = CountedLines(file)
        rows = list_rows(lines, path)
        start, number = 0, 0
        while True:
            offset = lines.offset
            lines.digest = hashlib.sha256()
            number = sum(1 for _ in islice(rows, images_per_shard))
            if not number:
                break
            fingerprint = lines.digest.hexdigest()
            shards.append(InputShard(0, "list", path, start, start + number, offset=offset, fingerprint=fingerprint))
            start += number
    return shards


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
        try:
            yield from csv.DictReader(lines, header, delimiter="\t" if suffix == "tsv" else ",", strict=True)
        except csv.Error as error:
            raise ValueError(f"{shown}: a row cannot be read ({error})") from None
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
    fs, inner = file_system(path)
    with fs.open(inner, "rb") as file:
        names = csv.DictReader(CountedLines(file), delimiter="\t" if suffix == "tsv" else ",").fieldnames
    return list(names or [])


# Datasets


def dataset_shards(name: str, config: InputConfig) -> list[InputShard]:
    """Rows of a dataset; of one that is streamed its files."""
    dataset = open_dataset(name, config.split, config.dataset_config, config.revision, config.streaming)
    if config.streaming:
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
        raise ValueError(
            f"{shown}: no such file, and no dataset that can be loaded ({printable(reason_of(error), 300)})"
        ) from None
    if isinstance(loaded, Dataset | IterableDataset):
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        splits = ", ".join(map(str, loaded))
        said = "give --split, one of" if split is None else f"no split {printable(split)}; it has"
        raise ValueError(f"{shown}: {said} {splits}")
    return loaded[split]
