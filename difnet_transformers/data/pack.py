"""Packs grid features, segmentation features and captions of COCO into one dataset that opens in milliseconds.

In place of the original's `coco_grid_feats2.hdf5`, 123,287 `.npy` files and four kinds of annotation files. What
differs from the original: grid features are stored in half the space, an image without features is an error and is
never replaced by random numbers, and the folder says where it came from.

Read `packing_plan.py` (what to pack), `shards.py` (the rows and their files), `provenance.py`, then `verify.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from ..command_line import describe, requires
from ..files import atomic_write, folder_lock, printable
from .errors import DataError, Problem, raise_problems
from .feature_files import SegmentationFiles
from .packed_dataset import quiet_datasets
from .packing_plan import PackingConfig, Plan, check_grid_size, make_plan, with_recorded_classes
from .provenance import dataset_card, make_provenance, packing_command, read_provenance
from .shards import Shard, ShardReport, make_shards, write_shards

with requires("data"):
    from datasets import Dataset


class Packed(NamedTuple):
    """What `provenance.json` of a packed folder says, and whether it was complete before."""

    provenance: dict[str, Any]
    was_complete: bool


def pack_dataset(
    config: PackingConfig,
    output: Path,
    *,
    num_proc: int = 1,
    parquet: bool = False,
    shard_size: int = 1000,
    save_recipe: Callable[[Path], object] | None = None,
    license: str | None = None,
) -> Packed:
    """Packs everything into `output`, by way of `<output>.partial`.

    A second call resumes after the shards that a killed one finished.

    Args:
        config: what to pack.
        output: folder to make.
        num_proc: number of processes; the result is the same for any.
        parquet: whether shards are Parquet for the Hub and streaming, instead of Arrow.
        shard_size: images in a shard.
        save_recipe: writes the options of the run to the path it is given.
        license: of the data, for the card.

    Raises:
        ValueError: the sources cannot be used, or another process is packing into `output`; the text names the files
            and the images.
    """
    config = with_recorded_classes(config)
    plan = make_plan(config)
    shards = make_shards(plan, parquet, shard_size)
    identity = packing_identity(config, plan, parquet, shard_size)
    work = output.with_name(output.name + ".partial")
    if os.path.lexists(output):
        provenance = _complete_provenance(output, identity)
        shutil.rmtree(work, ignore_errors=True)
        return Packed(provenance, was_complete=True)
    if not shards:
        raise_problems(plan.left_out)
        raise DataError(f"{printable(config.annotations, 300)}: no image has features and captions")
    check_grid_size(config, plan)
    work.mkdir(parents=True, exist_ok=True)
    try:
        with folder_lock(work, "difnet pack"):
            _drop_other_shards(work, f"{identity} {source_states(config)}")
            try:
                reports = write_shards(config, plan, shards, work, num_proc)
            except OSError as error:
                raise ValueError(
                    f"{printable(work, 300)}: cannot write ({describe(error)}); the finished shards are kept"
                ) from None
            command = packing_command(config, output, parquet, shard_size)
            provenance = make_provenance(config, plan, shards, reports, command, work / "hashes.json")
            if not any(counts["images"] for counts in provenance["splits"].values()):
                raise_problems([Problem(**problem) for problem in provenance["left_out"]])
            provenance["identity"] = identity
            # No name in this folder is seen before the folder itself gets its name.
            packed = work / "packed"
            if not parquet:
                _write_dataset_files(config, shards, reports, packed)
            (packed / "README.md").write_text(dataset_card(provenance, parquet, license), encoding="utf-8")
            (packed / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
            if save_recipe is not None:
                save_recipe(packed / "recipe.yaml")
            packed.rename(output)
    except DataError:
        # The remedy is another input or --skip-missing; shards of this one would lie about for nothing.
        shutil.rmtree(work)
        raise
    shutil.rmtree(work)
    return Packed(provenance, was_complete=False)


def _complete_provenance(output: Path, identity: str) -> dict[str, Any]:
    try:
        provenance = read_provenance(output)
    except DataError:
        provenance = {}
    if provenance.get("identity") != identity:
        raise DataError(
            f"{printable(output, 300)} exists and was not packed from this input; remove it or choose another --output"
        )
    return provenance


def _drop_other_shards(work: Path, state: str) -> None:
    """Removes shards of another input from the folder of an unfinished packing."""
    path = work / "identity"
    if not path.exists() or path.read_text() != state:
        for part in ("packed", "reports"):
            shutil.rmtree(work / part, ignore_errors=True)
        atomic_write(path, state)
    (work / "reports").mkdir(exist_ok=True)


def packing_identity(config: PackingConfig, plan: Plan, parquet: bool, shard_size: int) -> str:
    """A hash of all that decides about the shards: an interrupted packing resumes only if it is the same."""
    # Images that are skipped are either not in the plan or broken, and a shard with a broken one is never finished.
    settings = {**dataclasses.asdict(config), "skip_missing": None}
    if config.grid_fit == "refuse":
        del settings["grid_fit"]  # folders that were packed before the choice existed keep their identity
    if not config.class_orders:
        del settings["class_orders"]  # likewise
    digest = hashlib.sha256(json.dumps([settings, parquet, shard_size]).encode())
    digest.update(f"{version('datasets')} {version('pyarrow')}".encode())
    states = [(path, os.stat(path)) for path in config.features]
    for path in config.segmentation_paths():
        states += [(path, status) for status in SegmentationFiles(path).states()]
    for path, status in states:
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    for split, images in plan.splits.items():
        for image in images:
            digest.update(repr((split, (image.row, (image.grid_file, image.segmentation_name)))).encode())
    return digest.hexdigest()


def source_states(config: PackingConfig) -> str:
    """A hash of what the file system knows of each source beyond size and time, which copying tools preserve.

    Two files whose names were swapped have other inodes, and a file that was written has another time of change. Both
    differ on another disk as well, so they decide only about resuming an interrupted packing.
    """
    digest = hashlib.sha256()
    states = [os.stat(path) for path in (*config.features, config.annotations)]
    for path in config.segmentation_paths():
        states += SegmentationFiles(path).states()
    for status in states:
        digest.update(f"{status.st_dev} {status.st_ino} {status.st_ctime_ns}".encode())
    return digest.hexdigest()


def _write_dataset_files(
    config: PackingConfig, shards: Sequence[Shard], reports: Sequence[ShardReport], folder: Path
) -> None:
    """What `load_from_disk` wants beside the shards, made by `datasets` for an empty dataset and pointed at ours."""
    splits = list(dict.fromkeys(shard.split for shard in shards))
    for split in splits:
        own = [(shard, report) for shard, report in zip(shards, reports, strict=True) if shard.split == split]
        empty = Dataset.from_dict({name: [] for name in config.columns()}, features=config.columns())
        with tempfile.TemporaryDirectory() as scratch, quiet_datasets():
            empty.save_to_disk(scratch)
            state = json.loads(Path(scratch, "state.json").read_text())
            info = Path(scratch, "dataset_info.json").read_text()
        state["_data_files"] = [{"filename": Path(shard.path).name} for shard, _ in own]
        state["_fingerprint"] = hashlib.sha256("".join(report.sha256 for _, report in own).encode()).hexdigest()[:16]
        state["_split"] = split
        (folder / split / "state.json").write_text(json.dumps(state, indent=2))
        (folder / split / "dataset_info.json").write_text(info)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
