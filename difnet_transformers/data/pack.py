"""Packs grid features, segmentation features and captions of COCO into one dataset that opens in milliseconds.

In place of the original's `coco_grid_feats2.hdf5`, 123,287 `.npy` files and four kinds of annotation files. What
differs from the original: the grid features are stored in half the space, an image without features is an error and is
never replaced by random numbers, and the folder says where it came from.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shlex
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..command_line import add_debug_option, add_strict_option, describe, requires, run_command
from ..files import path_inside, printable, read_json

with requires("data"):
    import datasets
    from datasets.arrow_writer import ArrowWriter, ParquetWriter

from .captions import ImageRow, read_annotations
from .errors import BrokenImage, GridSizeError, PackingError, Problem, raise_problems
from .feature_files import GridFiles, SegmentationFiles
from .grids import check_segmentation, fit_grid
from .normalization import normalize_caption, normalize_file_name
from .packed_dataset import (
    decode_segmentation,
    encode_segmentation,
    float16_bound,
    load_packed_split,
    packed_features,
    packed_splits,
    to_stored,
)

ROWS_PER_WRITE = 64  # bounds the memory of a writer to a few times 13 MB
GRID_FITS = ("refuse", "pool", "cut")
FITTED = ("padded", "pooled", "cut")
LINES_OF_LEFT_OUT = 100
ROWS_TO_TRY = 10
LARGEST_GRID_SIZE = 255  # the number of cells is stored as uint16


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what the rows look like. `grid_fit` is `fit` of `fit_grid`."""

    features: tuple[str, ...]
    segmentation: str | None
    annotations: str
    dtype: str = "float16"
    grid_size: int = 7
    grid_feature_size: int = 2048
    num_segmentation_classes: int = 133
    skip_missing: bool = False
    grid_fit: str = "refuse"

    def segmentation_shape(self) -> tuple[int, int, int]:
        return (self.num_segmentation_classes, self.grid_size, self.grid_size)

    def columns(self) -> datasets.Features:
        with_segmentation = self.segmentation is not None
        return packed_features(self.dtype, self.grid_size, self.grid_feature_size, with_segmentation)


# From the files of an image to a row


