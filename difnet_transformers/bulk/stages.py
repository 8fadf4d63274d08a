"""Stages for pipelines of one's own: callables that take a table of images or features and give another table.

    images -> CaptionImages -> captions
    images -> MakeFeatures -> features -> CaptionFeatures -> captions

Tables are those of pyarrow, as `map_batches(.., batch_format="pyarrow")` of Ray Data and, as batches of records,
`mapInArrow` of Spark have them. A stage loads its networks when it is made, which a pool of actors does once for each
actor. The original (mrwu-mac/DIFNet, CVPR 2022) has nothing that corresponds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np

from ..command_line import requires
from ..data.feature_records import (
    difference_of_backbones,
    difference_of_classes,
    order_of_classes,
    recorded_classes,
)
from ..data.packed_dataset import decode_segmentation
from .captioning import CaptioningConfig, ImageCaptioner
from .columns import PLACE_COLUMNS, image_column_of, key_column_of
from .features import FeatureConfig, FeatureMaker
from .outputs import table_of
from .readers import ImageItem, content_of_value
from .rows import Row, RowMaker

with requires("data"):
    import pyarrow as pa

FEATURES = ("grid_features", "grid_cells", "segmentation_features")


class CaptionImages:
    """Captions the images of a table.

    ```python
    >>> images = ray.data.read_webdataset("images/", decoder=False)
    >>> images.map_batches(
    ...     CaptionImages, fn_constructor_args=(CaptioningConfig("my_captioner"),), batch_format="pyarrow",
    ...     batch_size=64, compute=ray.data.ActorPoolStrategy(size=4), num_gpus=1,
    ... ).write_parquet("captions")
    ```

    Args:
        config: networks and options.
        image_column: files as bytes, `{"bytes", "path"}`, or their paths or URLs; by default the usual names.
        key_column: what to call an image in errors, "key" of the result; by default the usual names, or the path.
    """

    def __init__(
        self, config: CaptioningConfig, *, image_column: str | None = None, key_column: str | None = None
    ) -> None:
        self.captioner = ImageCaptioner(config)
        self.image_column, self.key_column = image_column, key_column
        _ = self.captioner.pipeline

    def __call__(self, images: pa.Table) -> pa.Table:
        """Captions a table of images.

        Args:
            images: a row for each image.

        Returns:
            A row for each image, in order: `caption_schema`, and the other columns of `images` but for the image.

        Raises:
            ValueError: there is no column of images, or of keys.
        """
        return _with_rows(self.captioner, images, self.image_column, self.key_column)


class MakeFeatures:
    """Makes the features of the images of a table.

    Args:
        config: networks and options.
        image_column, key_column: as for `CaptionImages`.
    """

    def __init__(
        self, config: FeatureConfig, *, image_column: str | None = None, key_column: str | None = None
    ) -> None:
        self.maker = FeatureMaker(config)
        self.image_column, self.key_column = image_column, key_column
        _ = self.maker.networks

    def __call__(self, images: pa.Table) -> pa.Table:
        """The features of a table of images; as `CaptionImages`, with the columns of `feature_schema`.

        Raises:
            ValueError: there is no column of images, or of keys.
        """
        return _with_rows(self.maker, images, self.image_column, self.key_column)


class CaptionFeatures:
    """Captions features that `MakeFeatures` made; images that have none keep their error.

    Args:
        config: captioner and options; its feature networks are not loaded.
    """

    def __init__(self, config: CaptioningConfig) -> None:
        self.captioner = _FeatureCaptioner(replace(config, grid_backbone=None, segmentation_model=None))
        _ = self.captioner.pipeline

    def __call__(self, features: pa.Table) -> pa.Table:
        """Captions a table of features.

        Args:
            features: of `MakeFeatures`, with the records of the networks in its schema if these are to be compared.

        Returns:
            A row for each image, in order: `caption_schema`, and the other columns but for the features.

        Raises:
            ValueError: they are of other networks than the captioner was trained with.
        """
        order = self.captioner.order_of_classes(records_of(features.schema))
        rows = [self.captioner.features_of_row(row, order) for row in features.select(_present(features)).to_pylist()]
        items = (ImageItem(row["key"], row.get("source"), cast(Any, row["features"])) for row in rows)
        return _beside(features, self.captioner, items, FEATURES)


class _FeatureCaptioner(ImageCaptioner):
    """An `ImageCaptioner` of features in the place of images."""

    needs_images = False

    def order_of_classes(self, records: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Where features have each class of the captioner; `None` for the same order, or one that is not known.

        Raises:
            ValueError: the features are of another grid backbone, or of other classes.
        """
        backbone = difference_of_backbones(self.pipeline.recorded_backbone, records.get("grid_backbone"))
        if backbone is not None and not self.config.force:
            raise ValueError(f"this captioner was trained on other grid features: {backbone}")
        expected, found = self.pipeline.class_names, recorded_classes(records.get("segmentation_model"))
        if not self.pipeline.model.config.use_segmentation or expected is None or found is None:
            return None
        classes = difference_of_classes(expected, found)
        if classes is not None:
            raise ValueError(f"other segmentation classes than the captioner's: {classes}")
        return order_of_classes(expected, found)

    def features_of_row(self, row: Row, order: tuple[int, ...] | None) -> Row:
        """The key of a row with its features, or with what is wrong with it."""
        features: Any
        if row.get("error") is not None or row.get("grid_features") is None:
            features = ValueError(row.get("error") or "the row has no grid_features")
        else:
            features = {"grid_features": np.asarray(row["grid_features"], dtype=np.float32)}  # (cells, C)
            if self.pipeline.model.config.use_segmentation and row.get("segmentation_features") is not None:
                shares = decode_segmentation([row["segmentation_features"]], np.float32)[0]  # (classes, rows, columns)
                features["segmentation_features"] = shares if order is None else shares[list(order)]
        return {"key": str(row["key"]), "source": row.get("source"), "features": features}

    def _load(self, item: ImageItem) -> Any:
        if isinstance(item.content, Exception):
            raise item.content
        return item.content


