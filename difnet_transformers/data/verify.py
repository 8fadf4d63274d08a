"""Holds a packed dataset against its sources, value by value."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..command_line import requires
from ..files import path_inside, printable, sha256_of
from ..progress import progress_bar
from .errors import BrokenImage, DataError, Problem, raise_problems
from .normalization import normalize_caption, normalize_file_name
from .packed_dataset import decode_segmentation, float16_bound, load_packed_split, packed_splits, quiet_datasets
from .packing_plan import PackingConfig, PlannedImage, make_plan, with_recorded_classes
from .provenance import read_provenance
from .shards import FeatureReader, ImageFeatures

with requires("data"):
    from datasets import Dataset, load_dataset


class Verification(NamedTuple):
    """How many images equal their sources, and how many of their grids had another size (see `FeatureReader`)."""

    num_images: int
    fitted: dict[str, int]
    grid_size: int | tuple[int, int]


def verify_dataset(config: PackingConfig, folder: Path) -> Verification:
    """Compares a packed folder with its sources.

    Args:
        config: the sources; how they were packed is what provenance.json says.
        folder: the packed dataset.

    Raises:
        DataError: the folder differs from its sources; the text lists the images.
        ValueError: the folder is no packed dataset, or is damaged.
    """
    provenance = read_provenance(folder)
    for name, shard in provenance["shards"].items():
        path = path_inside(folder, name)
        if not path.is_file() or sha256_of(path) != shard["sha256"]:
            raise DataError(f"{printable(path, 300)}: missing or changed since it was packed")
    packed_as = ("dtype", "grid_size", "grid_feature_size", "skip_missing", "grid_fit")
    config = dataclasses.replace(config, **{name: provenance[name] for name in packed_as})
    config = with_recorded_classes(config)
    if (config.segmentation is None) != (provenance["num_segmentation_classes"] is None):
        raise DataError(
            f"{printable(folder, 300)} was packed {'with' if config.segmentation is None else 'without'} "
            "--segmentation"
        )
    plan = make_plan(config)
    left_out = {problem["image_id"] for problem in provenance["left_out"]}
    reader = FeatureReader(config)
    problems: list[Problem] = []
    num_images = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        packed = _open_splits(folder, provenance, Path(cache))
        for split, images in plan.splits.items():
            images = [image for image in images if image.row.image_id not in left_out]
            ids = [image.row.image_id for image in images]
            if split not in packed or packed[split]["image_id"][:] != ids:
                raise DataError(f"the split {split} holds other images than the annotations")
            problems += _differences(reader, images, packed[split], split)
            num_images += len(images)
    raise_problems(problems)
    return Verification(num_images, reader.fitted, config.grid_size)


def _open_splits(folder: Path, provenance: Mapping[str, Any], cache: Path) -> Mapping[str, Dataset]:
    if not any(path.endswith(".parquet") for path in provenance["shards"]):
        return {split: load_packed_split(folder, split) for split in packed_splits(folder)}
    files = {split: str(folder / "data" / f"{split}-*.parquet") for split in provenance["splits"]}
    with quiet_datasets():
        return load_dataset("parquet", data_files=files, cache_dir=str(cache))


def _differences(
    reader: FeatureReader, images: Collection[PlannedImage], dataset: Dataset, split: str
) -> Iterator[Problem]:
    dataset = dataset.with_format("numpy", dtype=np.float32, columns=["grid_features"], output_all_columns=True)
    for index, image in enumerate(progress_bar(images, unit=" images", desc=f"verifying {split}")):
        row = dataset[index]
        try:
            features = reader.read(image)
            is_equal = _equal_features(features, row, reader.config.dtype)
        except BrokenImage as broken:
            yield Problem(broken.source, broken.what, image.row.image_id)
            continue
        except ValueError as error:
            yield Problem(split, str(error), image.row.image_id)
            continue
        # Folders of the first version hold names and captions as their sources wrote them.
        stored = (
            normalize_file_name(row["file_name"]),
            bool(row["restval"]),
            tuple(map(normalize_caption, row["captions"])),
            int(row["grid_cells"]),
        )
        expected = (image.row.file_name, image.row.restval, image.row.captions, features.cells)
        if not is_equal or stored != expected:
            yield Problem(split, "differs from its sources", image.row.image_id)


def _equal_features(features: ImageFeatures, row: Mapping[str, Any], dtype: str) -> bool:
    pairs = [(features.grid, row["grid_features"])]
    if features.segmentation is not None:
        pairs.append((features.segmentation, decode_segmentation([row["segmentation_features"]], np.float32)[0]))
    for source, stored in pairs:
        bound = 0 if dtype == "float32" else float16_bound(source)
        if not (np.abs(stored - source) <= bound).all():
            return False
    return True
