"""From a grid backbone or a segmentation model to a folder that other runtimes load: one graph, settings, manifest.

The graph holds the network alone, `(B, 3, h, w)` to its feature map or its logits; images are prepared, features
pooled and masks read by the code that does it for PyTorch. Precisions: fp32; bf16, which is how OpenVINO computes a
graph of fp32; int8, whose products are quantised by NNCF after it has seen calibration images.

The original (mrwu-mac/DIFNet, CVPR 2022) has neither network.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from modeling_difnet import GridFeatureBackbone, VisionBackbone
from modeling_difnet.fast_segmentation_difnet import SAMPLING
from modeling_difnet.images_difnet import Image, one_line, open_image
from modeling_difnet.pipeline_difnet import (
    GridBackbone,
    Segmenter,
    hash_of_parameters,
    load_grid_backbone,
    load_segmenter,
)
from modeling_difnet.segmentation_difnet import PanopticSegmenter
from modeling_difnet.vision_backbone_difnet import ImageResizer

from ..command_line import describe, requires
from ..data.image_files import find_images
from ..files import atomic_output
from ..runtime.manifest import write_manifest
from ..runtime.sessions import openvino_core
from ..runtime.vision import GRID_BACKBONE, SEGMENTATION_MODEL, VISION_GRAPHS, VISION_PRECISIONS
from .captioner import quiet_logging, versions_of

OUTPUTS = ("class_queries_logits", "masks_queries_logits", "logits", "pred_boxes", "pred_masks")
"""Outputs of segmentation models and detectors that their processors read."""
EXAMPLE_SIZES = ((640, 480), (427, 640))  # width and height of the image that is traced, and of the one to check
NUM_CALIBRATION_IMAGES = 16
MAX_DIFFERENCE = 1e-3  # of the norm, between the graph in fp32 and PyTorch


class FeatureMap(nn.Module):
    """A grid backbone as a function of tensors."""

    def __init__(self, backbone: GridBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs: Any = self.backbone(*inputs)
        return (outputs.feature_map if isinstance(self.backbone, GridFeatureBackbone) else outputs,)


class SegmentationOutputs(nn.Module):
    """A segmentation model as a function of tensors, whose names are `inputs`."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(**dict(zip(self.inputs, inputs, strict=True)))
        return tuple(outputs[name] for name in self.outputs)


def export_grid_backbone(
    backbone: GridBackbone,
    output: str | os.PathLike,
    *,
    format: str = "openvino",
    precision: str = "fp32",
    name: str | os.PathLike | None = None,
    calibration: Sequence[Any] = (),
    overwrite: bool = False,
    save_recipe: Callable[[Path], object] | None = None,
) -> None:
    """Writes a grid backbone as a graph of another runtime. The folder appears whole or not at all.

    Args:
        backbone: in fp32, as `load_grid_backbone` gives it.
        output: the folder to make.
        format: "onnx" or "openvino".
        precision: "fp32", or with OpenVINO "bf16" or "int8".
        name: what the manifest calls the network.
        calibration: RGB images for int8; eight are enough.
        overwrite: whether a folder that exists may be replaced.
        save_recipe: writes the options of the run to the path it is given.

    Raises:
        ImportError: a package is missing; the text names the extra.
        ValueError: the format does not have this precision, int8 has no images, or the network's operators do not
            export.
        OSError: the folder exists, or cannot be written.
    """
    check_vision_format(format, precision, calibration)
    source: dict[str, Any] = {"inputs": ["pixel_values"], "outputs": ["feature_map"]}
    source |= {"name": None if name is None else os.fspath(name), "model_type": backbone.config.model_type}
    source["parameters_sha256"] = backbone.parameters_sha256 or hash_of_parameters(backbone)
    if isinstance(backbone, VisionBackbone):
        if not isinstance(backbone.preprocess_image, ImageResizer):
            raise ValueError(f"{name}: a network of one's own has its own preprocessing, which is not exported")
        source["backbone"] = asdict(backbone.config)
    first, second = (backbone.preprocess(noise(size)) for size in EXAMPLE_SIZES)
    moving = {0: "batch", 2: "height", 3: "width"} if isinstance(backbone, GridFeatureBackbone) else {}

    def write_settings(folder: Path) -> None:
        if isinstance(backbone, VisionBackbone):
            resizer: Any = backbone.preprocess_image
            resizer.processor.save_pretrained(folder)
        else:
            backbone.config.save_pretrained(folder)
        if save_recipe is not None:
            save_recipe(folder / "recipe.yaml")

    write_export(
        FeatureMap(backbone).eval(),
        {"pixel_values": first},
        {"pixel_values": second},
        {"pixel_values": moving},
        Path(output),
        GRID_BACKBONE,
        format,
        precision,
        source,
        ({"pixel_values": backbone.preprocess(image).numpy()} for image in calibration),
        write_settings,
        overwrite,
    )


