"""The two networks that make features of images, in the runtime and precision that were asked for: from a checkpoint,
from an export that is made of it once (`--runtime`), or from a folder of `difnet export`.

The original (mrwu-mac/DIFNet, CVPR 2022) begins with feature files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch

from modeling_difnet import VisionBackbone
from modeling_difnet.feature_networks_difnet import (
    PRECISIONS,
    GridBackbone,
    Segmenter,
    has_native_bf16,
    hash_of_parameters,
    is_loadable,
    load_grid_backbone,
    load_segmenter,
    recorded_class_names,
    set_precision,
    with_precision,
)
from modeling_difnet.segmentation_models_difnet import SegmentationModel

from ..command_line import reason_of
from ..export.cache import load_or_export
from ..files import printable
from ..runtime.choice import AUTO, TORCH, Choice, choose_for_images
from ..runtime.vision import GRID_BACKBONE, SEGMENTATION_MODEL, VISION_PRECISIONS, exported_kind

CPU = torch.device("cpu")
BACKBONE_STAGE, SEGMENTATION_STAGE = "grid backbone", "segmentation model"

Loaded = TypeVar("Loaded")
Say = Callable[[str], object]


def print_line(line: str) -> None:
    """Prints to standard error, where it is no part of what a program gives to another."""
    print(line, file=sys.stderr)


def open_grid_backbone(
    name: str | None,
    device: str | torch.device,
    untrained: bool = False,
    seed: int = 0,
    *,
    precision: str | None = None,
    grid_size: int | tuple[int, int] | None = None,
    runtime: str | None = None,
    say: Say = print_line,
    **options: Any,
) -> GridBackbone:
    """`load_grid_backbone`, whose name may be a folder of `difnet export`, in any runtime.

    Args:
        name, device, untrained, seed, grid_size, options: see there.
        precision: see there; of an exported network none but its own, or "auto".
        runtime: one of `RUNTIMES`; by default PyTorch, or what the network was exported for. A network that does not
            export runs in PyTorch.
        say: gets a line on what was chosen, and why, where there was a choice.

    Raises:
        ImportError: the runtime is not installed.
        ValueError: see there; an exported network is asked for something else than it is.
    """
    if exported_kind_of(name, GRID_BACKBONE) is not None:
        from .exported import load_exported_backbone

        assert name is not None
        given = next((key for key, value in options.items() if value is not None), None)
        if given is not None:
            raise ValueError(f"{printable(name)}: is exported, and has its own {given}; leave it out")
        exported = load_exported_backbone(name, grid_size)
        check_own(name, precision, runtime, exported)
        if precision == AUTO or runtime is not None:
            say(as_exported(exported).line(BACKBONE_STAGE))
        return exported
    device = torch.device(device)
    options["grid_size"] = grid_size
    if runtime in (None, TORCH):
        if precision == AUTO:
            say(in_torch(device).line(BACKBONE_STAGE))
        return load_grid_backbone(name, device, untrained, seed, precision=precision, **options)
    choice = choose_for_images(runtime, precision, str(device), has_bf16_for(runtime, device))
    backbone = load_grid_backbone(name, CPU, untrained, seed, **options)
    found, choice = in_runtime(choice, partial(exported_backbone, backbone, name, choice))
    say(choice.line(BACKBONE_STAGE))
    if found is not None:
        return found
    backbone = with_precision(backbone, choice.precision or "fp32", device)
    backbone.to(device)  # type: ignore[arg-type]
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
    revision: str | None = None,
    runtime: str | None = None,
    say: Say = print_line,
) -> Segmenter:
    """`load_segmenter`, whose name may be a folder of `difnet export`, in any runtime.

    Args:
        name, device, untrained, seed, grid_size, class_names, score_threshold, revision: see there.
        precision, image_size: see there; of an exported model none but its own.
        runtime, say: as those of `open_grid_backbone`.

    Raises:
        ImportError, ValueError: as `open_grid_backbone`.
    """
    options: dict[str, Any] = {"class_names": class_names, "score_threshold": score_threshold}
    if exported_kind_of(name, SEGMENTATION_MODEL) is not None:
        from .exported import load_exported_segmenter

        assert name is not None
        exported = load_exported_segmenter(name, grid_size, **options)
        if image_size not in (None, exported.image_size):
            raise ValueError(
                f"{printable(name)}: is exported with its own size of images; leave --segmentation-size out"
            )
        check_own(name, precision, runtime, exported)
        if precision == AUTO or runtime is not None:
            say(as_exported(exported).line(SEGMENTATION_STAGE))
        return exported
    device = torch.device(device)
    options |= {"image_size": image_size, "revision": revision}
    if runtime in (None, TORCH):
        if precision == AUTO:
            say(in_torch(device).line(SEGMENTATION_STAGE))
        return load_segmenter(name, device, untrained, seed, grid_size, precision=precision, **options)
    segmenter = load_segmenter(name, CPU, untrained, seed, grid_size, **options)
    has_bf16 = has_bf16_for(runtime, device)
    choice = choose_for_images(runtime, precision, str(device), has_bf16, takes_one_size(segmenter))
    found, choice = in_runtime(choice, partial(exported_segmenter, segmenter, name, choice))
    say(choice.line(SEGMENTATION_STAGE))
    if found is not None:
        return found
    segmenter.model.to(device)
    set_precision(segmenter, choice.precision or "fp32", device)
    return segmenter


def open_networks(
    extractor: Any,
    device: str | torch.device,
    *,
    use_segmentation: bool,
    runtime: str | None = None,
    grid_backbone: str | None = None,
    layer: int | None = None,
    image_size: tuple[int, int] | None = None,
    precision: str | None = None,
    segmentation_model: str | None = None,
    segmentation_size: int | None = None,
    untrained: bool = False,
    seed: int = 0,
) -> tuple[GridBackbone | str | None, Segmenter | str | None]:
    """The networks of a captioner, as far as its pipeline does not load them itself: those in other runtimes.

    Args:
        extractor: the captioner's feature extractor, which records the networks that it was trained with.
        device: of networks in PyTorch.
        use_segmentation: whether the captioner has the second flow.
        runtime: one of `RUNTIMES`; with `None` or "torch" folders of `difnet export` are opened alone.
        grid_backbone, layer, image_size: of the grid backbone; by default what was recorded.
        precision: of both networks; by default what was recorded.
        segmentation_model, segmentation_size: of the segmentation model; by default what was recorded.
        untrained: lets small random networks stand in for those that are not named.
        seed: of these.

    Returns:
        Both networks, or what was given for them: the pipeline loads, or misses, what is none, and says why.

    Raises:
        ValueError: a network that was named cannot be loaded, or does not fit the captioner.
    """
    grids: dict[str, Any] = {"layer": layer, "image_size": image_size, "precision": precision}
    shares: dict[str, Any] = {"image_size": segmentation_size, "precision": precision}
    backbone: GridBackbone | str | None = grid_backbone
    segmenter: Segmenter | str | None = segmentation_model
    size = extractor.grid_size
    if runtime in (None, TORCH):
        if exported_kind_of(grid_backbone, GRID_BACKBONE):
            backbone = open_grid_backbone(grid_backbone, device, grid_size=size, runtime=runtime, **grids)
        if exported_kind_of(segmentation_model, SEGMENTATION_MODEL):
            segmenter = open_segmenter(segmentation_model, device, grid_size=size, runtime=runtime, **shares)
        return backbone, segmenter
    assert runtime is not None
    choose_for_images(runtime, precision, str(device), has_bf16_for(runtime, torch.device(device)))
    said = getattr(extractor, "grid_backbone", None) or {}
    if grid_backbone is not None or untrained:
        backbone = open_grid_backbone(grid_backbone, device, untrained, seed, grid_size=size, runtime=runtime, **grids)
    elif is_loadable(said):
        kinds = {"layer": int, "image_size": list, "precision": str, "revision": str}
        grids = recorded(said, kinds, runtime) | given(grids)
        with suppress(OSError, ValueError):  # which the pipeline meets too
            backbone = open_grid_backbone(said["name"], device, grid_size=size, runtime=runtime, **grids)
    if not use_segmentation:
        return backbone, segmenter
    said = getattr(extractor, "segmentation_model", None) or {}
    classes: dict[str, Any] = {"class_names": recorded_class_names(extractor), "runtime": runtime}
    if segmentation_model is not None or untrained:
        segmenter = open_segmenter(segmentation_model, device, untrained, seed, size, **classes, **shares)
    elif is_loadable(said):
        kinds = {"precision": str, "image_size": int, "revision": str}
        shares = recorded(said, kinds, runtime) | given(shares)
        with suppress(OSError, ValueError):
            segmenter = open_segmenter(said["name"], device, grid_size=size, **classes, **shares)
    threshold = said.get("score_threshold")
    if isinstance(segmenter, SegmentationModel) and isinstance(threshold, int | float):
        segmenter.score_threshold = threshold
    return backbone, segmenter


def recorded(said: Mapping[str, Any], kinds: Mapping[str, type], runtime: str) -> dict[str, Any]:
    """The options in a captioner's record of a network, without a precision that the runtime does not have."""
    options = {key: said[key] for key, kind in kinds.items() if isinstance(said.get(key), kind)}
    if options.get("precision") not in set(PRECISIONS).intersection(VISION_PRECISIONS.get(runtime, PRECISIONS)):
        options.pop("precision", None)
    return options


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not `None`."""
    return {key: value for key, value in options.items() if value is not None}


# Exports on the way


def in_runtime(choice: Choice, load: Callable[[], Loaded]) -> tuple[Loaded | None, Choice]:
    """A network in the runtime that was chosen, and the choice that remains.

    Args:
        choice: what should run it.
        load: loads it in a runtime other than PyTorch.

    Returns:
        What `load` gives; `None` for PyTorch, also where the network does not export or the export cannot be kept.
    """
    if choice.runtime == TORCH:
        return None, choice
    try:
        return load(), choice
    except (ValueError, OSError) as error:
        return None, choice._replace(runtime=TORCH, reason=f"not by {choice.runtime}: {reason_of(error)}")


def has_bf16_for(runtime: str | None, device: torch.device) -> bool:
    """Whether the device that a runtime uses computes in bfloat16."""
    return has_native_bf16(device if runtime == AUTO else CPU)


def exported_backbone(backbone: GridBackbone, name: str | None, choice: Choice) -> GridBackbone:
    """The export of a grid backbone, from the cache.

    Args:
        backbone: in fp32, as `load_grid_backbone` gives it.
        name: folder or repository that it came from.
        choice: runtime and precision.

    Raises:
        NotExportable, ImportError, OSError: see `load_or_export`.
    """
    from ..export.vision import export_grid_backbone, versions_of
    from .exported import load_exported_backbone

    backbone.parameters_sha256 = hash_of_parameters(backbone)
    key = {"parameters_sha256": backbone.parameters_sha256, "versions": versions_of(choice.runtime)}
    if isinstance(backbone, VisionBackbone):
        processor = getattr(backbone.preprocess_image, "processor", None)
        key |= {"config": asdict(backbone.config), "processor": settings_of(processor)}
    else:
        key["config"] = backbone.config.to_dict()
    options: dict[str, Any] = {
        "format": choice.runtime,
        "precision": choice.precision,
        "name": name,
        "overwrite": True,
    }
    return load_or_export(
        BACKBONE_STAGE,
        name,
        choice.runtime,
        choice.precision or "fp32",
        key,
        partial(export_grid_backbone, backbone, **options),
        partial(load_exported_backbone, grid_size=backbone.config.grid_size),
    )


def exported_segmenter(segmenter: Segmenter, name: str | None, choice: Choice) -> Segmenter:
    """The export of a segmentation model, from the cache; arguments and errors as those of `exported_backbone`."""
    from ..export.vision import export_segmenter, versions_of
    from .exported import load_exported_segmenter

    key = {
        "parameters_sha256": hash_of_parameters(segmenter.model),
        "versions": versions_of(choice.runtime),
        "config": segmenter.model.config.to_dict(),
        "processor": settings_of(segmenter.processor),
        "kind": [type(segmenter).__name__, segmenter.kind],
        "image_size": segmenter.image_size,
    }
    options: dict[str, Any] = {
        "format": choice.runtime,
        "precision": choice.precision,
        "name": name,
        "overwrite": True,
    }
    own_classes = threshold = None
    if isinstance(segmenter, SegmentationModel):
        own_classes = segmenter.class_names
        threshold = segmenter.score_threshold if segmenter.kind == "boxes" else None
    exported = load_or_export(
        SEGMENTATION_STAGE,
        name,
        choice.runtime,
        choice.precision or "fp32",
        key,
        partial(export_segmenter, segmenter, **options),
        partial(
            load_exported_segmenter,
            grid_size=segmenter.grid_size,
            class_names=own_classes,
            score_threshold=threshold,
        ),
    )
    # The commit that the features record is known of what came from the Hub alone.
    exported.model.config._commit_hash = getattr(segmenter.model.config, "_commit_hash", None)
    return exported


def settings_of(processor: Any) -> Any:
    """What decides about the preprocessing, for a key of the cache."""
    return processor.to_dict() if hasattr(processor, "to_dict") else None


def takes_one_size(segmenter: Segmenter) -> bool:
    """Whether a segmentation model sees images of all shapes in one size."""
    from ..export.vision import EXAMPLE_SIZES, noise

    first, second = (segmenter.prepare(noise(size))["pixel_values"].shape for size in EXAMPLE_SIZES)
    return first == second


# Messages


def exported_kind_of(name: str | os.PathLike | None, wanted: str) -> str | None:
    """`wanted` where a name is the folder of such an export, `None` where it is none.

    Raises:
        ValueError: it is one of the other network.
    """
    kind = None if name is None else exported_kind(name)
    if kind not in (None, wanted):
        raise ValueError(f"{printable(name)}: an exported {kind[7:]}, not a {wanted[7:]}")
    return kind


def check_own(name: str, precision: str | None, runtime: str | None, exported: Any) -> None:
    """Raises `ValueError` where an exported network is asked for another precision or runtime than it has."""
    if precision not in (None, AUTO, exported.precision):
        raise ValueError(
            f"{printable(name)}: is exported in {exported.precision}; leave --precision out, or export it in "
            f"{precision}"
        )
    if runtime not in (None, AUTO, exported.runtime):
        raise ValueError(
            f"{printable(name)}: is exported to {exported.runtime}; leave --runtime out, or give the checkpoint"
        )


def as_exported(exported: Any) -> Choice:
    return Choice(exported.runtime, exported.precision, "as it was exported")


def in_torch(device: torch.device) -> Choice:
    """What the precision "auto" chooses without another runtime."""
    is_native = has_native_bf16(device)
    reason = f"{'' if is_native else 'no '}native bfloat16 on {device}"
    return Choice(TORCH, "bf16" if is_native else "fp32", reason)


def print_choices(precision: str | None, device: torch.device, before: Any, after: Any) -> None:
    """Says what "auto" has chosen for networks that a pipeline has loaded itself.

    Args:
        precision: that was asked for; nothing is printed unless it is "auto".
        device: of the pipeline.
        before: both networks, as `open_networks` gave them.
        after: both networks, as the pipeline has them.
    """
    for stage, given_network, network in zip((BACKBONE_STAGE, SEGMENTATION_STAGE), before, after, strict=True):
        if precision == AUTO and network is not None and network is not given_network and network.runtime is None:
            print_line(in_torch(device).line(stage))
