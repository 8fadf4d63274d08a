"""What to pack: the settings, and every image with the places of its features."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..files import printable
from .captions import ImageRow, read_annotations
from .errors import DataError, GridSizeError, Problem, raise_problems
from .feature_files import GridFiles, SegmentationFiles
from .grids import fit_grid
from .packed_dataset import packed_features

if TYPE_CHECKING:
    from datasets import Features

GRIDS_TO_TRY = 10


@dataclass(frozen=True)
class PackingConfig:
    """Everything that decides what the rows look like.

    Names, order and defaults are part of a packing's identity (`packing_identity`).

    Args:
        features: HDF5 files of grid features.
        segmentation: folder of `.npy` files or HDF5 file of segmentation features; `None` for the paper's baseline.
        annotations: what `read_annotations` takes.
        dtype: type that features are stored in, "float16" or "float32".
        grid_size: cells along a side.
        grid_feature_size: values of a cell.
        num_segmentation_classes: channels of the segmentation features.
        skip_missing: whether images that cannot be used are left out, and named in provenance.json.
        grid_fit: `fit` of `fit_grid`.
    """

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
        """(classes, height, width)."""
        return (self.num_segmentation_classes, self.grid_size, self.grid_size)

    def columns(self) -> Features:
        """The columns of the packed dataset."""
        with_segmentation = self.segmentation is not None
        return packed_features(self.dtype, self.grid_size, self.grid_feature_size, with_segmentation)


class PlannedImage(NamedTuple):
    """An image with the HDF5 file of its grid, and what leads to its segmentation in `SegmentationFiles`."""

    row: ImageRow
    grid_file: str
    segmentation_name: str | None


class Plan(NamedTuple):
    """What is packed, from which annotation files, and what is not.

    Attributes:
        splits: images of every split in the order of their ids; no split is empty.
        annotation_files: that the captions were read from.
        left_out: images that lack something.
        unused_features: ids with features and without annotations.
    """

    splits: dict[str, list[PlannedImage]]
    annotation_files: list[Path]
    left_out: list[Problem]
    unused_features: list[int]

    def num_images(self) -> int:
        return sum(map(len, self.splits.values()))


def make_plan(config: PackingConfig) -> Plan:
    """Matches annotations and features.

    Raises:
        DataError: an image lacks something, or features lack annotations, and `skip_missing` is `False`; the text
            lists all of them. Or a file is not what it should be.
    """
    annotated, annotation_files, problems = read_annotations(config.annotations)
    are_annotations_whole = not problems
    grid_files = GridFiles(config.features).index()
    segmentation_names: dict[int, str] | None = None
    if config.segmentation is not None:
        segmentation_names = SegmentationFiles(config.segmentation).index()
    splits: dict[str, list[PlannedImage]] = {}
    for split, rows in annotated.items():
        planned = []
        for row in rows:
            image_id = row.image_id
            before = len(problems)
            if image_id not in grid_files:
                problems.append(Problem(", ".join(config.features), "no features", image_id))
            if segmentation_names is not None and image_id not in segmentation_names:
                problems.append(Problem(str(config.segmentation), "no segmentation", image_id))
            if not row.captions and (are_annotations_whole or config.skip_missing):
                problems.append(Problem(config.annotations, "no captions", image_id))
            if len(problems) == before:
                name = None if segmentation_names is None else segmentation_names[image_id]
                planned.append(PlannedImage(row, grid_files[image_id], name))
        if planned:
            splits[split] = planned
    annotated_ids = {row.image_id for rows in annotated.values() for row in rows}
    unused = sorted(grid_files.keys() - annotated_ids)
    if not config.skip_missing:
        # With entries that cannot be read, features of theirs and images without captions only follow from it.
        surplus: Iterable[Problem] = []
        if are_annotations_whole:
            without = f"without annotations in {config.annotations}"
            more = sorted((segmentation_names or {}).keys() - annotated_ids - set(unused))
            surplus = itertools.chain(
                (Problem(grid_files[image_id], f"features {without}", image_id) for image_id in unused),
                (Problem(str(config.segmentation), f"segmentation {without}", image_id) for image_id in more),
            )
        raise_problems([*problems, *surplus])
    return Plan(splits, annotation_files, problems, unused)


def check_grid_size(config: PackingConfig, plan: Plan) -> None:
    """Looks at the first grids before the work begins; a single one that does not fit is found later.

    Raises:
        DataError: not one of them fits.
    """
    grids = GridFiles(config.features)
    errors = []
    images = itertools.chain.from_iterable(plan.splits.values())
    for row, grid_file, _ in itertools.islice(images, GRIDS_TO_TRY):
        try:
            array = grids.read(grid_file, row.image_id)
            fit_grid(array, config.grid_size, config.grid_feature_size, config.grid_fit)
        except GridSizeError as error:
            errors.append(f"{printable(grid_file, 300)}: image {row.image_id}: {error}")
        except ValueError:
            continue
        else:
            return
    if errors:
        raise DataError(errors[0])
