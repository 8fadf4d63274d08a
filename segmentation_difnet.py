"""Segmentation features under the module name of version 0.1."""

from difnet_transformers.vision.coco_annotations import (
    channels_of_categories,
    instance_channel_map,
    mask_of_polygon,
    mask_of_segmentation,
    panoptic_channel_map,
)
from modeling_difnet.images_difnet import fitted_size
from modeling_difnet.segmentation_difnet import (
    CLASS_NAMES,
    LABEL_ORDERS,
    STUFF,
    THINGS,
    VOID,
    PanopticSegmenter,
    channel_map,
    channels_of_labels,
    normal_name,
    pool_channel_map,
)

__all__ = [
    "CLASS_NAMES",
    "LABEL_ORDERS",
    "STUFF",
    "THINGS",
    "VOID",
    "PanopticSegmenter",
    "channel_map",
    "channels_of_categories",
    "channels_of_labels",
    "fitted_size",
    "instance_channel_map",
    "mask_of_polygon",
    "mask_of_segmentation",
    "normal_name",
    "panoptic_channel_map",
    "pool_channel_map",
]
