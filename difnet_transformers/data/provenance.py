"""Where a packed dataset came from: `provenance.json` and the dataset's card."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..command_line import describe
from ..files import atomic_write, printable, read_json, sha256_of
from ..progress import progress_bar
from .errors import DataError, Problem
from .feature_files import GridFiles
from .feature_records import FeatureRecords, recorded_classes, records_in
from .grids import grid_shape, grid_text
from .packing_plan import PackingConfig, Plan, recorded_segmentation
from .shards import FITTED, Shard, ShardReport

GRID_FITS = ("refuse", "pool", "cut")


def make_provenance(
    config: PackingConfig,
    plan: Plan,
    shards: Sequence[Shard],
    reports: Sequence[ShardReport],
    command: str,
    known_hashes: Path,
) -> dict[str, Any]:
    """The content of `provenance.json`, without the identity.

    Args:
        config: of the packing.
        plan: what was packed.
        shards: all of them.
        reports: of the shards, in their order.
        command: that makes the same dataset.
        known_hashes: file that keeps the hashes of large sources while the packing is not complete.
    """
    splits: dict[str, dict[str, int]] = {}
    for shard, report in zip(shards, reports, strict=True):
        broken = {problem.image_id for problem in report.problems}
        rows = [image.row for image in shard.images(plan) if image.row.image_id not in broken]
        counts = splits.setdefault(shard.split, {"images": 0, "captions": 0, "restval_images": 0})
        counts["images"] += report.rows
        counts["captions"] += sum(len(row.captions) for row in rows)
        counts["restval_images"] += sum(row.restval for row in rows)
    records = FeatureRecords(GridFiles(config.features).grid_backbone(), recorded_segmentation(config))
    left_out = [*plan.left_out, *(problem for report in reports for problem in report.problems)]
    return {
        "command": command,
        "dtype": config.dtype,
        "grid_size": config.grid_size,
        "grid_feature_size": config.grid_feature_size,
        "num_segmentation_classes": config.num_segmentation_classes if config.segmentation is not None else None,
        "grid_fit": config.grid_fit,
        "grids_of_another_size": {name: sum(report.fitted.get(name, 0) for report in reports) for name in FITTED},
        **{name: record for name, record in records._asdict().items() if record is not None},
        "splits": splits,
        "skip_missing": config.skip_missing,
        "left_out": [problem._asdict() for problem in left_out],
        "features_without_annotations": plan.unused_features,
        "sources": _describe_sources(config, plan, reports, known_hashes),
        "shards": {
            shard.path: {"rows": report.rows, "bytes": report.bytes, "sha256": report.sha256}
            for shard, report in zip(shards, reports, strict=True)
        },
        "versions": {name: version(name) for name in ("datasets", "pyarrow", "numpy", "h5py")},
    }


def _describe_sources(
    config: PackingConfig, plan: Plan, reports: Sequence[ShardReport], known_hashes: Path
) -> dict[str, Any]:
    """Names, sizes and SHA-256 of all source files."""
    files = [*config.features, *map(str, plan.annotation_files), *filter(os.path.isfile, config.segmentation_paths())]
    described = _describe_files(files, known_hashes)
    hashes = {image_id: digest for report in reports for image_id, digest in report.hashes.items()}
    images = [image for images in plan.splits.values() for image in images]
    segmentations = []
    for path in config.segmentation_paths():
        ids = sorted({image.row.image_id for image in images if image.segmentation_path == path} & hashes.keys())
        lines = "".join(f"{image_id} {hashes[image_id]}\n" for image_id in ids)
        of_folder = {
            "name": os.path.basename(os.path.normpath(path)),
            "files": len(ids),
            "sha256 of the lines '<image id> <sha256>'": hashlib.sha256(lines.encode()).hexdigest(),
        }
        segmentations.append(described.get(path, of_folder))
    return {
        "features": [described[path] for path in config.features],
        "segmentation": segmentations if len(segmentations) > 1 else next(iter(segmentations), None),
        "annotations": [described[str(path)] for path in plan.annotation_files],
    }


def _describe_files(files: Sequence[str], known_hashes: Path) -> dict[str, dict[str, Any]]:
    try:
        known = read_json(known_hashes)
    except (OSError, ValueError):
        known = {}
    described = {}
    with progress_bar(
        total=sum(map(os.path.getsize, files)), unit="B", unit_scale=True, desc="hashing sources"
    ) as progress:
        for path in files:
            status = os.stat(path)
            state = f"{path} {status.st_size} {status.st_mtime_ns}"
            if state in known:
                progress.update(status.st_size)
            else:
                known[state] = sha256_of(path, progress.update)
                atomic_write(known_hashes, json.dumps(known))
            described[path] = {"name": os.path.basename(path), "bytes": status.st_size, "sha256": known[state]}
    return described


def packing_command(config: PackingConfig, output: Path, parquet: bool, shard_size: int) -> str:
    """The command that makes the same dataset, without the number of processes, which has no influence on it."""
    words = ["python", "scripts/pack_coco.py", "--features", *config.features]
    if config.segmentation is not None:
        words += ["--segmentation", *config.segmentation_paths()]
    words += ["--annotations", config.annotations, "--output", output.name, "--dtype", config.dtype]
    words += ["--shard-size", str(shard_size)] + ["--parquet"] * parquet + ["--skip-missing"] * config.skip_missing
    words += [f"--{config.grid_fit}"] * (config.grid_fit != "refuse")
    for name in ("grid_size", "grid_feature_size", "num_segmentation_classes"):
        if getattr(config, name) != getattr(PackingConfig, name):
            value = getattr(config, name)
            text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)


def read_provenance(folder: Path) -> dict[str, Any]:
    """What `provenance.json` of a packed folder says.

    Raises:
        DataError: there is none, or its values are not what `make_provenance` gives.
    """
    path = folder / "provenance.json"
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{printable(folder, 300)}: not a packed folder, provenance.json cannot be read ({describe(error)})"
        ) from None
    # Folders of the first version were packed before the choice existed.
    content = {"grid_fit": "cut", **content} if isinstance(content, dict) else {}
    grid_size = content.get("grid_size")
    if isinstance(grid_size, list) and len(grid_size) == 2:
        content["grid_size"] = tuple(grid_size)
    sides = grid_size if isinstance(grid_size, list) and len(grid_size) == 2 else [grid_size]
    shards, splits, left_out = (content.get(name) for name in ("shards", "splits", "left_out"))
    is_whole = (
        content.get("dtype") in ("float16", "float32")
        and content.get("grid_fit") in GRID_FITS
        and all(isinstance(size, int) and 0 < size < 2**16 for size in (*sides, content.get("grid_feature_size")))
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
        raise DataError(f"{printable(path, 300)}: not a packed folder, or its provenance.json is damaged; pack again")
    return content


def fitted_lines(counts: Mapping[str, int], grid_size: int | Sequence[int]) -> list[str]:
    """What became of grids of another size, one line for each kind.

    Args:
        counts: `"grids_of_another_size"` of a provenance.
        grid_size: cells along a side, or rows and columns.
    """
    size = grid_text(grid_size)
    done = {
        "padded": f"had fewer than {size} cells and were padded with zeros at the end",
        "pooled": f"were averaged to {size} cells (--pool)",
        "cut": f"were cut to the first {math.prod(grid_shape(grid_size))} cells (--cut)",
    }
    return [f"{counts[name]:,} grids {what}." for name, what in done.items() if counts.get(name)]


def _class_line(classes: Sequence[str] | None) -> str:
    """Names of the segmentation classes in the words of the card; empty where they are not known."""
    if classes is None:
        return ""
    return f"Its {len(classes)} classes, in order: {printable(', '.join(classes), 4000)}.\n"


def _network_lines(provenance: Mapping[str, Any]) -> str:
    """What made the features, one line each; empty where it is not recorded."""
    lines = ""
    for name, record in zip(("Grid", "Segmentation"), records_in(provenance), strict=True):
        if record is not None:
            made_by = record.get("name") or record.get("source") or "several networks"
            digest = record.get("parameters_sha256")
            said = f", SHA-256 of its parameters `{printable(digest)}`" if digest else ""
            lines += f"{name} features: `{printable(made_by, 200)}`{said}.\n"
    return f"\n{lines}" if lines else ""


def _column_table(provenance: Mapping[str, Any]) -> str:
    shape, width = grid_shape(provenance["grid_size"]), provenance["grid_feature_size"]
    columns = {
        "image_id": ("int64", "id in the annotations"),
        "file_name": ("string", "of the image"),
        "restval": ("bool", "of COCO's validation images, used for training"),
        "grid_features": (f"{provenance['dtype']} ({math.prod(shape)}, {width})", "a row for each cell of the grid"),
        "grid_cells": ("uint16", "cells without those that pad the grid with zeros"),
        "segmentation_features": (
            f"binary, of {provenance['dtype']} ({provenance['num_segmentation_classes']}, {shape[0]}, {shape[1]})",
            "the share of each class in each cell, packed by `encode_segmentation`",
        ),
        "captions": ("list of string", "reference captions"),
    }
    if provenance["num_segmentation_classes"] is None:
        del columns["segmentation_features"]
    rows = "".join(f"| `{name}` | {kind} | {what} |\n" for name, (kind, what) in columns.items())
    return f"\n| column | type | |\n|---|---|---|\n{rows}"


def dataset_card(provenance: Mapping[str, Any], parquet: bool, license: str | None = None) -> str:
    """The README.md of a packed folder, as the Hub shows it.

    Args:
        provenance: of the folder.
        parquet: whether its shards are Parquet.
        license: of the data, as the Hub abbreviates it; by default the card makes no claim.
    """
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
    fitted = "".join(
        f"{line}\n" for line in fitted_lines(provenance["grids_of_another_size"], provenance["grid_size"])
    )
    classes = recorded_classes(provenance.get("segmentation_model"))
    opened = "load_dataset(folder)" if parquet else "load_from_disk(folder)"
    return (
        f"---\n{f'license: {license}{chr(10)}' if license else ''}"
        f"task_categories:\n  - image-to-text\nlanguage:\n  - en\n{head}---\n\n"
        "# COCO features and captions for DIFNet\n\n"
        f"`datasets.{opened}` opens it; `difnet_transformers.data` of DIFNet for Transformers makes batches of it. "
        f"One row an image; grid features as {provenance['dtype']}, segmentation packed by `encode_segmentation`.\n"
        f"{_class_line(classes)}\n"
        f"| split | images | captions | images of restval |\n|---|---|---|---|\n{counts}"
        f"{_column_table(provenance)}{_network_lines(provenance)}\n"
        f"{fitted}"
        f"Left out: {len(provenance['left_out'])} images.\n\n"
        f"Made by `{printable(provenance['command'], 2000)}` from\n\n{names}\n"
        "`provenance.json` says the rest: the hashes of all sources and shards, what was left out, versions.\n"
    )
