"""Where captions of many images go: a folder on a disk, or anywhere that fsspec writes, one file for each shard.

    OUTPUT/data/captions-00003-of-00100.parquet   or .jsonl: a row for each image
    OUTPUT/manifests/00003.json                   counts, hash and provenance of that file: the shard is finished
    OUTPUT/run.json                               what all shards have in common
    OUTPUT/summary.json                           of all shards, when the last one is finished

A file appears whole or not at all, and a manifest after its file: whatever lacks one is made again. The folder is what
`datasets.load_dataset` loads. The original (mrwu-mac/DIFNet, CVPR 2022) keeps all captions in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..command_line import reason_of, requires
from ..files import atomic_output, make_folder, name_file_in_errors, printable
from ..stage_times import StageTimes
from .places import file_system, is_local, is_web

with requires("data"):
    import pyarrow as pa
    import pyarrow.parquet as pq

WRITING = "writing"
"""Name of the stage of outputs."""
ROWS_PER_GROUP = 4096
FEW_FILES = 8  # which are asked for one by one, not by a listing
ROWS_WITH_FEATURES = 64  # in memory at once, of 0.2 MB each
# Of these file systems a file appears when all of it is there.
OBJECT_STORES = {"abfs", "adl", "az", "gcs", "gs", "hf", "memory", "oci", "oss", "r2", "s3", "s3a"}


def caption_schema(with_beams: bool = False, with_confidence: bool = False, features: str | None = None) -> pa.Schema:
    """The columns of captions.

    Args:
        with_beams: whether there are several captions of an image, the best first.
        with_confidence: whether rows say how sure the captioner is.
        features: "float16" or "float32" with the features of the images, in the form of a packed dataset.
    """
    score = pa.float32()
    columns = {"key": pa.string(), "source": pa.string(), "caption": pa.string(), "score": score}
    if with_beams:
        columns["beams"] = pa.list_(pa.struct({"caption": pa.string(), "score": score}))
    if with_confidence:
        columns |= dict.fromkeys(("mean_log_prob", "margin", "agreement", "confidence", "expected_cider_d"), score)
        numbers = dict.fromkeys(("log_prob", "entropy", "support", "confidence"), score)
        columns["words"] = pa.list_(pa.struct({"word": pa.string(), **numbers}))
    if features is not None:
        columns |= _feature_columns(True, True, features)
    return pa.schema({**columns, "error": pa.string()})


def feature_schema(with_grids: bool, with_segmentation: bool, dtype: str) -> pa.Schema:
    """The columns of features, in the form of a packed dataset.

    Args:
        with_grids, with_segmentation: which features there are.
        dtype: of their values, "float16" or "float32".
    """
    columns = _feature_columns(with_grids, with_segmentation, dtype)
    return pa.schema({"key": pa.string(), "source": pa.string(), **columns, "error": pa.string()})


def _feature_columns(with_grids: bool, with_segmentation: bool, dtype: str) -> dict[str, pa.DataType]:
    values = pa.float16() if dtype == "float16" else pa.float32()
    grids = {"grid_features": pa.list_(pa.list_(values)), "grid_cells": pa.uint16()}
    return (grids if with_grids else {}) | ({"segmentation_features": pa.binary()} if with_segmentation else {})


class RowWriter:
    """Writes rows to a file, a group at a time.

    Args:
        path: of the file.
        schema: of the rows.
        format: "parquet" or "jsonl".
        times: gets the time of `WRITING`.
    """

    def __init__(self, path: Path, schema: pa.Schema, format: str, times: StageTimes | None = None) -> None:
        self.schema = schema
        self.times = times or StageTimes()
        self.rows: list[Mapping[str, Any]] = []
        self.group_size = ROWS_WITH_FEATURES if "grid_features" in schema.names else ROWS_PER_GROUP
        self.parquet = pq.ParquetWriter(path, schema, compression="zstd") if format == "parquet" else None
        self.text = None if self.parquet else open(path, "w", encoding="utf-8", newline="\n")  # noqa: SIM115

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is None:
            self.flush()
        (self.parquet or self.text).close()  # type: ignore[union-attr]

    def write(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) == self.group_size:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that wait for their group to be full."""
        with self.times.stage(WRITING):
            if self.parquet is not None and self.rows:
                self.parquet.write_table(table_of(self.rows, self.schema))
            elif self.text is not None:
                for row in self.rows:
                    kept = {name: value for name, value in row.items() if value is not None}
                    self.text.write(json.dumps(kept, ensure_ascii=False) + "\n")
        self.rows = []


