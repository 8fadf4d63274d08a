"""What to pack: the settings, and every image with the places of its features."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import printable
from .captions import ImageRow, read_annotations
from .errors import DataError, GridSizeError, Problem, raise_problems
from .feature_files import GridFiles, SegmentationFiles
from .feature_records import (
    NUM_COCO_CLASSES,
    common_record,
    difference_of_classes,
    order_of_classes,
    recorded_classes,
)
from .grids import fit_grid, grid_shape, grid_text
from .packed_dataset import LARGEST_SEGMENTATION, packed_features

if TYPE_CHECKING:
    from datasets import Features

GRIDS_TO_TRY = 10


@dataclass(frozen=True)
class PackingConfig:
    """Everything that decides what the rows look like.

    Names, order and defaults are part of a packing's identity (`packing_identity`).

    Args:
        features: HDF5 files of grid features.
        segmentation: folder of `.npy` files or HDF5 file of segmentation features, or several of them; `None` for the
            paper's baseline.
        annotations: what `read_annotations` takes.
        dtype: type that features are stored in, "float16" or "float32".
        grid_size: cells along a side, or rows and columns where they differ.
        grid_feature_size: values of a cell.
        num_segmentation_classes: channels of the segmentation features; `None` for what they say, or else 133.
        skip_missing: whether images that cannot be used are left out, and named in provenance.json.
        grid_fit: `fit` of `fit_grid`.
        class_orders: of sources whose segmentation features have the classes in another order than the first, the
            place there of each class of the first; see `with_recorded_classes`.
    """

    features: tuple[str, ...]
    segmentation: str | tuple[str, ...] | None
    annotations: str
    dtype: str = "float16"
    grid_size: int | tuple[int, int] = 7
    grid_feature_size: int = 2048
    num_segmentation_classes: int | None = NUM_COCO_CLASSES
    skip_missing: bool = False
    grid_fit: str = "refuse"
    class_orders: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def segmentation_paths(self) -> tuple[str, ...]:
        """All sources of segmentation features."""
        if self.segmentation is None:
            return ()
        return (self.segmentation,) if isinstance(self.segmentation, str) else self.segmentation

    def segmentation_shape(self) -> tuple[int, int, int]:
        """(classes, height, width)."""
        return (self.num_segmentation_classes or NUM_COCO_CLASSES, *grid_shape(self.grid_size))

    def columns(self) -> Features:
        """The columns of the packed dataset."""
        with_segmentation = self.segmentation is not None
        return packed_features(self.dtype, self.grid_size, self.grid_feature_size, with_segmentation)


class PlannedImage(NamedTuple):
    """An image with the HDF5 file of its grid, the source of its segmentation and what leads to it there."""

    row: ImageRow
    grid_file: str
    segmentation_path: str | None
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
    segmentation_paths = config.segmentation_paths()
    segmentations = index_segmentations(segmentation_paths)
    splits: dict[str, list[PlannedImage]] = {}
    for split, rows in annotated.items():
        planned = []
        for row in rows:
            image_id = row.image_id
            before = len(problems)
            if image_id not in grid_files:
                problems.append(Problem(", ".join(config.features), "no features", image_id))
            if segmentation_paths and image_id not in segmentations:
                problems.append(Problem(", ".join(segmentation_paths), "no segmentation", image_id))
            if not row.captions and (are_annotations_whole or config.skip_missing):
                problems.append(Problem(config.annotations, "no captions", image_id))
            if len(problems) == before:
                place = segmentations[image_id] if segmentation_paths else (None, None)
                planned.append(PlannedImage(row, grid_files[image_id], *place))
        if planned:
            splits[split] = planned
    annotated_ids = {row.image_id for rows in annotated.values() for row in rows}
    unused = sorted(grid_files.keys() - annotated_ids)
    if not config.skip_missing:
        # With entries that cannot be read, features of theirs and images without captions only follow from it.
        surplus: Iterable[Problem] = []
        if are_annotations_whole:
            without = f"without annotations in {config.annotations}"
            more = sorted(segmentations.keys() - annotated_ids - set(unused))
            surplus = itertools.chain(
                (Problem(grid_files[image_id], f"features {without}", image_id) for image_id in unused),
                (Problem(segmentations[image_id][0], f"segmentation {without}", image_id) for image_id in more),
            )
        raise_problems([*problems, *surplus])
    return Plan(splits, annotation_files, problems, unused)


def index_segmentations(paths: Sequence[str]) -> dict[int, tuple[str, str]]:
    """The source of every image's segmentation features, and what leads to them there.

    Raises:
        DataError: an image is there twice, or a source has nothing of the kind.
    """
    found: dict[int, tuple[str, str]] = {}
    for path in paths:
        for image_id, name in SegmentationFiles(path).index().items():
            if image_id in found:
                raise DataError(
                    f"duplicate image id {image_id}: in {printable(found[image_id][0])} and in {printable(path)}"
                )
            found[image_id] = (path, name)
    return found


def with_recorded_classes(config: PackingConfig) -> PackingConfig:
    """The settings with the number of classes and their orders, which the segmentation features say.

    Features that do not say it have the number asked for, and if that is 133, COCO's panoptic classes.

    Raises:
        DataError: sources have different classes, another number than asked for, or more than can be stored; the text
            names the files and the first class that differs.
    """
    paths = config.segmentation_paths()
    asked = config.num_segmentation_classes
    recorded = {path: recorded_classes(SegmentationFiles(path).record()) for path in paths}
    for path, names in recorded.items():
        if names is not None and asked not in (None, len(names)):
            raise DataError(
                f"{printable(path, 300)}: features of {len(names)} classes, --num-segmentation-classes says {asked}; "
                "leave the option out"
            )
    num_classes, orders = asked or NUM_COCO_CLASSES, []
    if any(recorded.values()):
        classes = {path: names or recorded_classes(None, num_classes) for path, names in recorded.items()}
        first, expected = next((path, names) for path, names in classes.items() if names is not None)
        num_classes = len(expected)
        for path, names in classes.items():
            if names is None:
                continue
            difference = difference_of_classes(expected, names)
            if difference is not None:
                raise DataError(
                    f"{printable(path, 300)} and {printable(first, 300)} have different segmentation classes: "
                    f"{difference}; pack features of the same classes"
                )
            order = order_of_classes(expected, names)
            if order is not None:
                orders.append((path, order))
    config = dataclasses.replace(config, num_segmentation_classes=num_classes, class_orders=tuple(orders))
    if math.prod(config.segmentation_shape()) > LARGEST_SEGMENTATION:
        raise DataError(
            f"{num_classes:,} segmentation classes on {grid_text(config.grid_size)} cells are more than "
            f"{LARGEST_SEGMENTATION:,} values an image; make features with a smaller --grid-size"
        )
    return config


def recorded_segmentation(config: PackingConfig) -> dict[str, Any] | None:
    """What the segmentation features say about what made them; `None` where none of them says anything."""
    return common_record([SegmentationFiles(path).record() for path in config.segmentation_paths()])


def check_grid_size(config: PackingConfig, plan: Plan) -> None:
    """Looks at the first grids before the work begins; a single one that does not fit is found later.

    Raises:
        DataError: not one of them fits.
    """
    grids = GridFiles(config.features)
    errors = []
    images = itertools.chain.from_iterable(plan.splits.values())
    for row, grid_file, *_ in itertools.islice(images, GRIDS_TO_TRY):
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
