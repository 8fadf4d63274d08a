"""What features say about the networks that made them, and classes of segmentation features matched by name.

`difnet extract` writes both records, `grid_backbone` and `segmentation_model`, into what it makes; `difnet pack` keeps
them in provenance.json, and a checkpoint in its processor. The original (mrwu-mac/DIFNet, CVPR 2022) has one kind of
features and no record of it: segmentation features of 133 classes without a record have COCO's panoptic classes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import printable, read_json
from .grids import grid_shape

if TYPE_CHECKING:
    from datasets import Dataset

    from .streaming import StreamedImages

NUM_COCO_CLASSES = 133

# What decides about grid features, and what a message calls it.
BACKBONE_KEYS = {"parameters_sha256": "weights", "layer": "layer", "image_size": "image size"}


class FeatureRecords(NamedTuple):
    """What made the two features; `None` where it is not known.

    Attributes:
        grid_backbone: in the form of `modeling_difnet.pipeline_difnet.provenance_of`.
        segmentation_model: in that of `segmentation_provenance_of`.
    """

    grid_backbone: dict[str, Any] | None = None
    segmentation_model: dict[str, Any] | None = None


def records_in(content: object) -> FeatureRecords:
    """The records in the settings of a processor, a manifest or a provenance; damaged ones are none."""
    said = [content.get(name) for name in FeatureRecords._fields] if isinstance(content, Mapping) else []
    records = FeatureRecords(*(dict(record) if isinstance(record, Mapping) else None for record in said))
    names = (records.segmentation_model or {}).get("class_names")
    is_sound = names is None or (
        isinstance(names, list | tuple)
        and all(isinstance(name, str) for name in names)
        and len(set(names)) == len(names) > 0
    )
    return records if is_sound else records._replace(segmentation_model=None)


def provenance_of_dataset(folder: str | os.PathLike) -> dict[str, Any]:
    """What provenance.json of a packed folder or dataset of the Hub says; empty where it cannot be read."""
    path = Path(folder, "provenance.json")
    try:
        if not Path(folder).exists():
            from .parquet import hub_file  # needs datasets

            path = hub_file(folder, "provenance.json")
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def records_of_dataset(folder: str | os.PathLike) -> FeatureRecords:
    """The records in provenance.json of a packed folder or dataset of the Hub; empty where it cannot be read."""
    return records_in(provenance_of_dataset(folder))


def packed_folder_of(split: Dataset | StreamedImages, folder: str | os.PathLike) -> Path:
    """The packed dataset that a split lies in; `folder` where the split lies in none."""
    for file in split.cache_files[:1]:
        packed = Path(file["filename"]).parent.parent
        if (packed / "provenance.json").exists():
            return packed
    return Path(folder)


def records_of_split(split: Dataset | StreamedImages, folder: str | os.PathLike) -> FeatureRecords:
    """The records of the packed dataset that a split lies in; of `folder` where the split lies in none."""
    return records_of_dataset(packed_folder_of(split, folder))


def records_of_checkpoint(folder: str | os.PathLike) -> FeatureRecords:
    """The records in the processor of a checkpoint; empty where it has none."""
    try:
        settings = read_json(Path(folder, "processor_config.json"))
    except (OSError, ValueError):
        return FeatureRecords()
    return records_in(settings.get("feature_extractor") if isinstance(settings, Mapping) else None)


def grid_size_of_features(manifest: Mapping[str, Any], num_cells: int) -> int | tuple[int, int]:
    """Cells along a side of the grids that `difnet extract` made, or their rows and columns where these differ.

    Args:
        manifest: content of manifest.json.
        num_cells: of a grid.
    """
    recorded = (records_in(manifest).grid_backbone or {}).get("grid_size", math.isqrt(num_cells))
    rows, columns = grid_shape(recorded)
    return rows if rows == columns else (rows, columns)


def recorded_classes(record: Mapping[str, Any] | None, num_classes: int | None = None) -> tuple[str, ...] | None:
    """Names of the classes of segmentation features in their order; `None` where they are not known.

    Args:
        record: of the segmentation features.
        num_classes: their number, where it is known. Without a record 133 classes are COCO's.
    """
    names = None if record is None else record.get("class_names")
    if names is not None:
        return tuple(names) if num_classes in (None, len(names)) else None
    if num_classes == NUM_COCO_CLASSES:
        from modeling_difnet.segmentation_difnet import CLASS_NAMES  # takes seconds to import

        return CLASS_NAMES
    return None


def difference_of_classes(expected: Sequence[str], found: Sequence[str]) -> str | None:
    """The first class that is in one of them alone, in words; `None` where both have the same, in whatever order."""
    from modeling_difnet.segmentation_difnet import normal_name

    if tuple(expected) == tuple(found):
        return None
    known, given = ({normal_name(name) for name in names} for names in (expected, found))
    missing = next((name for name in expected if normal_name(name) not in given), None)
    other = next((name for name in found if normal_name(name) not in known), None)
    parts = [f"{len(found)} classes, not {len(expected)}"] if len(found) != len(expected) else []
    parts += [f"{printable(missing)} is missing"] if missing is not None else []
    parts += [f"{printable(other)} is new"] if other is not None else []
    return ", ".join(parts) or None


def order_of_classes(expected: Sequence[str], found: Sequence[str]) -> tuple[int, ...] | None:
    """Places in `found` of the classes of `expected`, matched by name; `None` where the order is the same."""
    from modeling_difnet.segmentation_difnet import normal_name

    place = {normal_name(name): index for index, name in enumerate(found)}
    order = tuple(place[normal_name(name)] for name in expected)
    return None if order == tuple(range(len(order))) else order


def difference_of_backbones(expected: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> str | None:
    """What differs between two recorded grid backbones, in words; `None` where one of them is not known."""
    if not expected or not found:
        return None
    keys = BACKBONE_KEYS
    if expected.get("substitute") and expected.get("parameters_sha256") is None:
        keys = {"model_type": "kind of network"}  # a converted original knows no more
    for key, what in keys.items():
        if expected.get(key) != found.get(key):
            names, values = (
                ", not ".join(printable(record.get(name)) for record in (found, expected)) for name in ("name", key)
            )
            return f"features of {names}: other {what}" + (f" {values}" if key != "parameters_sha256" else "")
    return None


def common_record(records: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """What the records of several sources of segmentation features have in common, with the classes of the first."""
    known = [record for record in records if record is not None]
    if not known:
        return None
    first = dict(known[0])
    shared = {
        key: value if all(record is not None and record.get(key) == value for record in records) else None
        for key, value in first.items()
    }
    return {**shared, "class_names": first.get("class_names")}
