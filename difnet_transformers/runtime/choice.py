"""Which runtime runs a network, and in which precision: what was asked for, or what is fastest on this machine.

Times that decide: docs/speed.md and docs/quantization.md. The original (mrwu-mac/DIFNet, CVPR 2022) has one runtime.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from typing import NamedTuple

from .manifest import PRECISIONS
from .vision import VISION_PRECISIONS

AUTO = "auto"
TORCH = "torch"
RUNTIMES = (TORCH, "onnx", "openvino", AUTO)
EXPORTING_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}


class Choice(NamedTuple):
    """What runs a network.

    Args:
        runtime: "torch", "onnx" or "openvino".
        precision: "fp32", "bf16" or "int8"; `None` where the checkpoint decides.
        reason: in words that follow "bf16 by openvino, ".
    """

    runtime: str
    precision: str | None
    reason: str

    def line(self, stage: str) -> str:
        """What runs a network, and why: "grid backbone: bf16 by openvino, ..".

        Args:
            stage: what the network is.
        """
        return f"{stage}: {'' if self.precision is None else f'{self.precision} '}by {self.runtime}, {self.reason}"


def is_installed(runtime: str) -> bool:
    """Whether the packages that export to a runtime, and run it, can be imported."""
    return all(find_spec(package) is not None for package in EXPORTING_PACKAGES[runtime])


def choose_for_images(
    runtime: str, precision: str | None, device: str, has_bf16: bool, one_size: bool = True
) -> Choice:
    """What runs a grid backbone or a segmentation model.

    Args:
        runtime: "onnx", "openvino" or "auto".
        precision: "fp32", "bf16", "auto" or `None`, which is fp32: the runtimes are equal in it up to rounding.
        device: of PyTorch, such as "cpu" or "cuda:0"; other runtimes use the CPU.
        has_bf16: whether the device that counts has native bfloat16: with "auto" that of PyTorch, else the CPU.
        one_size: whether a graph that is compiled once takes all images.

    Raises:
        ValueError: the runtime does not have the precision.
    """
    if runtime != AUTO:
        return asked_for(runtime, precision, VISION_PRECISIONS[runtime], has_bf16)
    chosen = resolved(precision, has_bf16)
    native = f"{'' if has_bf16 else 'no '}native bfloat16 on {device}"
    if device != "cpu":
        return Choice(TORCH, chosen, f"which alone runs on {device}; {native}")
    if not is_installed("openvino"):  # ONNX Runtime is slower than PyTorch's faster forms
        return Choice(TORCH, chosen, f"as openvino is not installed; {native}")
    if not one_size:
        return Choice(TORCH, chosen, f"as openvino would compile it for each size of images; {native}")
    return Choice("openvino", chosen, f"the fastest on a CPU; {native}")


def choose_for_captioner(
    runtime: str, precision: str | None, device: str, has_bf16: bool, original_search: bool = True
) -> Choice:
    """What runs a captioner.

    Args:
        runtime, precision, device, has_bf16: as those of `choose_for_images`.
        original_search: whether captions are decoded by `original_beam_search`, the only one of other runtimes.

    Returns:
        The choice; in PyTorch of the precision that the checkpoint is loaded in.

    Raises:
        ValueError: the runtime does not have the precision.
    """
    if runtime != AUTO:
        return asked_for(runtime, precision, PRECISIONS[runtime], has_bf16)
    if device != "cpu":
        return Choice(TORCH, None, f"which alone runs on {device}")
    if not original_search:
        return Choice(TORCH, None, "which alone has the beam search of Transformers")
    if resolved(precision, has_bf16) == "fp32":
        return Choice(TORCH, None, "which is as fast as others in fp32")
    if not is_installed("openvino"):
        return Choice(TORCH, None, "as openvino is not installed")
    return Choice("openvino", "bf16", f"{'' if has_bf16 else 'no '}native bfloat16 on {device}")


def asked_for(runtime: str, precision: str | None, precisions: Collection[str], has_bf16: bool) -> Choice:
    """The runtime that was named, in the asked precision or, of "auto", in the best that it has.

    Raises:
        ValueError: it does not have the precision.
    """
    chosen = resolved(precision, has_bf16 and "bf16" in precisions)
    if chosen not in precisions:
        raise ValueError(f"--runtime {runtime} has no {chosen}; openvino has it")
    return Choice(runtime, chosen, "as --runtime says")


def resolved(precision: str | None, has_bf16: bool) -> str:
    """The precision that "auto" or `None` stands for."""
    if precision == AUTO:
        return "bf16" if has_bf16 else "fp32"
    return precision or "fp32"


__all__ = ["AUTO", "RUNTIMES", "TORCH", "Choice", "choose_for_captioner", "choose_for_images", "is_installed"]
