"""The segmentation feature of an image: the share of each of COCO's 133 panoptic classes in each cell of a grid.

The original (mrwu-mac/DIFNet, CVPR 2022) reads these features from files that its authors made with UPSNet, and has no
code to make them. What the authors say they did is done here: one bit map for each class, averaged over 7 x 7 cells.
What differs is where the label map comes from: any COCO panoptic model of Transformers, COCO's own annotations, or an
array. UPSNet's licence is non-commercial; nothing of it is used.

The original's channels have the 53 stuff classes first and the 80 things after them, each in the order of COCO's
category ids. Models number the classes differently, so classes are matched by name.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, AutoProcessor, PreTrainedModel

from .images_difnet import Image, fitted_size, require_pillow
from .weights_difnet import load_complete

# COCO's panoptic categories: names by category id.
STUFF = {
    92: "banner", 93: "blanket", 95: "bridge", 100: "cardboard", 107: "counter", 109: "curtain", 112: "door-stuff",
    118: "floor-wood", 119: "flower", 122: "fruit", 125: "gravel", 128: "house", 130: "light", 133: "mirror-stuff",
    138: "net", 141: "pillow", 144: "platform", 145: "playingfield", 147: "railroad", 148: "river", 149: "road",
    151: "roof", 154: "sand", 155: "sea", 156: "shelf", 159: "snow", 161: "stairs", 166: "tent", 168: "towel",
    171: "wall-brick", 175: "wall-stone", 176: "wall-tile", 177: "wall-wood", 178: "water-other", 180: "window-blind",
    181: "window-other", 184: "tree-merged", 185: "fence-merged", 186: "ceiling-merged", 187: "sky-other-merged",
    188: "cabinet-merged", 189: "table-merged", 190: "floor-other-merged", 191: "pavement-merged",
    192: "mountain-merged", 193: "grass-merged", 194: "dirt-merged", 195: "paper-merged", 196: "food-other-merged",
    197: "building-other-merged", 198: "rock-merged", 199: "wall-other-merged", 200: "rug-merged",
}  # fmt: skip
THINGS = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip

CLASS_NAMES: tuple[str, ...] = (*STUFF.values(), *THINGS.values())
"""The original's channels 0 .. 132 by name: stuff first."""

VOID = 255
"""In a map of channels: a pixel of no class. Any value that is no channel means the same."""

LABEL_ORDERS: dict[str, dict[int, str]] = {
    "stuff-first": dict(enumerate(CLASS_NAMES)),
    "things-first": dict(enumerate((*THINGS.values(), *STUFF.values()))),
    "coco-ids": {**THINGS, **STUFF},
}
"""How label maps number the classes: as the original, as Transformers and detectron2, or by COCO's category ids."""

MAX_LABEL_MAP_SIDE = 640  # COCO's own; keeps the masks of a hundred queries for a large photograph in memory


# Which class is which


def normal_name(name: str) -> str:
    """A class name without what its spellings differ in.

    Case, blanks, hyphens and underscores, and the words at the end that say how COCO's stuff classes came about:
    `wall-other-merged`, `Wall_other` and `wall` are the same class; `wall-wood` is another one.
    """
    words = re.findall(r"[^\W_]+", name.lower())
    while len(words) > 1 and words[-1] in ("merged", "other", "stuff"):
        words.pop()
    return "".join(words)


CHANNEL_OF_NAME: dict[str, int] = {normal_name(name): channel for channel, name in enumerate(CLASS_NAMES)}


def channels_of_labels(id2label: Mapping[int, str] | Mapping[str, str]) -> dict[int, int]:
    """The original's channel for each label of a model, matched by name.

    A model that numbers its labels as COCO's categories (DETR: `person` is 1) is matched by these ids, because its
    table leaves classes unnamed and gives names to ids that have no panoptic class.

    Args:
        id2label: names of the labels, as in the configuration of a Transformers model.

    Returns:
        Channels by label id. Labels that are no COCO class are left out; their pixels are void.

    Raises:
        ValueError: a class is missing from the table, or two labels carry the name of one class.
    """
    names = {int(label): str(name) for label, name in id2label.items()}
    if all(normal_name(names.get(category, "")) == normal_name(name) for category, name in THINGS.items()):
        return _channels_of_category_ids(names)
    channels = {
        label: CHANNEL_OF_NAME[normal_name(name)]
        for label, name in names.items()
        if normal_name(name) in CHANNEL_OF_NAME
    }
    counts = Counter(channels.values())
    doubled = [CLASS_NAMES[channel] for channel, count in counts.items() if count > 1]
    if doubled:
        raise ValueError(f"id2label names these classes twice: {', '.join(doubled)}; give each class one label.")
    missing = [name for channel, name in enumerate(CLASS_NAMES) if channel not in counts]
    if missing:
        examples = ", ".join(itertools.islice(names.values(), 3))
        raise ValueError(
            f"id2label (of {len(names)} labels: {examples}, ..) lacks {len(missing)} of COCO's 133 panoptic classes: "
            f"{', '.join(missing[:5])}{', ..' if len(missing) > 5 else ''}. Use a model that was trained on COCO "
            "panoptic; if it was, but carries no names, set `id2label` in its config.json."
        )
    return channels


