"""What captions and features of many images share: the opening of an image, and the row of one that fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeAlias

import torch

from modeling_difnet.feature_networks_difnet import GridBackbone, Segmenter
from modeling_difnet.images_difnet import open_image

from ..stage_times import StageTimes
from ..vision.image_batches import LoadedImage, load_image
from .readers import ImageItem

UNFORESEEN = "(--debug shows where)"
ALIKE_FAILURES = 16

Row: TypeAlias = dict[str, Any]
"""A row of the output by the names of its columns; those that do not apply are `None` or missing."""


class RowMaker(Protocol):
    """What makes the rows of a run: `ImageCaptioner` or `FeatureMaker`.

    Attributes:
        what: "captions" or "features".
        config: networks and options, a dataclass with `device` and `num_threads`.
        batch_size: of images.
        device: of the networks.
        schema: the columns, a `pyarrow.Schema`.
    """

    what: str
    config: Any

    @property
    def batch_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def schema(self) -> Any: ...

    def identity(self) -> dict[str, Any]:
        """What decides about the rows, but for the images."""

    def rows(self, items: Iterable[ImageItem], times: StageTimes | None = None) -> Iterator[Row]:
        """A row for each image, in order."""


def load_item(
    item: ImageItem,
    backbone: GridBackbone | None,
    segmenter: Segmenter | None,
    keep: bool,
) -> LoadedImage:
    """An image of the inputs, ready for the networks.

    Args:
        item: of `Fetcher.fetched`.
        backbone, segmenter: prepare the image for themselves.
        keep: whether the image itself is needed later.

    Raises:
        Exception: what is wrong with it.
    """
    if isinstance(item.content, Exception):
        raise item.content
    image = open_image(item.content, name=item.key)
    return load_image(image, backbone, segmenter, keep)._replace(
        remark=None
    )  # of one image in a million nobody reads it


class DeviceFailed(RuntimeError):
    """What goes wrong is not the images' fault, so that their rows must not say so."""


class FailureWatch:
    """Ends a run whose networks fail, whatever the image: a GPU that is lost, a memory that is full.

    Errors that nobody foresaw end with `UNFORESEEN`, see `describe`.
    """

    def __init__(self) -> None:
        self.last = ""
        self.number = 0

    def look(self, error: str | None) -> None:
        """Looks at the error of the next image, `None` for none.

        Raises:
            DeviceFailed: it is one of the device, or `ALIKE_FAILURES` images in a row fail in the same unforeseen way.
        """
        if error is None or not error.endswith(UNFORESEEN):
            self.last, self.number = "", 0
            return
        self.number = self.number + 1 if error == self.last else 1
        self.last = error
        if "CUDA error" in error or self.number == ALIKE_FAILURES:
            raise DeviceFailed(
                f"{error.removesuffix(UNFORESEEN).strip()}; this shard is not written, and the same command resumes"
            )


def error_row(item: ImageItem, reason: str) -> Row:
    """The row of an image that fails; `reason` need not repeat its key."""
    said = " ".join(reason.split())
    said = said.removesuffix(UNFORESEEN).strip()
    return {"key": item.key, "source": item.source, "error": said.removeprefix(f"{item.key}: ") or said}
