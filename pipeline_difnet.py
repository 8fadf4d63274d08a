"""The pipeline under the module name of version 0.1: importing this module registers "image-captioning" too."""

from modeling_difnet.images_difnet import UnreadableImage, fetch, open_image, unusual_size
from modeling_difnet.images_difnet import UnreadableImage as UnreadablePicture
from modeling_difnet.images_difnet import open_image as open_picture
from modeling_difnet.pipeline_difnet import (
    TASK,
    UNTRAINED_WARNING,
    DifnetImageCaptioningPipeline,
    load_grid_backbone,
    load_segmenter,
    provenance_of,
)

__all__ = [
    "TASK",
    "UNTRAINED_WARNING",
    "DifnetImageCaptioningPipeline",
    "UnreadableImage",
    "UnreadablePicture",
    "fetch",
    "load_grid_backbone",
    "load_segmenter",
    "open_image",
    "open_picture",
    "provenance_of",
    "unusual_size",
]
