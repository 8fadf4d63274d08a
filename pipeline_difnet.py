"""The pipeline of `modeling_difnet` under its first name: importing this module registers "image-captioning" too."""

from modeling_difnet.images_difnet import UnreadablePicture, fetch, open_picture, unusual_size
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
    "UnreadablePicture",
    "fetch",
    "load_grid_backbone",
    "load_segmenter",
    "open_picture",
    "provenance_of",
    "unusual_size",
]