def table_of(rows: list[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table; arrays of features go there without becoming lists of numbers."""
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if field.name == "grid_features":
            columns.append(_nested(values, field.type))
        else:
            columns.append(pa.array(values, field.type))
    return pa.table(columns, schema=schema)


def _nested(arrays: list[np.ndarray | None], kind: pa.ListType) -> pa.ListArray:
    """Arrays (cells, C), of which some are missing, as lists of lists."""
    present = [array for array in arrays if array is not None]
    flat = np.concatenate([array.reshape(-1) for array in present]) if present else np.empty(0)
    cells = np.cumsum([0, *(width for array in present for width in [array.shape[1]] * len(array))])
    inner = pa.ListArray.from_arrays(cells.astype(np.int32), pa.array(flat, kind.value_type.value_type))
    edges = np.cumsum([0, *(0 if array is None else len(array) for array in arrays)]).astype(np.int32)
    missing = np.array([array is None for array in arrays])
    return pa.ListArray.from_arrays(pa.array(edges), inner, mask=pa.array(missing))


class OutputFolder:
    """The folder that captions go to.

    Args:
        place: path, or URL of what fsspec writes.

    Raises:
        ValueError: no installed package knows such places, or a file is in the way.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        if not place:
            raise ValueError("--output has an empty name; give a folder, or a URL such as s3://BUCKET/FOLDER")
        if is_web(place):
            raise ValueError(
                f"{printable(place, 300)}: a web server, which is not written to; choose another --output"
            )
        self.fs, self.root = file_system(place)
        self.local = Path(self.root) if is_local(self.fs) else None
        self.is_object_store = bool(OBJECT_STORES & set(np.atleast_1d(self.fs.protocol)))
        if self.local is not None:
            make_folder(self.local)

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """The sizes of those of some files that are there."""
        found: dict[str, int] = {}
        if len(names) <= FEW_FILES:
            for name in names:
                with self.named(), contextlib.suppress(FileNotFoundError):
                    found[name] = self.fs.info(f"{self.root}/{name}")["size"]
            return found
        for folder in {name.rpartition("/")[0] for name in names}:
            with self.named(), contextlib.suppress(FileNotFoundError):
                for entry in self.fs.ls(f"{self.root}/{folder}", detail=True, refresh=True):
                    found[f"{folder}/{entry['name'].rstrip('/').rpartition('/')[2]}"] = entry.get("size") or 0
        wanted = set(names)
        return {name: size for name, size in found.items() if name in wanted}

    def names(self, folder: str) -> list[str]:
        """The names of the files in one of its folders, from this one on; none where there is no such folder."""
        entries: list[str] = []
        with self.named(), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            entries = self.fs.ls(f"{self.root}/{folder}", detail=False, refresh=True)
        return [f"{folder}/{entry.rstrip('/').rpartition('/')[2]}" for entry in sorted(entries)]

    def read_json(self, names: Collection[str]) -> dict[str, dict[str, Any]]:
        """JSON objects by the names of their files; those that are not there, or are damaged, are left out."""
        paths = {f"{self.root}/{name}".lstrip("/"): name for name in names}
        contents: dict[str, bytes] = {}
        if self.local is None and paths:
            with self.named():
                contents = self.fs.cat([f"{self.root}/{name}" for name in names], on_error="omit")
        if self.local is not None:
            for path, name in paths.items():
                with contextlib.suppress(OSError):
                    contents[path] = (self.local / name).read_bytes()
        found = {}
        for path, content in contents.items():
            with contextlib.suppress(ValueError):
                said = json.loads(content)
                if isinstance(said, dict):
                    found[paths[path.lstrip("/")]] = said
        return found

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        with self.named(), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{name}")

    def write_json(self, name: str, said: Mapping[str, Any], overwrite: bool = True) -> None:
        """Writes a JSON file, whole or not at all.

        Raises:
            FileExistsError: it is there already and `overwrite` is `False`.
        """
        content = json.dumps(said, indent=1, ensure_ascii=False) + "\n"
        with self.writing(name, overwrite) as path:
            path.write_text(content, encoding="utf-8")

    @contextlib.contextmanager
    def writing(self, name: str, overwrite: bool = True) -> Iterator[Path]:
        """A local path to write a file to, which becomes `name` of this folder when the block ends without an error.

        Raises:
            FileExistsError: it is there already and `overwrite` is `False`.
        """
        if self.local is not None:
            with atomic_output(self.local / name, overwrite) as path:
                yield path
            return
        target = f"{self.root}/{name}"
        with self.named():
            if not overwrite and self.fs.exists(target):
                raise FileExistsError(f"{printable(self.place)}/{name}")
        with tempfile.TemporaryDirectory(prefix="difnet-", ignore_cleanup_errors=True) as work:
            path = Path(work, "output")
            with name_file_in_errors(path):
                yield path
            with self.named():
                self._put(path, target)

    def _put(self, path: Path, target: str) -> None:
        folder, _, base = target.rpartition("/")
        self.fs.makedirs(folder, exist_ok=True)
        if self.is_object_store:
            self.fs.put_file(str(path), target)
        else:
            self.fs.put_file(str(path), f"{folder}/.{base}.unfinished")
            self.fs.mv(f"{folder}/.{base}.unfinished", target)

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Names the place in errors of file systems elsewhere, which often say neither what nor where.

        Raises:
            OSError: it cannot be read or written.
        """
        try:
            yield
        except (ValueError, ImportError, MemoryError, FileExistsError):
            raise
        except Exception as error:  # of aiohttp, botocore, gcsfs .., each with classes of its own
            if self.local is not None:
                raise
            said = printable(reason_of(error), 300)
            raise OSError(
                f"{printable(self.place, 300)}: this output cannot be used now ({said}); the same command resumes"
            ) from error

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Keeps other processes from the same work, where the folder is on a disk.

        Yields:
            Whether this process has it. Elsewhere every process has it: what two of them write is equal.
        """
        if self.local is None:
            yield True
            return
        folder = self.local / ".locks"
        make_folder(folder)
        lock = FileLock(folder / f"{name}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            # Removed while it is held: who waits for the removed file looks for the manifest, and finds it.
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def data_name(index: int, num_shards: int, format: str, what: str = "captions") -> str:
    """The file of a shard's rows, in the form in which `datasets.load_dataset` finds the files of the split `what`."""
    digits = max(5, math.ceil(math.log10(num_shards + 1)))
    return f"data/{what}-{index:0{digits}d}-of-{num_shards:0{digits}d}.{format}"


def manifest_name(index: int) -> str:
    return f"manifests/{index:05d}.json"
