"""The captioners of a server, loaded once, their feature networks shared where they are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoints import checkpoint_folder, read_config
from ..evaluation.image_captions import load_pipeline
from .captioners import ServedCaptioner, share_networks
from .startup import captioner_names


def load_captioners(models: Sequence[str], *, force: bool = False, **options: Any) -> list[ServedCaptioner]:
    """Captioners under short names.

    Args:
        models: folders or repositories.
        force: whether other networks and features than a captioner was trained with are taken.
        options: further ones of `load_pipeline`, for each captioner that has a use for them.

    Raises:
        ValueError: one cannot be loaded, or networks do not fit it.
    """
    names = captioner_names(models)
    pipelines = [load_pipeline(model, force=force, **_own_options(model, options, len(models))) for model in models]
    share_networks(pipelines)
    return [ServedCaptioner(name, each, force) for name, each in zip(names, pipelines, strict=True)]


def _own_options(model: str, options: dict[str, Any], num_models: int) -> dict[str, Any]:
    """Without a segmentation model for a captioner with one flow beside others that need it."""
    if num_models == 1 or options.get("segmentation_model") is None:
        return options
    has_segmentation = read_config(checkpoint_folder(model)).use_segmentation
    return options if has_segmentation else {**options, "segmentation_model": None}
