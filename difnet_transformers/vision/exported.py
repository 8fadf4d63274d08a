"""Exported feature networks in the place of PyTorch's: what `load_grid_backbone` and `load_segmenter` give, with the
network itself in ONNX Runtime or OpenVINO. Images are prepared, and outputs read, by the same code.

The original (mrwu-mac/DIFNet, CVPR 2022) begins with feature files.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel

from modeling_difnet import GridFeatureBackbone, VisionBackbone
from modeling_difnet.grid_backbone_difnet import GridFeatureBackboneConfig, GridFeatureBackboneOutput
from modeling_difnet.pipeline_difnet import GridBackbone, Segmenter
from modeling_difnet.segmentation_difnet import PanopticSegmenter
from modeling_difnet.segmentation_models_difnet import SegmentationModel
from modeling_difnet.vision_backbone_difnet import ImageResizer, VisionBackboneConfig, as_pair

from ..files import printable
from ..runtime.vision import GRID_BACKBONE, SEGMENTATION_MODEL, VisionGraph

CPU = torch.device("cpu")


class ExportedGridFeatureBackbone(GridFeatureBackbone):
    """X-101 whose convolutions are a graph."""

    device = CPU
    dtype = torch.float32

    def __init__(self, config: GridFeatureBackboneConfig, graph: VisionGraph) -> None:
        PreTrainedModel.__init__(self, config)
        self.graph = graph

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> GridFeatureBackboneOutput:
        feature_map: Any = feature_map_of(self.graph, pixel_values)
        return GridFeatureBackboneOutput(feature_map=feature_map)


class ExportedVisionBackbone(VisionBackbone):
    """Any other vision model as a graph, which takes one image."""

    device = CPU
    dtype = torch.float32

    def __init__(self, config: VisionBackboneConfig, processor: Any, graph: VisionGraph) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.preprocess_image = ImageResizer(processor, config.image_size)
        self.graph = graph

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.cat([feature_map_of(self.graph, each) for each in pixel_values.split(1)])


class ExportedSegmentationModel:
    """A segmentation model or object detector whose outputs a graph computes."""

    device = CPU

    def __init__(self, config: Any, graph: VisionGraph) -> None:
        self.config = config
        self.graph = graph
        self.parameters_sha256 = graph.source["parameters_sha256"]

    def eval(self) -> ExportedSegmentationModel:
        return self

    def to(self, device: Any) -> ExportedSegmentationModel:
        return self

    def __call__(self, pixel_values: torch.Tensor, **inputs: Any) -> Any:
        mask = inputs.get("pixel_mask")
        if mask is not None and not mask.all():
            raise ValueError("the exported segmentation model takes images without padding")
        known = {name: inputs[name].numpy() for name in self.graph.source["inputs"] if name != "pixel_values"}
        outputs = self.graph(pixel_values=pixel_values.numpy(), **known)
        return SimpleNamespace(**{name: torch.from_numpy(each) for name, each in outputs.items()})


def feature_map_of(graph: VisionGraph, pixel_values: torch.Tensor) -> torch.Tensor:
    """The feature map `(B, C, h, w)` of prepared images."""
    return torch.from_numpy(graph(pixel_values=pixel_values.contiguous().numpy())["feature_map"])


def load_exported_backbone(
    folder: str | os.PathLike,
    grid_size: int | tuple[int, int] | None = None,
    num_threads: int | None = None,
) -> GridBackbone:
    """The grid backbone of a folder that `difnet export` made.

    Args:
        folder: the export.
        grid_size: cells along a side, or rows and columns; by default what the exported network had.
        num_threads: of the runtime.

    Raises:
        ImportError, ValueError: see `VisionGraph`.
    """
    graph = VisionGraph(folder, GRID_BACKBONE, num_threads)
    backbone: Any
    if graph.source["model_type"] == GridFeatureBackboneConfig.model_type:
        config = GridFeatureBackboneConfig.from_pretrained(folder)
        backbone = ExportedGridFeatureBackbone(config, graph)
        rows, columns = as_pair(config.grid_size if grid_size is None else grid_size)
        backbone.config.grid_size = rows if rows == columns else (rows, columns)
    else:
        said = graph.source["backbone"]
        pairs = {key: as_pair(said[key]) for key in ("grid_size", "image_size")}
        if grid_size is not None:
            pairs["grid_size"] = as_pair(grid_size)
        vision_config = VisionBackboneConfig(**{**said, **pairs})
        backbone = ExportedVisionBackbone(vision_config, AutoImageProcessor.from_pretrained(folder), graph)
    backbone.parameters_sha256 = graph.source["parameters_sha256"]
    backbone.precision, backbone.runtime = graph.precision, graph.format
    return backbone.eval()


def load_exported_segmenter(
    folder: str | os.PathLike,
    grid_size: int | tuple[int, int] = 7,
    class_names: Any = None,
    score_threshold: float | None = None,
    num_threads: int | None = None,
) -> Segmenter:
    """The segmentation model of a folder that `difnet export` made.

    Args:
        folder: the export.
        grid_size, class_names, score_threshold: see `load_segmenter`.
        num_threads: of the runtime.

    Raises:
        ImportError, ValueError: see `VisionGraph`; the classes are others than `class_names`.
    """
    graph = VisionGraph(folder, SEGMENTATION_MODEL, num_threads)
    said = graph.source
    if score_threshold is not None and said["kind"] != "boxes":
        raise ValueError(f"{printable(folder)}: a score threshold is of object detectors; leave it out")
    model: Any = ExportedSegmentationModel(AutoConfig.from_pretrained(folder), graph)
    processor = PanopticSegmenter.processor_of(os.fspath(folder), model.config.model_type)
    segmenter: Segmenter
    if said["is_coco_panoptic"] and class_names is None:
        segmenter = PanopticSegmenter(model, processor, grid_size)
    else:
        threshold = said["score_threshold"] if score_threshold is None else score_threshold
        segmenter = SegmentationModel(model, processor, said["kind"], grid_size, class_names, threshold)
    segmenter.precision, segmenter.runtime, segmenter.image_size = graph.precision, graph.format, said["image_size"]
    return segmenter


__all__ = ["ExportedSegmentationModel", "load_exported_backbone", "load_exported_segmenter"]