def _channels_of_category_ids(names: dict[int, str]) -> dict[int, int]:
    for category, name in STUFF.items():
        found = names.get(category, "")
        if not re.fullmatch(r"(LABEL_\d+|N/A|)", found) and normal_name(found) != normal_name(name):
            raise ValueError(
                f"id2label is in the order of COCO's category ids, but {category} is {found!r}, not {name!r}."
            )
    return {
        category: CLASS_NAMES.index(name) for category, name in LABEL_ORDERS["coco-ids"].items() if category in names
    }


# From a label map to the feature


def channel_map(label_map: np.ndarray, channels: Mapping[int, int]) -> np.ndarray:
    """The channel of each pixel of a label map.

    Args:
        label_map: (H, W), integers or whole floating point numbers.
        channels: the original's channels by label; pixels of other labels become `no_channel`.

    Returns:
        (H, W) of the type of `no_channel`.

    Raises:
        ValueError: another shape or type, or values that are no numbers.
    """
    if label_map.ndim != 2 or label_map.size == 0 or label_map.dtype.kind not in "iuf":
        raise ValueError(f"expected a label map of shape (height, width), got {label_map.dtype} {label_map.shape}")
    if label_map.dtype.kind == "f" and not np.isfinite(label_map).all():
        raise ValueError("NaN or infinity among the labels")
    labels, places = np.unique(label_map, return_inverse=True)
    void = no_channel(channels.values())
    table = np.array([channels.get(int(label), void) if label == int(label) else void for label in labels], void.dtype)
    return table[places.reshape(label_map.shape)]


def no_channel(channels: Iterable[int]) -> np.integer:
    """The value of a pixel of no class, of a type that holds all channels: `VOID` as long as that is uint8."""
    return np.uint8(VOID) if max(channels, default=0) < VOID else np.int64(-1)


def pool_channel_map(
    channel_map: np.ndarray, grid_size: int | tuple[int, int] = 7, num_classes: int = len(CLASS_NAMES)
) -> np.ndarray:
    """The share of each class in each cell.

    Equals `adaptive_avg_pool2d(one_hot(channel_map), grid_size)` without building the bit maps: a cell's average
    of a bit map is how often the channel occurs in it, divided by its pixels. As there, the cells of a map whose sides
    are no multiples of the grid's share pixels.

    Args:
        channel_map: (H, W), channels below `num_classes`; any other value is void.
        grid_size: cells along a side (default 7), or rows and columns.
        num_classes: of the feature (default 133, the original's).

    Returns:
        float32 (num_classes, rows, columns), in [0, 1]. The classes of a cell sum to 1 where no pixel is void.
    """
    if channel_map.ndim != 2 or channel_map.size == 0 or channel_map.dtype.kind not in "iu":
        raise ValueError(f"expected channels of shape (height, width), got {channel_map.dtype} {channel_map.shape}")
    known = (channel_map >= 0) & (channel_map < num_classes)  # (H, W)
    channel_map = np.where(known, channel_map, num_classes).astype(np.int64)
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    feature = np.zeros((num_classes, rows, columns), dtype=np.float32)
    height, width = channel_map.shape
    for row, column in itertools.product(range(rows), range(columns)):
        cell = channel_map[_extent(row, height, rows), _extent(column, width, columns)]
        counts = np.bincount(cell.reshape(-1), minlength=num_classes + 1)[:num_classes]
        feature[:, row, column] = counts / np.float32(cell.size)
    return feature