def export_segmenter(
    segmenter: Segmenter,
    output: str | os.PathLike,
    *,
    format: str = "openvino",
    precision: str = "fp32",
    name: str | os.PathLike | None = None,
    calibration: Sequence[Any] = (),
    overwrite: bool = False,
    save_recipe: Callable[[Path], object] | None = None,
) -> None:
    """Writes a segmentation model or object detector as a graph of another runtime.

    Args:
        segmenter: in fp32, as `load_segmenter` gives it without a precision.
        output, format, precision, name, calibration, overwrite, save_recipe: see `export_grid_backbone`.

    Raises:
        ImportError, ValueError, OSError: as `export_grid_backbone`.
    """
    check_vision_format(format, precision, calibration)
    model, processor = segmenter.model, segmenter.processor
    if getattr(processor, "do_split_image", False):
        raise ValueError(f"{name}: looks at an image in several parts, and is not exported")

    def inputs_of(image: Any) -> dict[str, torch.Tensor]:
        inputs = segmenter.prepare(image)
        if "pixel_mask" in inputs and not inputs["pixel_mask"].all():
            raise ValueError(f"{name}: pads images, and is not exported")
        return {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor) and key != "pixel_mask"}

    first, second = (inputs_of(noise(size)) for size in EXAMPLE_SIZES)
    with torch.no_grad():
        found = model(**first)
    outputs = [key for key in OUTPUTS if found.get(key) is not None]
    source = {
        "name": None if name is None else os.fspath(name),
        "model_type": model.config.model_type,
        "parameters_sha256": hash_of_parameters(model),
        "inputs": list(first),
        "outputs": outputs,
        "kind": segmenter.kind,
        "is_coco_panoptic": isinstance(segmenter, PanopticSegmenter),
        "score_threshold": getattr(segmenter, "score_threshold", 0.5),
        "image_size": segmenter.image_size,
    }
    changes = {
        key: {place: f"{key}_{place}" for place in range(value.ndim) if value.shape[place] != second[key].shape[place]}
        for key, value in first.items()
    }

    def write_settings(folder: Path) -> None:
        processor.save_pretrained(folder)
        model.config.save_pretrained(folder)
        if save_recipe is not None:
            save_recipe(folder / "recipe.yaml")

    write_export(
        SegmentationOutputs(model, list(first), outputs).eval(),
        first,
        second,
        changes,
        Path(output),
        SEGMENTATION_MODEL,
        format,
        precision,
        source,
        ({key: value.numpy() for key, value in inputs_of(image).items()} for image in calibration),
        write_settings,
        overwrite,
    )


def check_vision_format(format: str, precision: str, calibration: Sequence[Any]) -> None:
    """Raises ValueError unless a format has a precision, and int8 its images."""
    if format not in VISION_PRECISIONS:
        raise ValueError(f"the format must be one of {', '.join(VISION_PRECISIONS)}, not {format!r}")
    if precision not in VISION_PRECISIONS[format]:
        others = "; openvino has it" if precision in VISION_PRECISIONS["openvino"] else ""
        raise ValueError(
            f"{format}: networks of images are exported in {', '.join(VISION_PRECISIONS[format])}, not "
            f"{precision}{others}"
        )
    if precision == "int8" and not calibration:
        raise ValueError("int8 needs calibration images: give some that are like those to caption")


