"""Graphs in ONNX Runtime and OpenVINO, behind one call: named arrays in, named arrays out."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..command_line import describe, requires
from ..files import printable
from .manifest import EXPORT_AGAIN

# Weights of int8 meet activations that are quantised in groups of so many numbers.
DYNAMIC_QUANTIZATION_GROUP_SIZE = 128


class Session(Protocol):
    """A loaded graph."""

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """The named outputs. They may be overwritten by the next run."""
        ...


class OnnxSession:
    """A graph in ONNX Runtime."""

    def __init__(self, path: Path, num_threads: int | None) -> None:
        with requires("onnx"):
            import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0  # 0: as many as there are cores
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        return dict(zip(outputs, self.session.run(list(outputs), dict(inputs)), strict=True))


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's core, one for the process and until its end.

    With the last core the CPU plugin is unloaded, and a process that has used it crashes at the next Ctrl-C.
    """
    with requires("openvino"):
        import openvino
    return openvino.Core()


class OpenVinoSession:
    """A graph in OpenVINO, on the CPU."""

    def __init__(self, path: Path, precision: str, num_threads: int | None) -> None:
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            # OpenVINO computes in bfloat16 by itself where the processor has it.
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        }
        if precision == "int8":
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = DYNAMIC_QUANTIZATION_GROUP_SIZE
        if num_threads is not None:
            settings["INFERENCE_NUM_THREADS"] = num_threads
        compiled = openvino_core().compile_model(str(path), "CPU", settings)
        self.request = compiled.create_infer_request()
        self.places = {name: place for place, each in enumerate(compiled.outputs) for name in each.names}

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        # Neither inputs nor outputs are copied.
        found = self.request.infer(dict(inputs), share_inputs=True, share_outputs=True)
        return {name: found[self.places[name]] for name in outputs}


def load_session(path: Path, format: str, precision: str, num_threads: int | None = None) -> Session:
    """Loads a graph.

    Args:
        path: of the graph.
        format: "onnx" or "openvino".
        precision: of the manifest.
        num_threads: of the runtime; by default as many as there are cores.

    Raises:
        ImportError: the runtime is not installed; the text names the extra.
        ValueError: the runtime refuses the graph.
    """
    try:
        if format == "onnx":
            return OnnxSession(path, num_threads)
        return OpenVinoSession(path, precision, num_threads)
    except ImportError:
        raise
    except Exception as error:  # each runtime has exceptions of its own
        reason = " ".join(describe(error).split())
        raise ValueError(
            f"{printable(path, 300)}: cannot be loaded ({printable(reason, 200)}); {EXPORT_AGAIN}"
        ) from error
