"""The graph of an exported feature network in ONNX Runtime or OpenVINO: arrays in, arrays out.

The networks are those before the captioner: the grid backbone (the original reads its features from a file) and the
segmentation model. `difnet_transformers.vision.exported` puts them in the place of the PyTorch networks.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..command_line import describe
from ..files import printable, read_json
from .manifest import EXPORT_AGAIN, MANIFEST_NAME, read_manifest
from .sessions import OnnxSession, openvino_core

GRID_BACKBONE = "difnet grid backbone"
SEGMENTATION_MODEL = "difnet segmentation model"
KINDS = (GRID_BACKBONE, SEGMENTATION_MODEL)
VISION_PRECISIONS = {"onnx": ("fp32",), "openvino": ("fp32", "bf16", "int8")}
"""Precisions that each format has."""
VISION_GRAPHS = {"onnx": "network.onnx", "openvino": "network.xml"}
NUM_COMPILED = 4
"""Sizes of images for which a graph stays compiled. Each has the weights in memory once more."""


def exported_kind(folder: str | os.PathLike) -> str | None:
    """Which of `KINDS` a folder holds, by its manifest; `None` for anything else."""
    try:
        content = read_json(Path(folder, MANIFEST_NAME))
    except (OSError, ValueError):
        return None
    kind = content.get("kind") if isinstance(content, dict) else None
    return kind if kind in KINDS else None


class VisionGraph:
    """An exported feature network.

    Args:
        folder: made by `difnet export`.
        kind: what it must hold, one of `KINDS`.
        num_threads: of the runtime; by default as many as there are cores.

    Attributes:
        format, precision, source: of the manifest.

    Raises:
        ImportError: the runtime is not installed; the text names the extra.
        ValueError: the folder holds something else, or a file is missing, changed or refused by the runtime.
    """

    def __init__(self, folder: str | os.PathLike, kind: str, num_threads: int | None = None) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder, kind)
        self.format, self.precision, self.source = manifest.format, manifest.precision, manifest.source
        path = self.folder / VISION_GRAPHS[self.format]
        try:
            if self.format == "onnx":
                self.session: Any = OnnxSession(path, num_threads)
            else:
                # Sizes that are part of the graph's arithmetic do not survive bfloat16.
                self.session = SizedOpenVinoSession(path, self.precision, kind == SEGMENTATION_MODEL, num_threads)
        except ImportError:
            raise
        except Exception as error:  # each runtime has exceptions of its own
            reason = printable(" ".join(describe(error).split()), 200)
            raise ValueError(f"{printable(path, 300)}: cannot be loaded ({reason}); {EXPORT_AGAIN}") from error

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The graph's outputs by name, float32."""
        return self.session.run(inputs, self.source["outputs"])


class SizedOpenVinoSession:
    """A graph in OpenVINO on the CPU, compiled for every size of images or for each anew.

    Args:
        path: of the graph.
        precision: "fp32"; "bf16"; "int8", whose other layers are in bfloat16 where the processor has it.
        each_size: whether the graph is compiled for each size of its inputs; the last few stay in memory.
        num_threads: of the runtime; by default as many as there are cores.
    """

    def __init__(self, path: Path, precision: str, each_size: bool, num_threads: int | None) -> None:
        self.core = openvino_core()
        self.graph = self.core.read_model(path)
        self.each_size = each_size
        self.settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if precision != "int8":  # which OpenVINO combines with bfloat16 by itself
            self.settings["INFERENCE_PRECISION_HINT"] = "bf16" if precision == "bf16" else "f32"
        if num_threads is not None:
            self.settings["INFERENCE_NUM_THREADS"] = num_threads
        self.requests: OrderedDict[Any, Any] = OrderedDict()
        if not each_size:
            self._request({})

    def run(self, inputs: Mapping[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        """The named outputs for named inputs."""
        request = self._request({name: each.shape for name, each in inputs.items()})
        found = request.infer(dict(inputs), share_inputs=True)
        return {name: np.asarray(found[name], dtype=np.float32) for name in outputs}

    def _request(self, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        key = tuple(sorted(shapes.items())) if self.each_size else ()
        if key not in self.requests:
            if len(self.requests) == NUM_COMPILED:
                self.requests.popitem(last=False)
            graph = self.graph
            if self.each_size:
                graph = graph.clone()
                graph.reshape({name: list(shape) for name, shape in shapes.items()})
            self.requests[key] = self.core.compile_model(graph, "CPU", self.settings).create_infer_request()
        self.requests.move_to_end(key)
        return self.requests[key]


__all__ = ["GRID_BACKBONE", "KINDS", "SEGMENTATION_MODEL", "VISION_PRECISIONS", "VisionGraph", "exported_kind"]
