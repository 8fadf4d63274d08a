"""The two networks that make features of images, from a checkpoint or from what `difnet export` made of one.

The original (mrwu-mac/DIFNet, CVPR 2022) begins with feature files.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from modeling_difnet.pipeline_difnet import (
    GridBackbone,
    Segmenter,
    has_native_bf16,
    load_grid_backbone,
    load_segmenter,
)

from ..files import printable
from ..runtime.vision import GRID_BACKBONE, SEGMENTATION_MODEL, exported_kind

AUTO = "auto"


def open_grid_backbone(
    name: str | None,
    device: str | torch.device,
    untrained: bool = False,
    seed: int = 0,
    *,
    precision: str | None = None,
    grid_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> GridBackbone:
    """`load_grid_backbone`, whose name may be a folder of `difnet export`.

    Args:
        name, device, untrained, seed, grid_size, options: see there.
        precision: see there; of an exported network none but its own, or "auto".

    Raises:
        ImportError: the runtime of an exported network is not installed.
        ValueError: see there; an exported network is asked for something else than it is.
    """
    if exported_kind_of(name, GRID_BACKBONE) is None:
        return load_grid_backbone(name, device, untrained, seed, precision=precision, grid_size=grid_size, **options)
    from .exported import load_exported_backbone

    assert name is not None
    given = next((key for key, value in options.items() if value is not None), None)
    if given is not None:
        raise ValueError(f"{printable(name)}: is exported, and has its own {given}; leave it out")
    backbone = load_exported_backbone(name, grid_size)
    check_own_precision(name, precision, backbone.precision)
    return backbone


def open_segmenter(
    name: str | None,
    device: str | torch.device,
    untrained: bool = False,
    seed: int = 0,
    grid_size: int | tuple[int, int] = 7,
    *,
    precision: str | None = None,
    image_size: int | None = None,
    class_names: Any = None,
    score_threshold: float | None = None,
) -> Segmenter:
    """`load_segmenter`, whose name may be a folder of `difnet export`.

    Args:
        name, device, untrained, seed, grid_size, class_names, score_threshold: see there.
        precision, image_size: see there; of an exported model none but its own.

    Raises:
        ImportError, ValueError: as `open_grid_backbone`.
    """
    options: dict[str, Any] = {"class_names": class_names, "score_threshold": score_threshold}
    if exported_kind_of(name, SEGMENTATION_MODEL) is None:
        return load_segmenter(
            name, device, untrained, seed, grid_size, precision=precision, image_size=image_size, **options
        )
    from .exported import load_exported_segmenter

    assert name is not None
    segmenter = load_exported_segmenter(name, grid_size, **options)
    if image_size not in (None, segmenter.image_size):
        raise ValueError(f"{printable(name)}: is exported with its own size of images; leave --segmentation-size out")
    check_own_precision(name, precision, segmenter.precision)
    return segmenter


def exported_kind_of(name: str | None, wanted: str) -> str | None:
    """`wanted` where a name is the folder of such an export, `None` where it is none.

    Raises:
        ValueError: it is one of the other network.
    """
    kind = None if name is None else exported_kind(name)
    if kind not in (None, wanted):
        raise ValueError(f"{printable(name)}: an exported {kind[7:]}, not a {wanted[7:]}")
    return kind


def check_own_precision(name: str, precision: str | None, own: str | None) -> None:
    """Raises `ValueError` where an exported network is asked for another precision than it has."""
    if precision not in (None, AUTO, own):
        raise ValueError(
            f"{printable(name)}: is exported in {own}; leave --precision out, or export it in {precision}"
        )


def print_choices(
    precision: str | None,
    device: torch.device,
    backbone: GridBackbone | None,
    segmenter: Segmenter | None,
) -> None:
    """Says what "auto" has chosen for each network, and why.

    Args:
        precision: that was asked for; nothing is printed unless it is "auto".
        device: of the networks in PyTorch.
        backbone, segmenter: the loaded networks.
    """
    if precision != AUTO:
        return
    reason = f"{'' if has_native_bf16(device) else 'no '}native bfloat16 on {device}"
    for stage, network in (("grid backbone", backbone), ("segmentation model", segmenter)):
        if network is None:
            continue
        runtime = getattr(network, "runtime", None)
        if runtime is not None:
            print(f"{stage}: {network.precision} by {runtime}, as it was exported", file=sys.stderr)
            continue
        chosen = "bf16" if has_native_bf16(device) else "fp32"
        print(f"{stage}: {chosen} by torch, {reason}", file=sys.stderr)