def records_of(schema: pa.Schema) -> dict[str, Any]:
    """What a schema of `MakeFeatures` says of the networks; nothing where it has lost that on its way."""
    said = json.loads((schema.metadata or {}).get(b"difnet", b"{}"))
    return said if isinstance(said, dict) else {}


def _present(features: pa.Table) -> list[str]:
    return [name for name in ("key", "source", "error", *FEATURES) if name in features.column_names]


def _with_rows(maker: RowMaker, images: pa.Table, image_column: str | None, key_column: str | None) -> pa.Table:
    names = images.column_names
    image = image_column_of(names, image_column, "the table of images", images.schema)
    key = key_column_of(names, key_column, "the table of images") or next(
        (name for name in PLACE_COLUMNS if name in names and name != "image"), None
    )
    if key is None:
        raise ValueError(f"the table of images has no column of keys among {', '.join(names)}: give key_column")
    sources = images["source"] if "source" in names else [None] * len(images)

    def items() -> Iterator[ImageItem]:
        for name, source, value in zip(images[key], sources, images[image], strict=True):
            source = None if source is None else source.as_py()
            yield ImageItem(str(name.as_py()), source, content_of_value(value.as_py()))

    return _beside(images, maker, items(), () if image == key else (image,))


def _beside(table: pa.Table, maker: RowMaker, items: Iterable[ImageItem], dropped: Iterable[str]) -> pa.Table:
    """The rows of items, and the columns of their table that say something else."""
    made = table_of(list(maker.rows(items)), maker.schema)
    for name in table.column_names:
        if name not in made.column_names and name not in dropped:
            made = made.append_column(table.schema.field(name), table[name])
    return made
