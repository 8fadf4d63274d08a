"""`ImageCaptioner` for features that were made before, in the place of images.

What the features say of the networks that made them is compared with what the captioner was trained with, and classes
in another order are matched by name. The original (mrwu-mac/DIFNet, CVPR 2022) has one kind of features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..data.feature_records import (
    FeatureRecords,
    difference_of_backbones,
    difference_of_classes,
    order_of_classes,
    recorded_classes,
)
from ..files import printable
from ..stage_times import StageTimes
from .captioning import CaptioningConfig, ImageCaptioner
from .readers import ImageItem
from .rows import Row
from .stored_features import StoredFeatures


class FeatureCaptioner(ImageCaptioner):
    """Captions features; each item has one row, in their order.

    Args:
        config: captioner and options; its feature networks are not loaded.
        segmentation: where segmentation features beside grid features are from, which a captioner without a
            segmentation flow refuses.
    """

    needs_images = False

    def __init__(self, config: CaptioningConfig, segmentation: str | None = None) -> None:
        super().__init__(replace(config, grid_backbone=None, segmentation_model=None))
        self.segmentation = segmentation
        self._order: tuple[FeatureRecords, tuple[int, ...] | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "segmentation": self.segmentation}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"], state["segmentation"])  # type: ignore[misc]

    def identity_of_networks(self) -> dict[str, Any]:
        """The features' files have fingerprints; see `ImageCaptioner.identity`.

        Raises:
            ValueError: the captioner has no segmentation flow, and segmentation features are given.
        """
        if self.segmentation is not None and not self.pipeline.model.config.use_segmentation:
            raise ValueError("this captioner has no segmentation flow: leave --segmentation out")
        return {"features": "stored", "--segmentation": self.segmentation}

    def rows(
        self, items: Iterable[ImageItem], times: StageTimes | None = None, overlap: bool | None = None
    ) -> Iterator[Row]:
        """Captions features as they come; see `ImageCaptioner.rows`.

        Raises:
            ValueError: they are of another grid backbone or of other classes, or lack those of the segmentation flow.
        """
        return super().rows(self._checked(items), times, overlap)

    def _checked(self, items: Iterable[ImageItem]) -> Iterator[ImageItem]:
        for item in items:
            content: Any = item.content
            if isinstance(content, StoredFeatures):
                order = self._order_of_classes(content, printable(item.source or "the table of features", 300))
                if order is not None and isinstance(content.segmentation, np.ndarray):
                    content = content._replace(segmentation=content.segmentation[list(order)])
            yield item._replace(content=content)

    def _order_of_classes(self, features: StoredFeatures, source: str) -> tuple[int, ...] | None:
        """Where features have each class of the captioner; `None` for the same order, or one that is not known.

        Raises:
            ValueError: something is wrong with all features of the source.
        """
        uses_segmentation = self.pipeline.model.config.use_segmentation
        if uses_segmentation and features.segmentation is None:
            raise ValueError(
                f"{source}: this captioner needs the segmentation features too: give --segmentation, or features that "
                "were extracted with --segmentation-model"
            )
        if self._order is not None and self._order[0] is features.records:
            return self._order[1]
        backbone = difference_of_backbones(self.pipeline.recorded_backbone, features.records.grid_backbone)
        if backbone is not None and not self.config.force:
            raise ValueError(
                f"{source}: this captioner was trained on other grid features: {backbone}; --force takes them"
            )
        order = None
        expected, found = self.pipeline.class_names, recorded_classes(features.records.segmentation_model)
        if uses_segmentation and expected is not None and found is not None:
            classes = difference_of_classes(expected, found)
            if classes is not None:
                raise ValueError(f"{source}: other segmentation classes than the captioner's: {classes}")
            order = order_of_classes(expected, found)
        self._order = features.records, order
        return order

    def _load(self, item: ImageItem) -> dict[str, np.ndarray]:
        """The captioner's inputs."""
        content: Any = item.content
        if isinstance(content, Exception):
            raise content
        inputs = {"grid_features": content.grid}
        if self.pipeline.model.config.use_segmentation:
            if isinstance(content.segmentation, Exception):
                raise content.segmentation
            inputs["segmentation_features"] = content.segmentation
        return inputs
