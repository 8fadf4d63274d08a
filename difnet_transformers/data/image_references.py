"""A packed split with one item an image and all its reference captions, for `SelfCriticalTrainer`.

In place of the original's `ImageDictionaryDataset` (`data/dataset.py` of mrwu-mac/DIFNet, CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..command_line import requires
from .packed_dataset import PackedImages

with requires("data"):
    from datasets import Dataset

if TYPE_CHECKING:
    import torch


class ImageReferences:
    """The images of a packed split as a map-style dataset, for `SelfCriticalTrainer` or a `DataLoader`.

    Item `i` is a dictionary: `grid_features` (cells, width), where the dataset has them `segmentation_features`
    (classes, height, width), where any image of the split has padded cells `grid_attention_mask` (cells,), the list of
    strings `references`, and `image_id`.

    Args:
        dataset, dtype, mask_padded_cells: as for `PackedImages`.
    """

    def __init__(self, dataset: Dataset, *, dtype: torch.dtype | None = None, mask_padded_cells: bool = True):
        self.images = PackedImages(dataset, dtype, mask_padded_cells)
        self._ids = dataset.select_columns("image_id").with_format(None)[:]["image_id"]
        self._has_padded_cells = mask_padded_cells and bool((self.images.cells() < self.images.cell_shape[0]).any())

    @property
    def column_names(self) -> list[str]:
        """Names of the entries of an item that are not features."""
        return ["references", "image_id"]

    @property
    def references(self) -> list[list[str]]:
        """The reference captions of all images."""
        return self.images.captions(slice(None))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several items, read together; `DataLoader` prefers it."""
        import torch

        features = self.images.read(indices)
        if self._has_padded_cells and "grid_attention_mask" not in features:
            features["grid_attention_mask"] = torch.ones(features["grid_features"].shape[:2], dtype=torch.int64)
        references = self.images.captions(list(indices))
        return [
            {**dict(zip(features, tensors, strict=True)), "references": captions, "image_id": self._ids[index]}
            for index, captions, *tensors in zip(indices, references, *features.values(), strict=True)
        ]