def _extent(cell: int, length: int, cells: int) -> slice:
    return slice(cell * length // cells, -(-(cell + 1) * length // cells))


# Models


class PanopticSegmenter:
    """A COCO panoptic model of Transformers (MaskFormer, Mask2Former, OneFormer, EoMT, DETR) that gives the feature.

    Pixels for which the model decides on nothing are void: the thresholds are those of the model's own processor.

    Args:
        model: a universal segmentation model; its `id2label` is matched by name (`channels_of_labels`).
        processor: its image processor, or for OneFormer its processor.
        grid_size: cells along a side of the feature (default 7), or rows and columns.
    """

    kind = "panoptic"
    class_names = CLASS_NAMES
    precision: str | None = None  # where it was chosen, see `load_segmenter`
    runtime: str | None = None  # of a model that does not run in PyTorch
    image_size: int | None = None  # likewise: pixels of the shortest edge

    def __init__(self, model: PreTrainedModel, processor: Any, grid_size: int | tuple[int, int] = 7) -> None:
        self.model = model.eval()
        self.processor = processor
        self.grid_size = grid_size
        self.channels = channels_of_labels(model.config.id2label or {})

    @classmethod
    def from_pretrained(
        cls, name: str, grid_size: int | tuple[int, int] = 7, revision: str | None = None
    ) -> PanopticSegmenter:
        """Load a folder or a repository of the Hub.

        Args:
            name: the folder or repository.
            grid_size: cells along a side of the feature, or rows and columns.
            revision: branch, tag or commit of the repository.

        Raises:
            ValueError: the weights are incomplete or not finite, or the model was not trained on COCO panoptic.
            ImportError: Pillow is not installed.
        """
        require_pillow()
        model = load_complete(AutoModelForUniversalSegmentation, name, revision)
        return cls(model, cls.processor_of(name, model.config.model_type, revision), grid_size)

    @staticmethod
    def processor_of(name: str, model_type: str, revision: str | None = None) -> Any:
        """What prepares images for the model. OneFormer reads its task as text, which takes its full processor."""
        auto_class = AutoProcessor if model_type == "oneformer" else AutoImageProcessor
        return auto_class.from_pretrained(name, revision=revision)

    def prepare(self, image: Image.Image) -> Any:
        """The model's inputs for an RGB image, on the CPU."""
        is_oneformer = self.model.config.model_type == "oneformer"
        arguments = {"task_inputs": ["panoptic"]} if is_oneformer else {}
        return self.processor(images=image, return_tensors="pt", **arguments)

    @torch.no_grad()
    def label_map(self, image: Image.Image, inputs: Any = None) -> np.ndarray:
        """(H, W) of the original's channels, uint8, `VOID` elsewhere. H and W are the image's, at most 640.

        Args:
            image: RGB.
            inputs: what `prepare` made of it, if that was done before.
        """
        model_type = self.model.config.model_type
        size = fitted_size(image.size, MAX_LABEL_MAP_SIDE)[::-1]
        inputs = self.prepare(image) if inputs is None else inputs
        outputs = self.model(**inputs.to(self.model.device))
        options: dict[str, Any] = {"target_sizes": [size]}
        if model_type == "oneformer":
            # Its processor resizes with torchvision even where it is not installed; this is the same resize.
            probabilities = interpolate(outputs.masks_queries_logits.sigmoid(), size=size, mode="bilinear")
            outputs.masks_queries_logits = probabilities.logit()
            options = {}
        if not model_type.startswith("eomt"):
            options["label_ids_to_fuse"] = set()  # fusing segments of one class would change nothing here
        (result,) = self.processor.post_process_panoptic_segmentation(outputs, **options)
        segments = {
            segment["id"]: self.channels[segment["label_id"]]
            for segment in result["segments_info"]
            if segment["label_id"] in self.channels
        }
        return channel_map(result["segmentation"].cpu().numpy(), segments)

    def __call__(self, image: Image.Image, inputs: Any = None) -> np.ndarray:
        """The segmentation feature of an RGB image, float32 (133, rows, columns); `inputs` as in `label_map`."""
        return pool_channel_map(self.label_map(image, inputs), self.grid_size)


__all__ = [
    "CHANNEL_OF_NAME",
    "CLASS_NAMES",
    "LABEL_ORDERS",
    "STUFF",
    "THINGS",
    "VOID",
    "PanopticSegmenter",
    "channel_map",
    "channels_of_labels",
    "no_channel",
    "normal_name",
    "pool_channel_map",
]
