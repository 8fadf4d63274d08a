"""Stages for pipelines of one's own: callables that take a table of images or features and give another table.

    images -> CaptionImages -> captions
    images -> MakeFeatures -> features -> CaptionFeatures -> captions

Tables are those of pyarrow, as `map_batches(.., batch_format="pyarrow")` of Ray Data and, as batches of records,
`mapInArrow` of Spark have them. A stage loads its networks when it is made, which a pool of actors does once for each
actor. The original (mrwu-mac/DIFNet, CVPR 2022) has nothing that corresponds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from ..command_line import requires
from .captioning import CaptioningConfig, ImageCaptioner
from .columns import PLACE_COLUMNS, image_column_of, key_column_of
from .feature_captioner import FeatureCaptioner
from .features import FeatureConfig, FeatureMaker
from .outputs import table_of
from .readers import ImageItem, content_of_value
from .rows import RowMaker
from .stored_features import FEATURE_COLUMNS, features_of_row, records_of_table

with requires("data"):
    import pyarrow as pa


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
        self.captioner = FeatureCaptioner(config)
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
        records = records_of_table(features.schema)
        rows = features.select(_present(features)).to_pylist()
        items = (
            ImageItem(str(row["key"]), row.get("source"), cast(Any, features_of_row(row, records))) for row in rows
        )
        return _beside(features, self.captioner, items, FEATURE_COLUMNS)


def _present(features: pa.Table) -> list[str]:
    return [name for name in ("key", "source", "error", *FEATURE_COLUMNS) if name in features.column_names]


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