def noise(size: tuple[int, int]) -> Any:
    """An RGB image with something to see at every scale."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse) + rng.normal(0, 8, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_export(
    network: nn.Module,
    example: Mapping[str, torch.Tensor],
    other: Mapping[str, torch.Tensor],
    changes: Mapping[str, Mapping[int, str]],
    output: Path,
    kind: str,
    format: str,
    precision: str,
    source: Mapping[str, Any],
    calibration: Iterator[dict[str, np.ndarray]],
    write_settings: Callable[[Path], None],
    overwrite: bool,
) -> None:
    """Traces a network, compares the graph with it, and writes the folder.

    Args:
        network: a function of `example`.
        example, other: inputs of two sizes, the second for the comparison.
        changes: by input the dimensions that may change.
        calibration: inputs for int8.
        write_settings: writes what loading needs beside the graph.
    """
    with atomic_output(output, overwrite) as unfinished:
        unfinished.mkdir()
        with torch.no_grad(), tempfile.TemporaryDirectory(dir=unfinished.parent) as work:
            graph = Path(work, "graph.onnx")
            trace(network, example, changes, source["outputs"], graph, str(source["name"]))
            check_graph(network, other, graph, source["outputs"], str(source["name"]), format)
            path = unfinished / VISION_GRAPHS[format]
            if format == "onnx":
                path.write_bytes(graph.read_bytes())
            else:
                write_openvino_network(graph, path, precision, kind == SEGMENTATION_MODEL, calibration)
        write_settings(unfinished)
        for file in unfinished.glob("*.py"):
            file.unlink()
        write_manifest(unfinished, format, precision, source, versions_of(format), kind)


def trace(
    network: nn.Module,
    example: Mapping[str, torch.Tensor],
    changes: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
    path: Path,
    name: str,
) -> None:
    """Writes the graph of a network as an ONNX file.

    Raises:
        ValueError: an operator does not export; the text says what the exporter said.
    """
    with requires("onnx"):
        import onnx
        import onnxscript  # noqa: F401  (the exporter's)
    dims = {key: dict.fromkeys(places, torch.export.Dim.DYNAMIC) for key, places in changes.items()}
    try:
        with (
            warnings.catch_warnings(),
            quiet_logging(),
            exportable(network),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),  # where tracing fails, the whole network
        ):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                tuple(example.values()),
                dynamo=True,
                optimize=True,
                verbose=False,
                dynamic_shapes=(tuple(dims.values()),),
                input_names=list(example),
                output_names=list(outputs),
            )
        assert program is not None
        onnx.save(program.model_proto, path)
    except Exception as error:  # of the exporter and of all that it calls
        reason = one_line(" ".join(describe(error.__cause__ or error).split()), 300)
        raise ValueError(f"{name}: this network does not export ({reason}); use it in PyTorch") from error


@contextlib.contextmanager
def exportable(network: nn.Module) -> Iterator[None]:
    """Equal forms of two functions while a network is traced.

    The exporter makes a constant of the length of `linspace`. Deformable attention writes samples as `(points, Q)`,
    so that their sum runs along whole rows, one level after the other. EoMT reads from a buffer whether queries are
    masked, on which a graph cannot depend.
    """

    def linspace(start: float, end: float, steps: int, **options: Any) -> torch.Tensor:
        positions = start + torch.arange(max(steps, 2), **options) * ((end - start) / max(steps - 1, 1))
        return positions[:steps]

    sources = {sys.modules[type(module).__module__] for module in network.modules()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("torch.linspace", linspace))
        for source in sources:
            if hasattr(source, SAMPLING):
                stack.enter_context(mock.patch.object(source, SAMPLING, sampled_by_level))
        for module in network.modules():
            if "attn_mask_probs" in module._buffers:
                buffer = module._buffers.pop("attn_mask_probs")
                stack.callback(module.register_buffer, "attn_mask_probs", buffer)
                assert buffer is not None
                module.__dict__["attn_mask_probs"] = buffer.tolist()
                stack.callback(module.__dict__.pop, "attn_mask_probs")
        yield


def sampled_by_level(
    value: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """`deformable_attention` by `grid_sample`; the arguments are the same."""
    batch_size, _, num_heads, head_size = value.shape
    num_queries, num_levels, num_points = sampling_locations.shape[1], *sampling_locations.shape[3:5]
    values = value.split([height * width for height, width in spatial_shapes], dim=1)
    grids = (2 * sampling_locations - 1).permute(0, 2, 3, 4, 1, 5).flatten(0, 1)  # (B * heads, levels, points, Q, 2)
    weights = attention_weights.permute(0, 2, 3, 4, 1).flatten(0, 1)  # (B * heads, levels, points, Q)
    total = None
    for level, (height, width) in enumerate(spatial_shapes[:num_levels]):
        cells = values[level].permute(0, 2, 3, 1).reshape(batch_size * num_heads, head_size, height, width)
        samples = F.grid_sample(cells, grids[:, level], mode="bilinear", padding_mode="zeros", align_corners=False)
        samples = samples * weights[:, level, None]  # (B * heads, head size, points, Q)
        for point in range(num_points):
            total = samples[:, :, point] if total is None else total + samples[:, :, point]
    assert total is not None
    return total.reshape(batch_size, num_heads * head_size, num_queries).transpose(1, 2)


def check_graph(
    network: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    path: Path,
    outputs: Sequence[str],
    name: str,
    format: str,
) -> None:
    """Compares a graph with its network on inputs of another size than it was traced with.

    Raises:
        ValueError: it gives something else, or fails there.
    """
    expected = network(*inputs.values())
    arrays = {key: value.numpy() for key, value in inputs.items()}
    try:
        if format == "onnx":
            with requires("onnx"):
                import onnxruntime
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # fatal: an error is raised too
            found = onnxruntime.InferenceSession(path, options).run(list(outputs), arrays)
        else:
            core = openvino_core()
            graph = core.read_model(path)
            graph.reshape({key: list(value.shape) for key, value in arrays.items()})
            results = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(arrays)
            found = [results[key] for key in outputs]
    except ImportError:
        raise
    except Exception as error:  # each runtime has exceptions of its own
        reason = one_line(" ".join(describe(error).split()), 300)
        raise ValueError(f"{name}: the exported graph does not run ({reason}); use it in PyTorch") from error
    for key, array, tensor in zip(outputs, found, expected, strict=True):
        if array.shape != tuple(tensor.shape):
            raise ValueError(f"{name}: the exported graph takes images of one size alone; use it in PyTorch")
        difference = np.linalg.norm(array - tensor.numpy()) / max(float(tensor.norm()), 1e-12)
        if not difference <= MAX_DIFFERENCE:
            raise ValueError(f"{name}: {key} of the exported graph differs by {difference:.1e}; use it in PyTorch")


def write_openvino_network(
    graph: Path, output: Path, precision: str, is_transformer: bool, calibration: Iterator[dict[str, np.ndarray]]
) -> None:
    """Writes a graph for OpenVINO, `.xml` and `.bin`."""
    with requires("openvino"):
        import openvino
    converted = openvino_core().read_model(graph)  # convert_model would send telemetry
    if precision == "int8":
        with requires("openvino"), quiet_logging():
            import nncf

            images = list(calibration)
            with contextlib.redirect_stdout(io.StringIO()):  # progress bars
                converted = nncf.quantize(
                    converted,
                    nncf.Dataset(images),
                    preset=nncf.QuantizationPreset.MIXED,
                    subset_size=len(images),
                    model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
                )
    openvino.save_model(converted, output, compress_to_fp16=False)


def export_feature_network(
    output: Path,
    *,
    grid_backbone: str | None = None,
    segmentation_model: str | None = None,
    layer: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    segmentation_size: int | None = None,
    format: str = "openvino",
    precision: str = "fp32",
    calibration_images: Sequence[str] = (),
    overwrite: bool = False,
    save_recipe: Callable[[Path], object] | None = None,
) -> None:
    """Exports one of the networks that make features of images; `difnet export`.

    Args:
        output, format, precision, overwrite: see `export_grid_backbone`.
        grid_backbone, segmentation_model: folder or repository; one of them.
        layer, image_size: of the grid backbone, see `load_grid_backbone`.
        segmentation_size: of the segmentation model, see `load_segmenter`.
        calibration_images: files, and folders of them; at most `NUM_CALIBRATION_IMAGES` of them are used, spread over
            all.
        save_recipe: writes the options of the run to the path it is given.

    Raises:
        ImportError, ValueError, OSError: as `export_grid_backbone`, `load_grid_backbone` and `load_segmenter`.
    """
    check_vision_format(format, precision, calibration_images)
    images = []
    paths = find_images(calibration_images) if calibration_images else []
    for path in paths[:: max(1, len(paths) // NUM_CALIBRATION_IMAGES)][:NUM_CALIBRATION_IMAGES]:
        images.append(open_image(path))
    options: dict[str, Any] = {"format": format, "precision": precision, "calibration": images}
    options |= {"overwrite": overwrite, "save_recipe": save_recipe}
    if grid_backbone is not None:
        backbone = load_grid_backbone(grid_backbone, layer=layer, image_size=image_size)
        export_grid_backbone(backbone, output, name=grid_backbone, **options)
    else:
        segmenter = load_segmenter(segmentation_model, image_size=segmentation_size)
        export_segmenter(segmenter, output, name=segmentation_model, **options)


__all__ = ["export_feature_network", "export_grid_backbone", "export_segmenter"]
