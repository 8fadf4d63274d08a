"""Checks of weights before anything is done with them: none is random, and all are numbers.

Transformers fills weights that a file lacks with random numbers and only warns.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from .images_difnet import one_line

NUM_LISTED = 3  # tensors that a message lists
# `from_pretrained` replaces methods of Transformers' classes, `PreTrainedModel.tie_weights` among them, and puts them
# back. Of two threads that load at a time, one can put back what the other had replaced: no model is tied then.
LOADING = threading.RLock()


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a folder or repository.

    Raises:
        ValueError: there is none, or Transformers does not know the model; one line says which.
    """
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_why_not_loaded(name, error)) from error


def _why_not_loaded(name: str, error: Exception) -> str:
    """Transformers' text, which has several lines, as one."""
    is_folder = os.path.isdir(name)
    problem = "the network cannot be loaded" if is_folder else "no such folder, and not available from the Hub"
    return f"{one_line(name)}: {problem} ({one_line(' '.join(str(error).split()), 300)})"


def load_complete(model_class: Any, name: str, revision: str | None = None) -> Any:
    """A model in eval mode, every weight of which is in its file.

    Args:
        model_class: a model or Auto class of Transformers.
        name: folder or repository.
        revision: branch, tag or commit of the repository.

    Raises:
        ValueError: there is no such model, or it is of another class; a weight is missing, has another shape, or is
            not finite.
    """
    try:
        with LOADING:
            model, report = model_class.from_pretrained(name, revision=revision, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(_why_not_loaded(name, error)) from error
    random = random_weights(report)
    if random:
        raise ValueError(
            f"{name}: {len(random)} parameters are not in the weights file or have another shape there "
            f"({', '.join(sorted(random)[:NUM_LISTED])}, ..): this is not the complete file of this network."
        )
    check_finite_weights(model, name)
    return model.eval()


def random_weights(report: Mapping[str, Any]) -> list[str]:
    """Names of the weights that `from_pretrained(.., output_loading_info=True)` left at their random values."""
    return [*map(str, report["missing_keys"]), *(str(key) for key, *_ in report["mismatched_keys"])]


def check_finite_weights(weights: nn.Module | Mapping[str, object], source: str | os.PathLike) -> None:
    """Refuses weights that are not numbers: a captioner with them gives captions, but no meaningful ones.

    Args:
        weights: a model or its state dict; values that are no floating point tensors are passed over.
        source: the file or folder that they come from, for the message.

    Raises:
        ValueError: a tensor holds NaN or infinity; the text names it.
    """
    state_dict = weights.state_dict() if isinstance(weights, nn.Module) else weights
    wrong = [
        f"{one_line(name, 120)} ({count:,} of {value.numel():,} values)"
        for name, value in state_dict.items()
        if isinstance(value, torch.Tensor) and (count := _count_not_finite(value))
    ]
    if wrong:
        more = f" and {len(wrong) - NUM_LISTED} more tensors" if len(wrong) > NUM_LISTED else ""
        raise ValueError(
            f"{one_line(os.fspath(source), 300)}: NaN or infinity among the weights: "
            f"{', '.join(wrong[:NUM_LISTED])}{more}. Take another checkpoint, "
            "or copy this one again from where it came from."
        )


def _count_not_finite(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # made of others, as a quantised one is of integers and scales
        return sum(_count_not_finite(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta or not tensor.numel():
        return 0
    if tensor.layout is not torch.strided:  # as a dense tensor it may be too large for memory
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
    # A sum is one fast pass; only an unusual one (an overflow too) is worth looking at every value.
    if torch.isfinite(tensor.detach().sum(dtype=torch.float64 if not tensor.is_complex() else None)):
        return 0
    return int((~torch.isfinite(tensor)).sum())


__all__ = ["LOADING", "check_finite_weights", "load_complete", "load_config", "random_weights"]
