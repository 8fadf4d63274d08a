"""Regularization that acts on the network or its inputs: dropout of a stage, and hidden grid cells.

The original (mrwu-mac/DIFNet, CVPR 2022) has one dropout for both stages and nothing else; these are off by default.
Label smoothing is in `losses.py`, weight decay in `optimization.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from modeling_difnet.modeling_difnet import DifnetAttention


def set_dropout(model: nn.Module, probability: float) -> None:
    """Gives all dropouts of a network, of states and of attention weights, another probability.

    Its configuration keeps what it says, and with it the checkpoints: this is a property of the training.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(module, DifnetAttention):
            module.attention_dropout = probability


def hide_cells(features: dict[str, torch.Tensor], probability: float) -> dict[str, torch.Tensor]:
    """Hides grid cells of each image at random, the same ones in both flows; at least one remains.

    Args:
        features: of B images, by the names of `forward`.
        probability: of a cell.

    Returns:
        The features, with masks (B, N) that hide these cells besides those that were hidden before.
    """
    if not probability:
        return features
    grid_features = features["grid_features"]  # (B, N, D)
    visible = features.get("grid_attention_mask")  # (B, N)
    if visible is None:
        visible = torch.ones(grid_features.shape[:2], dtype=torch.int64, device=grid_features.device)
    drawn = visible * (torch.rand(visible.shape, device=visible.device) >= probability)
    mask = torch.where(drawn.any(-1, keepdim=True), drawn, visible)
    masks = {"grid_attention_mask": mask}
    if "segmentation_features" in features:
        masks["segmentation_attention_mask"] = mask
    return {**features, **masks}
