"""From a captioner to a folder that `DifnetRuntimeModel` loads: graphs, tokenizer, settings, manifest.

Precisions: fp32 gives the beams of the checkpoint token for token. bf16 is how OpenVINO computes graphs of fp32. int8
holds the weights of the matrix products in 8 bits, and quantises what they are multiplied with as they run: ONNX
Runtime by `quantize_dynamic`, OpenVINO by `nncf.compress_weights`. Embeddings stay fp32.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from modeling_difnet import DifnetForConditionalGeneration
from modeling_difnet.calibration_difnet import save_calibration
from modeling_difnet.pipeline_difnet import hash_of_parameters
from processing_difnet import DifnetProcessor

from .. import __version__
from ..checkpoints import load_captioner
from ..command_line import requires
from ..conversion import check_output
from ..files import atomic_output, printable
from ..runtime.manifest import GRAPH_FILES, PRECISIONS, is_exported, write_manifest
from ..runtime.model import DifnetRuntimeModel
from ..runtime.sessions import openvino_core
from ..runtime.settings import check_logits_settings
from .checks import check_export

RUNTIME_PACKAGES = {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}


def export_captioner(
    model: DifnetForConditionalGeneration,
    processor: DifnetProcessor,
    output: str | os.PathLike,
    *,
    format: str = "onnx",
    precision: str = "fp32",
    name: str | os.PathLike | None = None,
    overwrite: bool = False,
    save_recipe: Callable[[Path], object] | None = None,
) -> None:
    """Writes a captioner as graphs of another runtime. The folder appears whole or not at all.

    Args:
        model: the captioner, of any floating point type; the graphs are made of its weights in float32.
        processor: of the same checkpoint.
        output: the folder to make.
        format: "onnx" or "openvino".
        precision: "fp32", "int8", or with OpenVINO "bf16".
        name: what the manifest calls the checkpoint.
        overwrite: whether a folder that exists may be replaced.
        save_recipe: writes the options of the run to the path it is given.

    Raises:
        ImportError: a package is missing; the text names the extra.
        ValueError: the format does not have this precision, or the checkpoint stores settings of `generate` that
            `original_beam_search` of an exported captioner does not know.
        OSError: the folder exists, or cannot be written.
    """
    check_format(format, precision)
    check_logits_settings(model.generation_config.to_dict())
    from .graphs import decoding_step_graph, encoder_graph  # needs onnx

    with atomic_output(output, overwrite) as unfinished:
        unfinished.mkdir()
        with torch.no_grad(), tempfile.TemporaryDirectory(dir=unfinished.parent) as work:
            for make_graph, file in zip((encoder_graph, decoding_step_graph), GRAPH_FILES[format], strict=True):
                path = Path(work, "graph.onnx")
                path.write_bytes(make_graph(model).SerializeToString())
                if format == "onnx":
                    write_onnx(path, unfinished / file, precision)
                else:
                    write_openvino(path, unfinished / file, precision)
        write_settings(model, processor, unfinished)
        save_calibration(model, unfinished)
        if save_recipe is not None:
            save_recipe(unfinished / "recipe.yaml")
        source = {
            "name": None if name is None else os.fspath(name),
            "parameters_sha256": hash_of_parameters(model),
        }
        write_manifest(unfinished, format, precision, source, versions_of(format))


def export_checkpoint(
    name: str | os.PathLike,
    output: Path,
    *,
    format: str = "onnx",
    precision: str = "fp32",
    num_check_images: int = 8,
    overwrite: bool = False,
    save_recipe: Callable[[Path], object] | None = None,
) -> list[str]:
    """Exports a checkpoint, and checks the export; `difnet export`.

    Args:
        name: folder or repository of the checkpoint.
        output, format, precision, overwrite, save_recipe: as those of `export_captioner`.
        num_check_images: images whose random features both caption; 0 for no check.

    Returns:
        What was written and what the check found, in lines for a terminal.

    Raises:
        ImportError, OSError, ValueError: as `load_captioner` and `export_captioner`.
    """
    check_format(format, precision)
    check_output(output, overwrite, [os.fspath(name)])
    if is_exported(name):
        raise ValueError(f"{printable(name, 300)} is exported already: give the checkpoint that it was made of")
    model, processor = load_captioner(name, torch.float32)
    export_captioner(
        model,
        processor,
        output,
        format=format,
        precision=precision,
        name=name,
        overwrite=overwrite,
        save_recipe=save_recipe,
    )
    size = sum(path.stat().st_size for path in output.iterdir())
    lines = [f"Wrote {printable(output, 300)}: {format}, {precision}, {size / 1e6:,.1f} MB"]
    if num_check_images:
        check = check_export(model, processor, DifnetRuntimeModel.from_pretrained(output), num_check_images)
        lines += [
            f"Captions of {check.num_images} images of random features: {check.num_equal_best} of {check.num_images} "
            f"best ones and {check.num_equal} of {check.num_captions} beams are the checkpoint's",
            f"Log-probabilities of tokens differ by {check.log_prob_difference:.1e} at most",
        ]
    return lines


def check_format(format: str, precision: str) -> None:
    """Looks at what can be wrong before anything is loaded.

    Raises:
        ValueError: there is no such format, or it does not have the precision.
        ImportError: a package is missing.
    """
    if format not in PRECISIONS:
        raise ValueError(f"the format must be one of {', '.join(PRECISIONS)}, not {format!r}")
    if precision not in PRECISIONS[format]:
        reason = (
            ": ONNX Runtime has no bf16 on CPUs; openvino has it" if (format, precision) == ("onnx", "bf16") else ""
        )
        raise ValueError(f"{format} is exported in {', '.join(PRECISIONS[format])}, not {precision}{reason}")
    with requires(format):
        for package in RUNTIME_PACKAGES[format]:
            importlib.import_module(package)


def write_onnx(graph: Path, output: Path, precision: str) -> None:
    """Writes a graph for ONNX Runtime.

    Args:
        graph: in fp32.
        output: the file to write.
        precision: "fp32" or "int8".
    """
    if precision == "fp32":
        output.write_bytes(graph.read_bytes())
        return
    with requires("onnx"):
        from onnxruntime.quantization import QuantType, quantize_dynamic
    with quiet_logging():
        quantize_dynamic(graph, output, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)


def write_openvino(graph: Path, output: Path, precision: str) -> None:
    """Writes a graph for OpenVINO, `.xml` and `.bin`.

    Args:
        graph: in fp32.
        output: the `.xml` to write.
        precision: "fp32", "bf16" (the same file) or "int8".
    """
    with requires("openvino"):
        import openvino
    converted = openvino_core().read_model(graph)  # convert_model would send telemetry
    if precision == "int8":
        with requires("openvino"), quiet_logging():
            import nncf

            with contextlib.redirect_stdout(io.StringIO()):  # progress bars
                converted = nncf.compress_weights(
                    converted,
                    mode=nncf.CompressWeightsMode.INT8_SYM,
                    ignored_scope=nncf.IgnoredScope(types=["Gather"], validate=False),
                )
    openvino.save_model(converted, output, compress_to_fp16=False)


def write_settings(model: DifnetForConditionalGeneration, processor: DifnetProcessor, folder: Path) -> None:
    """Writes the files of a checkpoint but for weights and code."""
    processor.save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    model.config.to_json_file(folder / "config.json", use_diff=False)
    model.generation_config.to_json_file(folder / "generation_config.json")


def versions_of(format: str) -> dict[str, str]:
    """Versions of the packages that export a format, as far as they are installed."""
    versions = {"difnet-transformers": __version__}
    quantiser = ["nncf"] if format == "openvino" else []
    for name in ("torch", "transformers", *RUNTIME_PACKAGES[format], *quantiser):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@contextlib.contextmanager
def quiet_logging() -> Iterator[None]:
    """Silences what the quantisers say of each run."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
