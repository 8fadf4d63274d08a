"""Class shares of grid cells from any segmentation model or object detector of Transformers, with any classes.

The paper's second flow has COCO's 133 panoptic classes (`segmentation_difnet.py`). Here it has those of a model's
`id2label`, in the order of their labels:

    image --> model --> label map (H, W) --> share of each class in each cell (classes, 7, 7)

Universal models (MaskFormer, Mask2Former, OneFormer, EoMT, DETR with masks) give panoptic segments, semantic models
(SegFormer, BEiT, DPT, UperNet, MobileNetV2 ..) one class a pixel. An object detector's boxes are filled, those of
higher scores over those of lower ones: a coarse second flow, but one that knows objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers import (
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    PreTrainedModel,
)

from .images_difnet import Image, fitted_size, require_pillow
from .segmentation_difnet import MAX_LABEL_MAP_SIDE, PanopticSegmenter, normal_name, pool_channel_map
from .weights_difnet import load_complete, load_config

NO_CLASS = -1
"""In a label map: a pixel of no class."""

MODEL_CLASSES = {
    "panoptic": AutoModelForUniversalSegmentation,
    "semantic": AutoModelForSemanticSegmentation,
    "boxes": AutoModelForObjectDetection,
}


class SegmentationModel:
    """A model that says which class is where, as the source of segmentation features.

    ```python
    >>> from PIL import Image
    >>> from modeling_difnet.segmentation_models_difnet import SegmentationModel

    >>> segmenter = SegmentationModel.from_pretrained("nvidia/segformer-b0-finetuned-ade-512-512")
    >>> segmenter(Image.open("image.jpg")).shape  # 150 classes
    (150, 7, 7)
    ```

    Args:
        model: a universal or semantic segmentation model, or an object detector.
        processor: its image processor, or for OneFormer its processor.
        kind: "panoptic", "semantic" or "boxes", see `kind_of`.
        grid_size: cells along a side of the feature (default 7), or rows and columns.
        class_names: classes of the feature, of a captioner that was trained with them; by default those of the
            model, which otherwise must be the same, in whatever order.
        score_threshold: of a detector, boxes with lower scores are dropped (default 0.5).

    Raises:
        ValueError: the model has no names of classes, names one twice, or has other classes than `class_names`.
    """

    precision: str | None = None  # where it was chosen, see `load_segmenter`
    runtime: str | None = None  # of a model that does not run in PyTorch
    image_size: int | None = None  # likewise: pixels of the shortest edge

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        kind: str,
        grid_size: int | tuple[int, int] = 7,
        class_names: Sequence[str] | None = None,
        score_threshold: float = 0.5,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.kind = kind
        self.grid_size = grid_size
        self.score_threshold = score_threshold
        own = class_names_of(model.config.id2label or {})
        self.class_names = tuple(own.values() if class_names is None else class_names)
        self.channels = match_classes(own, self.class_names)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        grid_size: int | tuple[int, int] = 7,
        class_names: Sequence[str] | None = None,
        score_threshold: float = 0.5,
        revision: str | None = None,
    ) -> SegmentationModel:
        """Loads a folder or a repository of the Hub; what kind of model it is stands in its config.json.

        Args:
            name: the folder or repository.
            grid_size, class_names, score_threshold: see `SegmentationModel`.
            revision: branch, tag or commit of the repository.

        Raises:
            ValueError: it is no such model, its weights are incomplete or not finite, or as `SegmentationModel`.
            ImportError: Pillow is not installed.
        """
        require_pillow()
        config = load_config(name, revision)
        kind = kind_of(config.architectures or [], name)
        own = class_names_of(config.id2label or {})
        match_classes(own, list(own.values()) if class_names is None else class_names)  # before weights are read
        model = load_complete(MODEL_CLASSES[kind], name, revision)
        processor = PanopticSegmenter.processor_of(name, config.model_type, revision)
        return cls(model, processor, kind, grid_size, class_names, score_threshold)

    def prepare(self, image: Image.Image) -> Any:
        """The model's inputs for an RGB image, on the CPU."""
        if self._in_parts:  # the scores of all classes at a photograph's size would take gigabytes
            image = image.resize(fitted_size(image.size, MAX_LABEL_MAP_SIDE))
        is_oneformer = self.model.config.model_type == "oneformer"
        arguments: dict[str, Any] = {"task_inputs": ["panoptic"]} if is_oneformer else {}
        if getattr(self.processor, "do_center_crop", None):
            arguments["do_center_crop"] = False  # both flows see the whole image
        return self.processor(images=image, return_tensors="pt", **arguments)

    @property
    def _in_parts(self) -> bool:
        """Whether the model looks at an image in several parts, which its processor puts together again, as EoMT's
        semantic checkpoints do."""
        return bool(getattr(self.processor, "do_split_image", False))

    @torch.no_grad()
    def label_map(self, image: Image.Image, inputs: Any = None) -> np.ndarray:
        """(H, W) of indices into `class_names`, int64, `NO_CLASS` elsewhere. H and W are the image's, at most 640.

        Args:
            image: RGB.
            inputs: what `prepare` made of it, if that was done before.
        """
        height, width = fitted_size(image.size, MAX_LABEL_MAP_SIDE)[::-1]
        is_oneformer = self.model.config.model_type == "oneformer"
        inputs = self.prepare(image) if inputs is None else inputs
        outputs = self.model(**inputs.to(self.model.device))
        if self.kind == "semantic" or self._in_parts:
            (labels,) = self.processor.post_process_semantic_segmentation(outputs, target_sizes=[(height, width)])
            return index_map(labels.cpu().numpy(), self.channels)
        if self.kind == "boxes":
            (found,) = self.processor.post_process_object_detection(
                outputs, threshold=self.score_threshold, target_sizes=[(height, width)]
            )
            return self._fill_boxes(found, height, width)
        options: dict[str, Any] = {"target_sizes": [(height, width)]}
        if is_oneformer:
            # Its processor resizes with torchvision even where it is not installed; this is the same resize.
            probabilities = interpolate(outputs.masks_queries_logits.sigmoid(), size=(height, width), mode="bilinear")
            outputs.masks_queries_logits = probabilities.logit()
            options = {}
        if not self.model.config.model_type.startswith("eomt"):
            options["label_ids_to_fuse"] = set()  # fusing segments of one class would change nothing here
        (result,) = self.processor.post_process_panoptic_segmentation(outputs, **options)
        segments = {
            segment["id"]: self.channels[segment["label_id"]]
            for segment in result["segments_info"]
            if segment["label_id"] in self.channels
        }
        return index_map(result["segmentation"].cpu().numpy(), segments)

    def _fill_boxes(self, found: Mapping[str, torch.Tensor], height: int, width: int) -> np.ndarray:
        """The boxes of a detector, the surest on top."""
        labels = np.full((height, width), NO_CLASS, dtype=np.int64)
        for index in found["scores"].argsort().tolist():
            label = int(found["labels"][index])
            if label in self.channels:
                left, top, right, bottom = found["boxes"][index].round().int().tolist()
                labels[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = self.channels[label]
        return labels

    def __call__(self, image: Image.Image, inputs: Any = None) -> np.ndarray:
        """The segmentation feature of an RGB image, float32 (classes, rows, columns); `inputs` as in `label_map`."""
        return class_shares(self.label_map(image, inputs), len(self.class_names), self.grid_size)


def kind_of(architectures: Sequence[str], name: str) -> str:
    """Which of `MODEL_CLASSES` loads a checkpoint, by the `architectures` in its config.json.

    Raises:
        ValueError: neither a segmentation model nor an object detector.
    """
    for ending, kind in (
        ("ForUniversalSegmentation", "panoptic"),
        ("ForInstanceSegmentation", "panoptic"),  # MaskFormer's only class
        ("ForSemanticSegmentation", "semantic"),
        ("ForObjectDetection", "boxes"),
        ("ForSegmentation", "panoptic"),  # DETR with masks
    ):
        if any(architecture.endswith(ending) for architecture in architectures):
            return kind
    raise ValueError(
        f"{name}: {', '.join(architectures) or 'no architecture in its config.json'}: neither a segmentation model "
        "nor an object detector of Transformers"
    )


def class_names_of(id2label: Mapping[int, str] | Mapping[str, str]) -> dict[int, str]:
    """Names of classes by label, in the order of the labels; labels without a name of their own are left out.

    Raises:
        ValueError: no label has a name, or two have the same.
    """
    names = {int(label): str(name) for label, name in id2label.items()}
    named = {
        label: names[label]
        for label in sorted(names)
        if names[label] not in ("N/A", "") and names[label].upper() != f"LABEL_{label}"
    }
    if not named:
        raise ValueError("the model's classes have no names: set `id2label` in its config.json")
    seen: dict[str, str] = {}
    for name in named.values():
        if normal_name(name) in seen:
            raise ValueError(f"id2label names the class {name!r} twice; give each class one label")
        seen[normal_name(name)] = name
    return named


def match_classes(own: Mapping[int, str], class_names: Sequence[str]) -> dict[int, int]:
    """The place in `class_names` of each label of a model, matched by name.

    Args:
        own: names of the model's classes by label.
        class_names: those of the feature.

    Raises:
        ValueError: a class is in one of them alone; the text names the first.
    """
    place = {normal_name(name): index for index, name in enumerate(class_names)}
    known = {normal_name(name) for name in own.values()}
    missing = [name for name in class_names if normal_name(name) not in known]
    others = [name for name in own.values() if normal_name(name) not in place]
    if missing or others:
        first = f"it lacks {missing[0]!r}" if missing else f"{others[0]!r} is none of the captioner's"
        raise ValueError(
            f"the segmentation model has {len(own)} classes, the captioner {len(class_names)}: {first}; take the "
            "model that the captioner was trained with"
        )
    return {label: place[normal_name(name)] for label, name in own.items()}


def index_map(label_map: np.ndarray, indices: Mapping[int, int]) -> np.ndarray:
    """(H, W) labels as int64 indices; labels that `indices` does not have become `NO_CLASS`."""
    labels, places = np.unique(label_map, return_inverse=True)
    table = np.array([indices.get(int(label), NO_CLASS) for label in labels], dtype=np.int64)
    return table[places.reshape(label_map.shape)]


def class_shares(label_map: np.ndarray, num_classes: int, grid_size: int | tuple[int, int] = 7) -> np.ndarray:
    """The share of each class in each cell, as `pool_channel_map` has it.

    Args:
        label_map: (H, W) indices below `num_classes`; negative ones are no class.
        num_classes: of the feature.
        grid_size: cells along a side (default 7), or rows and columns.

    Returns:
        float32 (num_classes, rows, columns); the classes of a cell sum to at most 1.
    """
    return pool_channel_map(label_map, grid_size, num_classes)


__all__ = ["NO_CLASS", "SegmentationModel", "class_shares"]
