"""Checks of weights before anything is done with them."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import nn

from .files import printable

NAMED = 3  # tensors that a message lists


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
        f"{printable(name)} ({count:,} of {value.numel():,} values)"
        for name, value in state_dict.items()
        if isinstance(value, torch.Tensor) and (count := _count_not_finite(value))
    ]
    if wrong:
        more = f" and {len(wrong) - NAMED} more tensors" if len(wrong) > NAMED else ""
        raise ValueError(
            f"{printable(source, 300)}: NaN or infinity among the weights: {', '.join(wrong[:NAMED])}{more}. Take "
            "another checkpoint, or copy this one again from where it came from."
        )


def _count_not_finite(tensor: torch.Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta or not tensor.numel():
        return 0
    if tensor.layout is not torch.strided:  # as a dense tensor it may be too large for memory
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
    # A sum is one fast pass; only an unusual one (an overflow too) is worth looking at every value.
    if torch.isfinite(tensor.detach().sum(dtype=torch.float64 if not tensor.is_complex() else None)):
        return 0
    return int((~torch.isfinite(tensor)).sum())