class Packer:
    """Turns image rows into rows of the dataset.

    Collects `problems`, the hashes of the `.npy` files, and how many grids were of another size (`fitted`).
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.grids = GridFiles(recipe.features)
        self.segmentation = None if recipe.segmentation is None else SegmentationFiles(recipe.segmentation)
        self.problems: list[Problem] = []
        self.hashes: dict[int, str] = {}
        self.fitted = dict.fromkeys(FITTED, 0)

    def sources_of(self, row: ImageRow, places: tuple[str, str | None]) -> tuple[np.ndarray, int, np.ndarray | None]:
        """Float32 grid, number of cells that are not padded, and segmentation; BrokenImage with the file's name."""
        grid_path, segmentation_name = places
        source = grid_path
        try:
            array = self.grids.read(grid_path, row.image_id)
            wanted = self.recipe.grid_size**2
            grid, cells = fit_grid(array, self.recipe.grid_size, self.recipe.grid_feature_size, self.recipe.grid_fit)
            is_fitted = array.ndim == 2 and len(array) != wanted
            segmentation = None
            if self.segmentation is not None:
                source = os.path.join(self.segmentation.path, segmentation_name)
                array, self.hashes[row.image_id] = self.segmentation.read(segmentation_name)
                segmentation = check_segmentation(array, self.recipe.segmentation_shape())
        except (PackingError, BrokenImage):
            raise
        except (ValueError, OSError, RuntimeError) as error:
            raise BrokenImage(source, str(error)) from None
        if is_fitted:
            self.fitted["padded" if cells < wanted else "pooled" if self.recipe.grid_fit == "pool" else "cut"] += 1
        return grid, cells, segmentation

    def examples(self, rows: list[tuple[ImageRow, tuple[str, str | None]]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for row, places in rows:
            try:
                grid, cells, segmentation = self.sources_of(row, places)
                source = places[0]
                example = {
                    "image_id": row.image_id,
                    "file_name": row.file_name,
                    "restval": row.restval,
                    "grid_features": to_stored(grid, self.recipe.dtype),
                    "grid_cells": cells,
                    "captions": list(row.captions),
                }
                if segmentation is not None:
                    source = os.path.join(self.recipe.segmentation, places[1])
                    example["segmentation_features"] = encode_segmentation(to_stored(segmentation, self.recipe.dtype))
            except BrokenImage as broken:
                self.problems.append(Problem(broken.source, broken.what, row.image_id))
            except ValueError as error:
                self.problems.append(Problem(printable(source, 300), str(error), row.image_id))
            else:
                yield row.image_id, example


# The plan: every row with the places of its features, what is missing


class Plan(NamedTuple):
    splits: dict[str, list[tuple[ImageRow, tuple[str, str | None]]]]
    annotation_files: list[Path]
    left_out: list[Problem]
    unused_features: list[int]


def make_plan(recipe: Recipe) -> Plan:
    """Match annotations and features; PackingError lists every image that lacks something, unless they are skipped."""
    splits, annotation_files, problems = read_annotations(recipe.annotations)
    are_annotations_whole = not problems
    grid_places = GridFiles(recipe.features).index()
    segmentation_places = None if recipe.segmentation is None else SegmentationFiles(recipe.segmentation).index()
    planned: dict[str, list[tuple[ImageRow, tuple[str, str | None]]]] = {}
    wanted = set()
    for split, rows in splits.items():
        planned[split] = []
        for row in rows:
            wanted.add(row.image_id)
            before = len(problems)
            if row.image_id not in grid_places:
                problems.append(Problem(", ".join(recipe.features), "no features", row.image_id))
            if segmentation_places is not None and row.image_id not in segmentation_places:
                problems.append(Problem(recipe.segmentation, "no segmentation", row.image_id))
            if not row.captions and (are_annotations_whole or recipe.skip_missing):
                problems.append(Problem(recipe.annotations, "no captions", row.image_id))
            if len(problems) == before:
                segmentation = None if segmentation_places is None else segmentation_places[row.image_id]
                planned[split].append((row, (grid_places[row.image_id], segmentation)))
    unused = sorted(set(grid_places) - wanted)
    surplus = [
        Problem(grid_places[index], f"features without annotations in {recipe.annotations}", index) for index in unused
    ]
    for image_id in sorted(set(segmentation_places or ()) - wanted - set(unused)):
        surplus.append(
            Problem(recipe.segmentation, f"segmentation without annotations in {recipe.annotations}", image_id)
        )
    if not recipe.skip_missing:
        # With entries that cannot be read, features of theirs and images without captions only follow from it.
        raise_problems(problems + (surplus if are_annotations_whole else []))
    return Plan({name: rows for name, rows in planned.items() if rows}, annotation_files, problems, unused)


def check_grid_size(recipe: Recipe, plan: Plan) -> None:
    """PackingError before the work begins if not one grid of the first images fits; a single one is found later."""
    grids = GridFiles(recipe.features)
    rows = list(itertools.islice(itertools.chain.from_iterable(plan.splits.values()), ROWS_TO_TRY))
    said = []
    for row, (path, _) in rows:
        try:
            fit_grid(grids.read(path, row.image_id), recipe.grid_size, recipe.grid_feature_size, recipe.grid_fit)
        except GridSizeError as error:
            said.append(f"{printable(path, 300)}: image {row.image_id}: {error}")
        except ValueError:
            continue
        else:
            return
    if said:
        raise PackingError(said[0])


class CocoCaptionsConfig(datasets.BuilderConfig):
    """The fields of `Recipe`, as keyword arguments; `grid_files` for `features`, a name that every builder takes."""

    def __init__(self, grid_files=(), segmentation=None, annotations="", **kwargs):
        names = {field.name for field in dataclasses.fields(Recipe)}
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        super().__init__(**kwargs)
        grid_files = [grid_files] if isinstance(grid_files, str) else grid_files
        self.recipe = Recipe(tuple(grid_files), segmentation, annotations, **options)


class CocoCaptions(datasets.GeneratorBasedBuilder):
    """The rows as a 🤗 Datasets builder, for use from Python.

    `CocoCaptions(grid_files=["grids.hdf5"], segmentation="segmentations", annotations="annotations")`, then
    `download_and_prepare()` and `as_dataset()`, or `as_streaming_dataset()` without packing anything. The command
    packs the same rows into shards that survive being killed.
    """

    BUILDER_CONFIG_CLASS = CocoCaptionsConfig
    DEFAULT_WRITER_BATCH_SIZE = ROWS_PER_WRITE
    VERSION = datasets.Version("1.0.0")

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.config.recipe.columns())

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        splits = make_plan(self.config.recipe).splits
        return [datasets.SplitGenerator(name=name, gen_kwargs={"rows": rows}) for name, rows in splits.items()]

    def _generate_examples(self, rows):
        packer = Packer(self.config.recipe)
        yield from packer.examples(rows)
        if not self.config.recipe.skip_missing:
            raise_problems(packer.problems)


# Shards: written one by one under other names and renamed when they are complete


class Shard(NamedTuple):
    path: str
    split: str
    start: int
    stop: int


def shards_of(plan: Plan, parquet: bool, shard_size: int) -> list[Shard]:
    """The shards in order; they depend on the rows alone, not on the number of processes."""
    shards = []
    for split, rows in plan.splits.items():
        count = -(-len(rows) // shard_size)
        for index in range(count):
            name = f"{index:05d}-of-{count:05d}"
            path = f"data/{split}-{name}.parquet" if parquet else f"{split}/data-{name}.arrow"
            start = index * shard_size
            shards.append(Shard(path, split, start, min(start + shard_size, len(rows))))
    return shards


def write_shard(
    recipe: Recipe, rows: list, path: Path, report: Path, scratch: Path, tick: Callable[[], object] = lambda: None
) -> dict:
    """Write one shard, in the folder `scratch` until it is complete, and then `report`, which says that it is.

    The report holds the number of rows, size and SHA-256 of the shard, the problems, and the hashes of the `.npy`
    files. With problems that are not to be skipped there is no shard and no report.
    """
    packer = Packer(recipe)
    unfinished = scratch / f"{path.parent.name}-{path.name}"
    writer_class = ParquetWriter if path.suffix == ".parquet" else ArrowWriter
    try:
        writer = writer_class(features=recipe.columns(), path=str(unfinished), writer_batch_size=ROWS_PER_WRITE)
        for _, example in packer.examples(rows):
            writer.write(example)
            tick()
        num_rows, _ = writer.finalize()
        writer.close()
        result = {
            "rows": num_rows,
            "bytes": unfinished.stat().st_size,
            "sha256": sha256_of(unfinished),
            "problems": packer.problems,
            "hashes": packer.hashes,
            "fitted": packer.fitted,
        }
        if not packer.problems or recipe.skip_missing:
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            write_atomically(report, json.dumps(result))
    finally:
        unfinished.unlink(missing_ok=True)
    return result


def sha256_of(path: str | Path, tick: Callable[[int], object] = lambda size: None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            tick(len(block))
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others

    def wait():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def write_shards(recipe: Recipe, plan: Plan, shards: list[Shard], work: Path, num_proc: int) -> list[dict]:
    """Write the shards that are not finished yet, in `num_proc` processes; the reports of all, in order."""
    reports = {shard: work / "reports" / (shard.path.replace("/", "-") + ".json") for shard in shards}
    results: dict[Shard, dict] = {}
    for shard in shards:
        target = work / "packed" / shard.path
        target.parent.mkdir(parents=True, exist_ok=True)
        result = _finished_report(reports[shard])
        if result is not None and target.is_file() and target.stat().st_size == result["bytes"]:
            results[shard] = result
    for leftover in work.rglob("*.unfinished"):
        leftover.unlink(missing_ok=True)
    # A worker of a killed run may live on for a moment. It finds its own scratch folder gone, and ends.
    for leftover in work.glob("scratch-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = work / f"scratch-{os.getpid()}"
    scratch.mkdir(exist_ok=True)
    todo = [shard for shard in shards if shard not in results]
    finished = sum(result["rows"] for result in results.values())
    check_space(recipe, sum(shard.stop - shard.start for shard in todo), work)
    total = sum(map(len, plan.splits.values()))
    with tqdm(total=total, initial=finished, unit=" images", desc="packing", mininterval=0.5) as progress:
        arguments = {
            shard: (
                recipe,
                plan.splits[shard.split][shard.start : shard.stop],
                work / "packed" / shard.path,
                reports[shard],
                scratch,
            )
            for shard in todo
        }
        if num_proc == 1:
            for shard in todo:
                results[shard] = write_shard(*arguments[shard], tick=progress.update)
        else:
            # Spawned rather than forked, because HDF5 files and threads do not survive a fork.
            pool = ProcessPoolExecutor(num_proc, mp_context=get_context("spawn"), initializer=_end_with_parent)
            with pool, _ending_workers():
                futures = {pool.submit(write_shard, *arguments[shard]): shard for shard in todo}
                try:
                    for future in as_completed(futures):
                        results[futures[future]] = future.result()
                        progress.update(future.result()["rows"])
                except BrokenProcessPool:
                    raise ValueError(
                        f"{work}: one of the processes was killed, mostly for lack of memory; the same command "
                        "goes on after the finished shards, with a smaller --num-proc if need be"
                    ) from None
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    ordered = [results[shard] for shard in shards]
    if not recipe.skip_missing:
        raise_problems([Problem(*problem) for result in ordered for problem in result["problems"]])
    return ordered


def _finished_report(path: Path) -> dict | None:
    """The report of a finished shard; None where there is none, or it was not written to its end."""
    try:
        result = read_json(path)
    except (OSError, ValueError):
        return None
    fields = {"rows": int, "bytes": int, "sha256": str, "problems": list, "hashes": dict, "fitted": dict}
    is_whole = isinstance(result, dict) and all(isinstance(result.get(name), kind) for name, kind in fields.items())
    return result if is_whole else None


@contextlib.contextmanager
def _ending_workers() -> Iterator[None]:
    """After Ctrl-C or SIGTERM the processes end at once; what they had not finished is packed by the next run."""
    try:
        yield
    except KeyboardInterrupt:
        for process in active_children():
            process.terminate()
        raise


def check_space(recipe: Recipe, rows: int, folder: Path) -> None:
    itemsize = np.dtype(recipe.dtype).itemsize
    row_bytes = recipe.grid_size**2 * recipe.grid_feature_size * itemsize + 2000
    free = shutil.disk_usage(folder).free
    if free < rows * row_bytes:
        raise PackingError(
            f"{folder}: {rows} images need about {rows * row_bytes / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free"
        )


# Provenance, and the files that make a folder a dataset


def describe_sources(recipe: Recipe, plan: Plan, results: list[dict], work: Path) -> dict:
    """Names, sizes and SHA-256 of all source files. Those of big files are kept in `work`, in case of a new start."""
    kept = work / "hashes.json"
    try:
        known = read_json(kept)
    except (OSError, ValueError):
        known = {}
    files = [*recipe.features, *map(str, plan.annotation_files)]
    if recipe.segmentation is not None and os.path.isfile(recipe.segmentation):
        files.append(recipe.segmentation)
    described = {}
    with tqdm(total=sum(map(os.path.getsize, files)), unit="B", unit_scale=True, desc="hashing sources") as progress:
        for path in files:
            status = os.stat(path)
            identity = f"{path} {status.st_size} {status.st_mtime_ns}"
            if identity in known:
                progress.update(status.st_size)
            else:
                known[identity] = sha256_of(path, progress.update)
                write_atomically(kept, json.dumps(known))
            described[path] = {"name": os.path.basename(path), "bytes": status.st_size, "sha256": known[identity]}
    segmentation = described.get(recipe.segmentation)
    if recipe.segmentation is not None and segmentation is None:
        hashes = {int(image_id): value for result in results for image_id, value in result["hashes"].items()}
        lines = "".join(f"{image_id} {hashes[image_id]}\n" for image_id in sorted(hashes))
        segmentation = {
            "name": os.path.basename(os.path.normpath(recipe.segmentation)),
            "files": len(hashes),
            "sha256 of the lines '<image id> <sha256>'": hashlib.sha256(lines.encode()).hexdigest(),
        }
    return {
        "features": [described[path] for path in recipe.features],
        "segmentation": segmentation,
        "annotations": [described[str(path)] for path in plan.annotation_files],
    }


def provenance_of(
    recipe: Recipe, plan: Plan, shards: list[Shard], results: list[dict], work: Path, command: str
) -> dict:
    splits: dict[str, dict[str, int]] = {}
    for shard, result in zip(shards, results, strict=True):
        broken = {problem[2] for problem in result["problems"]}
        rows = [row for row, _ in plan.splits[shard.split][shard.start : shard.stop] if row.image_id not in broken]
        counts = splits.setdefault(shard.split, {"images": 0, "captions": 0, "restval_images": 0})
        counts["images"] += result["rows"]
        counts["captions"] += sum(len(row.captions) for row in rows)
        counts["restval_images"] += sum(row.restval for row in rows)
    left_out = plan.left_out + [Problem(*problem) for result in results for problem in result["problems"]]
    fitted = {name: sum(result["fitted"].get(name, 0) for result in results) for name in FITTED}
    return {
        "command": command,
        "dtype": recipe.dtype,
        "grid_size": recipe.grid_size,
        "grid_feature_size": recipe.grid_feature_size,
        "num_segmentation_classes": recipe.num_segmentation_classes if recipe.segmentation is not None else None,
        "grid_fit": recipe.grid_fit,
        "grids_of_another_size": fitted,
        "splits": splits,
        "skip_missing": recipe.skip_missing,
        "left_out": [problem._asdict() for problem in left_out],
        "features_without_annotations": plan.unused_features,
        "sources": describe_sources(recipe, plan, results, work),
        "shards": {
            shard.path: {"rows": result["rows"], "bytes": result["bytes"], "sha256": result["sha256"]}
            for shard, result in zip(shards, results, strict=True)
        },
        "versions": {name: version(name) for name in ("datasets", "pyarrow", "numpy", "h5py")},
    }


def card_of(provenance: dict, parquet: bool) -> str:
    files = "".join(
        f"      - split: {split}\n        path: data/{split}-*.parquet\n" for split in provenance["splits"] if parquet
    )
    head = f"configs:\n  - config_name: default\n    data_files:\n{files}" if parquet else ""
    counts = "".join(
        f"| {split} | {count['images']:,} | {count['captions']:,} | {count['restval_images']:,} |\n"
        for split, count in provenance["splits"].items()
    )
    sources = [*provenance["sources"]["features"], *provenance["sources"]["annotations"]]
    names = "".join(
        f"* `{printable(source['name'])}`, {source['bytes']:,} bytes, SHA-256 `{source['sha256']}`\n"
        for source in sources
    )
    opened = "load_dataset(folder)" if parquet else "load_from_disk(folder)"
    return (
        f"---\ntask_categories:\n  - image-to-text\nlanguage:\n  - en\n{head}---\n\n"
        "# COCO features and captions for DIFNet\n\n"
        f"`datasets.{opened}` opens it; `dataset_difnet.py` of DIFNet for Transformers makes batches of it. One row "
        f"an image; grid features as {provenance['dtype']}, segmentation packed by `encode_segmentation`.\n\n"
        f"| split | images | captions | images of restval |\n|---|---|---|---|\n{counts}\n"
        f"{''.join(line + chr(10) for line in fitted_lines(provenance))}"
        f"Left out: {len(provenance['left_out'])} images.\n\n"
        f"Made by `{printable(provenance['command'], 2000)}` from\n\n{names}\n"
        "`provenance.json` says the rest: the hashes of all sources and shards, what was left out, versions.\n"
    )


def fitted_lines(provenance: dict) -> list[str]:
    """What became of grids of another size, one line for each kind."""
    side = provenance["grid_size"]
    said = {
        "padded": f"had fewer than {side} x {side} cells and were padded with zeros at the end",
        "pooled": f"were averaged to {side} x {side} cells (--pool)",
        "cut": f"were cut to the first {side**2} cells (--cut)",
    }
    counts = provenance.get("grids_of_another_size", {})
    return [f"{counts[name]:,} grids {what}." for name, what in said.items() if counts.get(name)]


def write_dataset_files(recipe: Recipe, shards: list[Shard], results: list[dict], folder: Path) -> None:
    """What `load_from_disk` wants beside the shards, made by `datasets` for an empty dataset and pointed at ours."""
    for split in dict.fromkeys(shard.split for shard in shards):
        own = [(shard, result) for shard, result in zip(shards, results, strict=True) if shard.split == split]
        fingerprint = hashlib.sha256("".join(result["sha256"] for _, result in own).encode()).hexdigest()[:16]
        empty = datasets.Dataset.from_dict({name: [] for name in recipe.columns()}, features=recipe.columns())
        with tempfile.TemporaryDirectory() as scratch:
            empty.save_to_disk(scratch)
            state = json.loads(Path(scratch, "state.json").read_text())
            info = Path(scratch, "dataset_info.json").read_text()
        state["_data_files"] = [{"filename": Path(shard.path).name} for shard, _ in own]
        state["_fingerprint"], state["_split"] = fingerprint, split
        write_atomically(folder / split / "state.json", json.dumps(state, indent=2))
        write_atomically(folder / split / "dataset_info.json", info)
    write_atomically(
        folder / "dataset_dict.json", json.dumps({"splits": list(dict.fromkeys(s.split for s in shards))})
    )


def pack(recipe: Recipe, output: Path, num_proc: int, parquet: bool, shard_size: int) -> dict:
    """Everything into `output`, by way of `<output>.partial`; returns the provenance.

    A second call goes on after the shards that a killed one finished.
    """
    work = output.with_name(output.name + ".partial")
    plan = make_plan(recipe)
    shards = shards_of(plan, parquet, shard_size)
    identity = identity_of(recipe, plan, parquet, shard_size)
    if os.path.lexists(output):
        try:
            finished = read_provenance(output)
        except PackingError:
            finished = {}
        if finished.get("identity") != identity:
            raise PackingError(
                f"{printable(output, 300)} exists and was not packed from this input; remove it or choose another "
                "--output"
            )
        shutil.rmtree(work, ignore_errors=True)
        print(f"{printable(output, 300)} is complete already; --verify compares it with its sources")
        return finished
    if not shards:
        raise_problems(plan.left_out)
        raise PackingError(f"{printable(recipe.annotations, 300)}: no image has features and captions")
    check_grid_size(recipe, plan)
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PackingError(f"{work}: another run is packing into it") from None
        identity_file = work / "identity"
        states = f"{identity} {states_of(recipe)}"
        if not identity_file.exists() or identity_file.read_text() != states:
            for part in ("packed", "reports"):
                shutil.rmtree(work / part, ignore_errors=True)
            write_atomically(identity_file, states)
        (work / "reports").mkdir(exist_ok=True)
        try:
            results = write_shards(recipe, plan, shards, work, num_proc)
        except PackingError:
            # The remedy is another input or --skip-missing; shards of this one would lie about for nothing.
            shutil.rmtree(work)
            raise
        except OSError as error:
            raise PackingError(
                f"{printable(work, 300)}: cannot write ({describe(error)}); the finished shards are kept"
            ) from None
        command = command_of(recipe, output, parquet, shard_size)
        provenance = provenance_of(recipe, plan, shards, results, work, command)
        if not any(counts["images"] for counts in provenance["splits"].values()):
            shutil.rmtree(work)
            raise_problems([Problem(**problem) for problem in provenance["left_out"]])
        provenance["identity"] = identity
        if not parquet:
            write_dataset_files(recipe, shards, results, work / "packed")
        write_atomically(work / "packed" / "README.md", card_of(provenance, parquet))
        write_atomically(work / "packed" / "provenance.json", json.dumps(provenance, indent=1) + "\n")
        os.rename(work / "packed", output)
        shutil.rmtree(work)
    return provenance


def identity_of(recipe: Recipe, plan: Plan, parquet: bool, shard_size: int) -> str:
    """A hash of all that decides about the shards: an interrupted run is continued only if it is the same."""
    # Images that are skipped are either not among the rows or broken, and a shard with a broken one is never finished.
    settings = {**dataclasses.asdict(recipe), "skip_missing": None}
    if recipe.grid_fit == "refuse":
        del settings["grid_fit"]  # folders that were packed before the choice existed keep their identity
    digest = hashlib.sha256(json.dumps([settings, parquet, shard_size]).encode())
    digest.update(f"{version('datasets')} {version('pyarrow')}".encode())
    states = [(path, os.stat(path)) for path in recipe.features]
    if recipe.segmentation is not None:
        states += [(recipe.segmentation, status) for status in SegmentationFiles(recipe.segmentation).states()]
    for path, status in states:
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    for split, rows in plan.splits.items():
        for row in rows:
            digest.update(repr((split, row)).encode())
    return digest.hexdigest()


def states_of(recipe: Recipe) -> str:
    """A hash of what the file system knows of each source beyond size and time, which copying tools preserve.

    Two files whose names were swapped have other inodes, and a file that was written has another time of change. Both
    differ on another disk as well, so they decide only about going on after an interruption.
    """
    digest = hashlib.sha256()
    states = [os.stat(path) for path in (*recipe.features, recipe.annotations)]
    if recipe.segmentation is not None:
        states += SegmentationFiles(recipe.segmentation).states()
    for status in states:
        digest.update(f"{status.st_dev} {status.st_ino} {status.st_ctime_ns}".encode())
    return digest.hexdigest()


# Verification


def read_provenance(output: Path) -> dict:
    """What `provenance.json` of a packed folder says.

    Raises:
        PackingError: there is none, or its values are not what this program writes.
    """
    path = output / "provenance.json"
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise PackingError(
            f"{printable(output, 300)}: not a packed folder, provenance.json cannot be read ({describe(error)})"
        ) from None
    content = {"grid_fit": "cut", **content} if isinstance(content, dict) else {}
    sizes = [content.get(name) for name in ("grid_size", "grid_feature_size")]
    shards, splits, left_out = (content.get(name) for name in ("shards", "splits", "left_out"))
    is_whole = (
        content.get("dtype") in ("float16", "float32")
        and content.get("grid_fit") in GRID_FITS
        and all(isinstance(size, int) and 0 < size < 2**16 for size in sizes)
        and isinstance(shards, dict)
        and all(isinstance(shard, dict) and isinstance(shard.get("sha256"), str) for shard in shards.values())
        and isinstance(splits, dict)
        and all(isinstance(counts, dict) and {"images", "captions"} <= counts.keys() for counts in splits.values())
        and isinstance(left_out, list)
        and all(isinstance(problem, dict) and problem.keys() == set(Problem._fields) for problem in left_out)
        and isinstance(content.get("skip_missing"), bool)
        and "num_segmentation_classes" in content
    )
    if not is_whole:
        raise PackingError(
            f"{printable(path, 300)}: not a packed folder, or its provenance.json is damaged; pack again"
        )
    return content


def verify(recipe: Recipe, output: Path) -> int:
    """Compare a packed folder with its sources, value by value; PackingError lists the images that differ.

    Returns the number of images.
    """
    provenance = read_provenance(output)
    for name, shard in provenance["shards"].items():
        path = path_inside(output, name)
        if not path.is_file() or sha256_of(path) != shard["sha256"]:
            raise PackingError(f"{printable(path, 300)}: missing or changed since it was packed")
    fields = ("dtype", "grid_size", "grid_feature_size", "skip_missing", "grid_fit")
    recipe = dataclasses.replace(recipe, **{field: provenance[field] for field in fields})
    if (recipe.segmentation is None) != (provenance["num_segmentation_classes"] is None):
        raise PackingError(
            f"{output} was packed {'with' if recipe.segmentation is None else 'without'} --segmentation"
        )
    plan = make_plan(recipe)
    if any(path.endswith(".parquet") for path in provenance["shards"]):
        with tempfile.TemporaryDirectory() as cache:
            files = {split: str(output / "data" / f"{split}-*.parquet") for split in provenance["splits"]}
            packed = datasets.load_dataset("parquet", data_files=files, cache_dir=cache)
            return _verify_rows(recipe, plan, packed, provenance)
    packed = {split: load_packed_split(output, split) for split in packed_splits(output)}
    return _verify_rows(recipe, plan, packed, provenance)


def _verify_rows(recipe: Recipe, plan: Plan, packed: Mapping[str, datasets.Dataset], provenance: dict) -> int:
    left_out = {problem["image_id"] for problem in provenance["left_out"]}
    packer = Packer(recipe)
    differences = []
    verified = 0
    for split, rows in plan.splits.items():
        rows = [(row, places) for row, places in rows if row.image_id not in left_out]
        if split not in packed or packed[split]["image_id"][:] != [row.image_id for row, _ in rows]:
            raise PackingError(f"the split {split} holds other images than the annotations")
        dataset = packed[split].with_format(
            "numpy", dtype=np.float32, columns=["grid_features"], output_all_columns=True
        )
        for index, (row, places) in enumerate(tqdm(rows, unit=" images", desc=f"verifying {split}")):
            stored = dataset[index]
            try:
                grid, cells, segmentation = packer.sources_of(row, places)
                pairs = [(grid, stored["grid_features"])]
                if segmentation is not None:
                    packed_map = stored["segmentation_features"]
                    pairs.append((segmentation, decode_segmentation([packed_map], np.float32)[0]))
            except BrokenImage as broken:
                differences.append(Problem(broken.source, broken.what, row.image_id))
                continue
            except ValueError as error:
                differences.append(Problem(split, str(error), row.image_id))
                continue
            bounds = [0 if recipe.dtype == "float32" else float16_bound(source) for source, _ in pairs]
            same_features = all(
                (np.abs(value - source) <= bound).all() for (source, value), bound in zip(pairs, bounds, strict=True)
            )
            # Folders of the first version hold names and captions as their sources wrote them.
            texts = (
                normalize_file_name(stored["file_name"]),
                bool(stored["restval"]),
                tuple(map(normalize_caption, stored["captions"])),
                int(stored["grid_cells"]),
            )
            if not same_features or texts != (row.file_name, row.restval, row.captions, cells):
                differences.append(Problem(split, "differs from its sources", row.image_id))
            verified += 1
    raise_problems(differences)
    for line in fitted_lines({**provenance, "grids_of_another_size": packer.fitted}):
        print(line)
    return verified


# The command

DESCRIPTION = """\
Pack grid features, segmentation features and captions into one dataset.

With the original's files:

  python scripts/pack_coco.py --features coco_grid_feats2.hdf5 --segmentation segmentations \\
      --annotations m2_annotations --output coco_packed

What is needed, and where it comes from:
  --features      coco_grid_feats2.hdf5 of DIFNet (49.5 GB): one dataset <image id>_features (49, 2048) an image.
                  RSTNet's <image id>_grids, DLCT's file and unpooled (2048, H, W) maps are read as well; maps of any
                  height and width are averaged to 7 x 7 cells. A larger grid of cells is refused: --grid-size 12 keeps
                  12 x 12 of them, --pool averages them to 7 x 7, --cut keeps the first 49 as the original does. Grids
                  of fewer cells are padded with zeros. Both is counted in provenance.json.
  --segmentation  the folder with train2014/<image id>.npy and val2014/<image id>.npy, each (133, 7, 7); any folder
                  with <image id>.npy, or an HDF5 file; leave it out for the paper's baseline.
  --annotations   one of: the folder with coco_{train,dev,test,restval}_ids.npy, captions_train2014.json and
                  captions_val2014.json (the original); Karpathy's dataset_coco.json, or dataset_flickr8k.json and
                  dataset_flickr30k.json, where imgid is the image id; a folder with COCO caption files named for
                  their splits, e.g. captions_train2017.json and captions_val2017.json.

The result is opened by datasets.load_from_disk(OUTPUT) and has the splits train (with restval), validation and test.
A value kept as float16 is off by at most 1/2048 of itself (of a thousandth of the image's largest value where it
is smaller); where that does not hold the image is named, and --dtype float32 keeps every value as it is.

The program can be killed at any time: the same command goes on after the last finished shard (about 200 MB). Until it
is done there is OUTPUT.partial and no OUTPUT. One process takes up to 600 MB of memory. Mistakes end it with one line
and exit code 2. With --skip-missing broken images are left out, each named at the end; with --strict the exit code is
then 2."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pack_coco.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", nargs="+", required=True, metavar="FILE", help="one or several HDF5 files")
    parser.add_argument("--segmentation", metavar="PATH", help="folder of .npy files or HDF5 file; none: baseline")
    parser.add_argument("--annotations", required=True, metavar="PATH", help="folder, or dataset_coco.json")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="the packed folder")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="default: float16")
    parser.add_argument("--num-proc", type=int, default=1, metavar="N", help="processes (default 1); same output")
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="images a shard (default 1000)")
    parser.add_argument("--parquet", action="store_true", help="Parquet for the Hub and streaming, instead of Arrow")
    parser.add_argument(
        "--skip-missing", action="store_true", help="leave out missing or broken images, on the record"
    )
    parser.add_argument("--verify", action="store_true", help="read FOLDER against its sources instead of packing")
    fit = parser.add_mutually_exclusive_group()
    fit.add_argument("--pool", action="store_true", help="average square grids of another size to --grid-size")
    fit.add_argument(
        "--cut",
        action="store_true",
        help="keep the first cells of larger grids, as the original does, without the rest",
    )
    parser.add_argument("--grid-size", type=int, default=7, metavar="N", help="cells along a side (default 7)")
    parser.add_argument("--grid-feature-size", type=int, default=2048, metavar="N", help="default: 2048")
    parser.add_argument("--num-segmentation-classes", type=int, default=133, metavar="N", help="default: 133")
    add_strict_option(parser)
    add_debug_option(parser)
    arguments = parser.parse_args(argv)
    arguments.grid_fit = "pool" if arguments.pool else "cut" if arguments.cut else "refuse"
    for name in ("num_proc", "shard_size", "grid_size", "grid_feature_size", "num_segmentation_classes"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name, largest in (("grid_size", LARGEST_GRID_SIZE), ("grid_feature_size", 2**20)):
        if getattr(arguments, name) > largest:
            parser.error(f"--{name.replace('_', '-')} must be at most {largest:,}")
    return arguments


def command_of(recipe: Recipe, output: Path, parquet: bool, shard_size: int) -> str:
    """The command without what has no influence on the result, the number of processes."""
    words = ["python", "scripts/pack_coco.py", "--features", *recipe.features]
    if recipe.segmentation is not None:
        words += ["--segmentation", recipe.segmentation]
    words += ["--annotations", recipe.annotations, "--output", output.name, "--dtype", recipe.dtype]
    words += ["--shard-size", str(shard_size)] + ["--parquet"] * parquet + ["--skip-missing"] * recipe.skip_missing
    words += [f"--{recipe.grid_fit}"] * (recipe.grid_fit != "refuse")
    for name in ("grid_size", "grid_feature_size", "num_segmentation_classes"):
        if getattr(recipe, name) != getattr(Recipe, name):
            words += [f"--{name.replace('_', '-')}", str(getattr(recipe, name))]
    return shlex.join(words)


def run(arguments: argparse.Namespace) -> int:
    """What the arguments ask for; returns the exit code."""
    fields = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe)}
    recipe = Recipe(**{**fields, "features": tuple(arguments.features)})
    output = printable(arguments.output, 300)
    datasets.disable_progress_bars()
    if arguments.verify:
        print(f"{output}: {verify(recipe, arguments.output)} images equal their sources")
        return 0
    provenance = pack(recipe, arguments.output, arguments.num_proc, arguments.parquet, arguments.shard_size)
    for split, counts in provenance["splits"].items():
        print(f"{split}: {counts['images']:,} images, {counts['captions']:,} captions")
    for line in fitted_lines(provenance):
        print(line)
    left_out = [Problem(**problem) for problem in provenance["left_out"]]
    for problem in left_out[:LINES_OF_LEFT_OUT]:
        print(f"left out: {problem.source}: {problem.what}: image {problem.image_id}")
    if len(left_out) > LINES_OF_LEFT_OUT:
        print(f"left out: {len(left_out) - LINES_OF_LEFT_OUT:,} more; see {output}/provenance.json")
    opened = f"load_dataset({output!r})" if arguments.parquet else f"load_from_disk({output!r})"
    print(f"packed into {output}; open it with datasets.{opened} or see {output}/README.md")
    return 2 if arguments.strict and left_out else 0


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_command(
        "pack_coco.py", lambda: run(arguments), arguments.debug, resume="the same command goes on from here"
    )
