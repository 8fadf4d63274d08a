"""A packed dataset as Parquet: a folder as `difnet pack --parquet` writes it, or a dataset of the Hub.

Which files are of which split is what `datasets.load_dataset` says of the folder or the repository. Every file is
looked at before anything is read: what is broken or foreign is refused in one line that names it. The original
(mrwu-mac/DIFNet, CVPR 2022) has no such form.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..command_line import reason_of, requires
from ..files import check_regular_file, glob_escape, printable
from ..model_card import HUB_DATASET
from .packed_dataset import PACKED_COLUMNS, quiet_datasets

with requires("data"):
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Array2D, Dataset, Features, List, Value, load_dataset, load_dataset_builder

READ_COLUMNS = (*PACKED_COLUMNS, "restval", "segmentation_features")  # others are left alone
KINDS_OF_COLUMNS = {
    "image_id": "integers",
    "file_name": "text",
    "grid_features": "two-dimensional arrays of float16 or float32",
    "grid_cells": "integers",
    "captions": "lists of text",
    "segmentation_features": "bytes",
}


class ParquetSummary(NamedTuple):
    """What the footer of a Parquet file says.

    Attributes:
        rows: number of images.
        features: types of the columns that are read.
        digest: SHA-256 of the footer, which has sizes and statistics of every column, and no place on a disk.
    """

    rows: int
    features: Features
    digest: str


def hub_name(source: str | os.PathLike) -> str | None:
    """The name of a dataset of the Hub, "user/name"; `None` for what is no such name, or is a path.

    Where there is a folder "user", "user/name" is a path, perhaps with a mistake in it.
    """
    path = Path(source)
    text = path.as_posix()
    return text if HUB_DATASET.fullmatch(text) and not path.parent.exists() and not os.path.lexists(path) else None


def is_parquet(source: str | os.PathLike) -> bool:
    """Whether a dataset is a name on the Hub, or a folder of Parquet files."""
    place = Path(source)
    if hub_name(source) is not None:
        return True
    if (place / "dataset_dict.json").exists():
        return False
    return any(any(place.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))


def parquet_files(source: str | os.PathLike) -> dict[str, list[str]]:
    """The files of every split: paths, or URLs that name the commit of the Hub's repository.

    Args:
        source: folder, or name on the Hub.

    Raises:
        ValueError: they cannot be listed, or none of them is Parquet.
    """
    name, shown = hub_name(source), printable(source, 300)
    folder = os.path.abspath(source)
    try:
        with quiet_datasets():
            found = load_dataset_builder(name or folder).config.data_files or {}
    except Exception as error:
        # Listing reaches datasets, huggingface_hub, fsspec, YAML and the network, each with errors of its own.
        said = printable(reason_of(error), 300)
        if name is not None:
            raise ValueError(
                f"{shown}: no such folder, and no dataset of that name on the Hub can be read ({said}). Give the "
                "folder of a packed dataset (`difnet pack` makes one); for a private one, HF_TOKEN"
            ) from None
        raise ValueError(f"{shown}: its Parquet files cannot be listed ({said}); pack again with --parquet") from None
    splits = {str(split): [file for file in files if file.endswith(".parquet")] for split, files in found.items()}
    splits = {split: files for split, files in splits.items() if files}
    if not splits:
        raise ValueError(f"{shown} holds no Parquet files of a split; `difnet pack --parquet` makes them")
    if name is None:
        for file in (file for files in splits.values() for file in files):
            if not Path(os.path.abspath(file)).is_relative_to(folder):
                raise ValueError(f"{shown}: its README.md names {printable(file)}, which lies elsewhere; pack again")
    return splits


def hub_file(source: str | os.PathLike, file: str) -> Path:
    """A file of a dataset of the Hub, in the cache of huggingface_hub.

    Raises:
        OSError: there is none, or the Hub cannot be reached.
        ValueError: `source` is no name on the Hub.
    """
    from huggingface_hub import hf_hub_download

    name = hub_name(source)
    if name is None:
        raise ValueError(f"{printable(source, 300)} is no name of a dataset on the Hub")
    return Path(hf_hub_download(name, file, repo_type="dataset"))


@contextlib.contextmanager
def open_parquet(file: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file, of which only what is asked for is read.

    Args:
        file: path or URL.

    Raises:
        ValueError: it is damaged, or is no Parquet file.
    """
    if "://" in file:
        handle = fsspec.open(file, "rb").open()
    else:
        check_regular_file(file)
        handle = open(file, "rb")  # noqa: SIM115 (closed below)
    with handle:
        try:
            yield pq.ParquetFile(handle)
        except (pa.ArrowException, OSError) as error:
            said = printable(" ".join(str(error).split()), 200)
            raise ValueError(
                f"{printable(file, 300)}: damaged or cut off ({said}); copy it once more, or pack again"
            ) from None


