"""The shards of a packed dataset: written one by one under other names, and renamed when they are complete.

A report beside the shards says which of them are complete, so that a killed run resumes after the last one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..command_line import requires
from ..files import atomic_write, printable, read_json, sha256_of
from ..progress import progress_bar
from .errors import BrokenImage, DataError, Problem, raise_problems
from .feature_files import GridFiles, SegmentationFiles
from .grids import check_segmentation, fit_grid, grid_shape
from .packed_dataset import encode_segmentation, to_stored
from .packing_plan import PackingConfig, Plan, PlannedImage

with requires("data"):
    from datasets.arrow_writer import ArrowWriter, ParquetWriter

ROWS_PER_WRITE = 64  # bounds the memory of a writer to a few times 13 MB
FITTED = ("padded", "pooled", "cut")


class ImageFeatures(NamedTuple):
    """Features of one image as float32.

    Attributes:
        grid: (cells, grid_feature_size).
        cells: number of cells that are not padded.
        segmentation: (classes, rows, columns), or `None`.
    """

    grid: np.ndarray
    cells: int
    segmentation: np.ndarray | None


class FeatureReader:
    """Reads the features of images in the size asked for.

    Attributes:
        hashes: SHA-256 of the `.npy` files that were read, by image id.
        fitted: number of grids of another size, by what became of them.
    """

    def __init__(self, config: PackingConfig):
        self.config = config
        self.grids = GridFiles(config.features)
        self.segmentations = {path: SegmentationFiles(path) for path in config.segmentation_paths()}
        self.class_orders = {path: list(order) for path, order in config.class_orders}
        self.hashes: dict[int, str] = {}
        self.fitted = dict.fromkeys(FITTED, 0)

    def read(self, image: PlannedImage) -> ImageFeatures:
        """The features of an image.

        Raises:
            BrokenImage: they cannot be used; the error names their file.
            DataError: a file cannot be read at all.
        """
        config, image_id = self.config, image.row.image_id
        source = image.grid_file
        try:
            array = self.grids.read(image.grid_file, image_id)
            num_cells = math.prod(grid_shape(config.grid_size))
            grid, cells = fit_grid(array, config.grid_size, config.grid_feature_size, config.grid_fit)
            has_other_size = array.ndim == 2 and len(array) != num_cells
            segmentation = None
            if self.segmentations:
                path, name = str(image.segmentation_path), str(image.segmentation_name)
                source = os.path.join(path, name)
                array, self.hashes[image_id] = self.segmentations[path].read(name)
                segmentation = check_segmentation(array, config.segmentation_shape())
                if path in self.class_orders:
                    segmentation = segmentation[self.class_orders[path]]
        except (DataError, BrokenImage):
            raise
        except (ValueError, OSError, RuntimeError) as error:
            raise BrokenImage(source, str(error)) from None
        if has_other_size:
            kind = "padded" if cells < num_cells else "pooled" if config.grid_fit == "pool" else "cut"
            self.fitted[kind] += 1
        return ImageFeatures(grid, cells, segmentation)

    def row(self, image: PlannedImage) -> dict[str, Any]:
        """The row of an image in the packed dataset.

        Raises:
            BrokenImage: as `read`, or its values cannot be stored in the type asked for.
            DataError: as `read`.
        """
        features = self.read(image)
        source = image.grid_file
        try:
            row = {
                "image_id": image.row.image_id,
                "file_name": image.row.file_name,
                "restval": image.row.restval,
                "grid_features": to_stored(features.grid, self.config.dtype),
                "grid_cells": features.cells,
                "captions": list(image.row.captions),
            }
            if features.segmentation is not None:
                source = os.path.join(str(image.segmentation_path), str(image.segmentation_name))
                stored = to_stored(features.segmentation, self.config.dtype)
                row["segmentation_features"] = encode_segmentation(stored)
        except ValueError as error:
            raise BrokenImage(source, str(error)) from None
        return row


class Shard(NamedTuple):
    """Images `start` to `stop` of a split, and the file they go to, relative to the packed folder."""

    path: str
    split: str
    start: int
    stop: int

    def images(self, plan: Plan) -> list[PlannedImage]:
        return plan.splits[self.split][self.start : self.stop]


def make_shards(plan: Plan, parquet: bool, shard_size: int) -> list[Shard]:
    """The shards in order. They depend on the images alone, not on the number of processes."""
    shards = []
    for split, images in plan.splits.items():
        count = -(-len(images) // shard_size)
        for index in range(count):
            name = f"{index:05d}-of-{count:05d}"
            path = f"data/{split}-{name}.parquet" if parquet else f"{split}/data-{name}.arrow"
            start = index * shard_size
            shards.append(Shard(path, split, start, min(start + shard_size, len(images))))
    return shards


@dataclass
class ShardReport:
    """What a complete shard holds.

    Args:
        rows: number of images.
        bytes: size of the file.
        sha256: of the file.
        problems: images that were left out.
        hashes: SHA-256 of the `.npy` files that were read, by image id.
        fitted: number of grids of another size, by what became of them.
    """

    rows: int
    bytes: int
    sha256: str
    problems: list[Problem]
    hashes: dict[int, str]
    fitted: dict[str, int]

    @classmethod
    def read(cls, path: Path) -> ShardReport | None:
        """The report of a complete shard; `None` where there is none, or it was not written to its end."""
        try:
            content = read_json(path)
            report = cls(**content)
            report.problems = [Problem(*problem) for problem in report.problems]
            report.hashes = {int(image_id): digest for image_id, digest in report.hashes.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        kinds = {"rows": int, "bytes": int, "sha256": str, "fitted": dict}
        return report if all(isinstance(getattr(report, name), kind) for name, kind in kinds.items()) else None

    def write(self, path: Path) -> None:
        atomic_write(path, json.dumps(dataclasses.asdict(self)))


def write_shard(
    config: PackingConfig,
    images: Iterable[PlannedImage],
    path: Path,
    report_path: Path,
    scratch: Path,
    update: Callable[[], object] = lambda: None,
) -> ShardReport:
    """Writes one shard, and then its report, which says that it is complete.

    With problems that are not to be skipped there is no shard and no report.

    Args:
        config: of the packing.
        images: of the shard.
        path: file of the shard; `.parquet` or `.arrow`.
        report_path: file of the report.
        scratch: folder to write in until the shard is complete.
        update: called after every image that was written.
    """
    reader = FeatureReader(config)
    problems: list[Problem] = []
    unfinished = scratch / f"{path.parent.name}-{path.name}"
    writer_class = ParquetWriter if path.suffix == ".parquet" else ArrowWriter
    try:
        writer = writer_class(features=config.columns(), path=str(unfinished), writer_batch_size=ROWS_PER_WRITE)
        for image in images:
            try:
                row = reader.row(image)
            except BrokenImage as broken:
                problems.append(Problem(broken.source, broken.what, image.row.image_id))
                continue
            writer.write(row)
            update()
        num_rows, _ = writer.finalize()
        writer.close()
        size, digest = unfinished.stat().st_size, sha256_of(unfinished)
        report = ShardReport(num_rows, size, digest, problems, reader.hashes, reader.fitted)
        if not problems or config.skip_missing:
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
            report.write(report_path)
    finally:
        unfinished.unlink(missing_ok=True)
    return report


def write_shards(
    config: PackingConfig, plan: Plan, shards: Sequence[Shard], work: Path, num_proc: int
) -> list[ShardReport]:
    """Writes the shards that are not complete yet, below `work`.

    Args:
        config: of the packing.
        plan: what to pack.
        shards: of `plan`.
        work: folder with `packed`, where shards go, and `reports`.
        num_proc: number of processes.

    Returns:
        The reports of all shards, in their order.

    Raises:
        DataError: images cannot be used and `skip_missing` is `False`, or the disk is too small.
    """
    report_paths = {shard: work / "reports" / (shard.path.replace("/", "-") + ".json") for shard in shards}
    reports: dict[Shard, ShardReport] = {}
    for shard in shards:
        path = work / "packed" / shard.path
        path.parent.mkdir(parents=True, exist_ok=True)
        report = ShardReport.read(report_paths[shard])
        if report is not None and path.is_file() and path.stat().st_size == report.bytes:
            reports[shard] = report
    # A worker of a killed run may live on for a moment. It finds its own scratch folder gone, and ends.
    for leftover in work.glob("scratch-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = work / f"scratch-{os.getpid()}"
    scratch.mkdir(exist_ok=True)
    todo = [shard for shard in shards if shard not in reports]
    _check_space(config, sum(shard.stop - shard.start for shard in todo), work)
    done = sum(report.rows for report in reports.values())
    progress = progress_bar(total=plan.num_images(), initial=done, unit=" images", desc="packing", mininterval=0.5)
    with progress:
        arguments = {
            shard: (config, shard.images(plan), work / "packed" / shard.path, report_paths[shard], scratch)
            for shard in todo
        }
        if num_proc == 1:
            for shard in todo:
                reports[shard] = write_shard(*arguments[shard], update=progress.update)
        else:
            # Spawned rather than forked, because HDF5 files and threads do not survive a fork.
            pool = ProcessPoolExecutor(num_proc, mp_context=get_context("spawn"), initializer=_end_with_parent)
            with pool, _terminating_workers():
                futures = {pool.submit(write_shard, *arguments[shard]): shard for shard in todo}
                try:
                    for future in as_completed(futures):
                        reports[futures[future]] = future.result()
                        progress.update(future.result().rows)
                except BrokenProcessPool:
                    raise ValueError(
                        f"{printable(work, 300)}: one of the processes was killed, mostly for lack of memory; the "
                        "same command resumes after the finished shards, with a smaller --num-proc if need be"
                    ) from None
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    ordered = [reports[shard] for shard in shards]
    if not config.skip_missing:
        raise_problems([problem for report in ordered for problem in report.problems])
    return ordered


def _end_with_parent() -> None:
    """In a worker: Ctrl-C is left to the first process, which ends the others; when it dies, they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _terminating_workers() -> Iterator[None]:
    """After Ctrl-C or SIGTERM the workers end at once; what they had not finished is packed by the next run."""
    try:
        yield
    except KeyboardInterrupt:
        for process in active_children():
            process.terminate()
        raise


def _check_space(config: PackingConfig, num_images: int, folder: Path) -> None:
    itemsize = np.dtype(config.dtype).itemsize
    needed = num_images * (math.prod(grid_shape(config.grid_size)) * config.grid_feature_size * itemsize + 2000)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{printable(folder, 300)}: {num_images} images need about {needed / 1e9:.1f} GB, only {free / 1e9:.1f} "
            "GB are free"
        )