def summarize_parquet(file: str) -> ParquetSummary:
    """The footer of a file that has the columns of a packed dataset.

    Raises:
        ValueError: it is damaged, lacks a column, or has one of another type.
    """
    with open_parquet(file) as parquet:
        footer = parquet.metadata
        features = Features.from_arrow_schema(parquet.schema_arrow)
        digest = hashlib.sha256(json.dumps(footer.to_dict(), default=repr, sort_keys=True).encode()).hexdigest()
    missing = [name for name in PACKED_COLUMNS if name not in features]
    if missing:
        raise ValueError(
            f"{printable(file, 300)}: it has no column {', '.join(missing)}, which packed datasets have; "
            "`difnet pack --parquet` makes them"
        )
    features = Features({name: kind for name, kind in features.items() if name in READ_COLUMNS})
    for name, kind in features.items():
        if name in KINDS_OF_COLUMNS and not _is_kind(kind, KINDS_OF_COLUMNS[name]):
            raise ValueError(
                f"{printable(file, 300)}: {name} is {printable(str(kind))}, and a packed dataset has "
                f"{KINDS_OF_COLUMNS[name]}; `difnet pack --parquet` makes them"
            )
    return ParquetSummary(footer.num_rows, features, digest)


def _is_kind(kind: Any, expected: str) -> bool:
    if expected == KINDS_OF_COLUMNS["grid_features"]:
        return isinstance(kind, Array2D) and kind.dtype in ("float16", "float32") and None not in kind.shape
    if expected == "lists of text":
        return isinstance(kind, List) and _is_kind(kind.feature, "text")
    dtypes = {"text": ("string", "large_string"), "bytes": ("binary", "large_binary")}
    if not isinstance(kind, Value):
        return False
    return "int" in kind.dtype if expected == "integers" else kind.dtype in dtypes[expected]


def summarize_split(files: Sequence[str]) -> list[ParquetSummary]:
    """The footers of all files of a split, which have the same columns of the same shapes.

    Raises:
        ValueError: as `summarize_parquet`, or two files differ, or there are no images.
    """
    summaries = [summarize_parquet(file) for file in files]
    first = summaries[0].features
    for file, summary in zip(files, summaries, strict=True):
        for name in {**first, **summary.features}:
            expected, found = first.get(name), summary.features.get(name)
            if expected != found:
                raise ValueError(
                    f"{printable(file, 300)}: {name} is {_form(found)}, and {_form(expected)} in "
                    f"{printable(files[0], 300)}; a split has one form: pack its images together"
                )
    if not any(summary.rows for summary in summaries):
        raise ValueError(f"{printable(files[0], 300)}: the split has no images")
    return summaries


def _form(kind: Any) -> str:
    if isinstance(kind, Array2D):
        return f"{kind.dtype} {tuple(kind.shape)}"
    return "missing" if kind is None else printable(str(kind))


def load_parquet_split(files: Sequence[str], split: str) -> Dataset:
    """A split as a map-style dataset: `datasets` keeps a copy of its rows as Arrow in its cache on the disk.

    Args:
        files: of the split.
        split: its name.

    Raises:
        ValueError: a file is damaged or foreign; the text names it.
    """
    columns = list(summarize_split(files)[0].features)
    try:
        with quiet_datasets():
            return load_dataset("parquet", data_files={split: as_patterns(files)}, columns=columns, split=split)
    except Exception as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from None  # a full disk, mostly
        for file in files:
            with open_parquet(file) as parquet:
                for _ in parquet.iter_batches(columns=columns):
                    pass
        raise ValueError(
            f"{printable(files[0], 300)} and the other files of the split {split!r} cannot be read "
            f"({printable(reason_of(error), 300)}); pack again"
        ) from None


def stream_parquet(files: Sequence[str], columns: Mapping[str, Any]) -> Any:
    """The rows of some files, one after another, as an `IterableDataset` of Arrow tables; nothing is kept.

    Arrow decodes a file ahead of who reads it, to its end. Files on the disk are therefore read by row group (64
    images in what `difnet pack` writes), which bounds the memory, and a resumed stream begins with the row group it
    stopped in. Files of the Hub are read ahead: memory holds one of them at most.

    Args:
        files: of a split, in the order to read them in.
        columns: to read.
    """
    with quiet_datasets():
        stream = load_dataset(
            "parquet",
            data_files={"train": as_patterns(files)},
            columns=list(columns),
            split="train",
            streaming=True,
        )
    is_local = not any("://" in file for file in files)
    return (stream.reshard() if is_local else stream).with_format("arrow")


def as_patterns(files: Sequence[str]) -> list[str]:
    """Paths as `load_dataset` takes them, for which `[` begins a pattern."""
    return [file if "://" in file else glob_escape(file) for file in files]
