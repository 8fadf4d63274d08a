"""Regularization: averaged and frozen weights, dropout, hidden grid cells, and what keeps SCST near its start.

The original (mrwu-mac/DIFNet, CVPR 2022) has one dropout for both stages and nothing else; these are off by default.
Label smoothing and scheduled sampling are in `losses.py`, weight decay in `optimization.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from modeling_difnet.modeling_difnet import DifnetAttention

from ..files import printable


class WeightAverage:
    """An exponential moving average of the weights that are trained (Polyak and Juditsky, 1992).

    It starts from the weights as they are. Early averages follow the weights closely: the decay of update t, counted
    from 0, is the lower one of `decay` and `(1 + t) / (10 + t)`, as in TensorFlow.

    Args:
        model: on its device. Every process of a run has the same weights, and so the same average.
        decay: share of the average that an update keeps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.restart()

    def restart(self) -> None:
        """Begins anew with the weights of the model."""
        self.weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Adds the weights after an optimizer step; `number` counts the steps before it."""
        decay = min(self.decay, (1 + number) / (10 + number))
        for name, parameter in self.parameters.items():
            self.weights[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[dict[str, torch.Tensor]]:
        """The model has the averages while the block runs, which must not train it; no tensor is copied.

        Yields:
            The weights that are trained, by name.
        """
        trained = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.weights[name]
            yield trained
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = trained[name]

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """The averages become the weights of the model."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.weights[name])


def freeze_parameters(model: nn.Module, names: Sequence[str]) -> None:
    """Keeps parameters as they are: those with these names, and those of modules with these names.

    Args:
        model: the network.
        names: such as `model.encoder`, `model.decoder.layers.0` or `lm_head.weight`.

    Raises:
        ValueError: there is none of such a name, or none that would still be trained.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        matched = [each for key, each in parameters.items() if key == name or key.startswith(f"{name}.")]
        if not matched:
            modules = [key for key, module in model.named_modules() if key and any(True for _ in module.parameters())]
            nearest = difflib.get_close_matches(name, [*modules, *parameters], 3, cutoff=0.0)
            raise ValueError(f"--freeze {printable(name)}: the model has no such part; near it: {', '.join(nearest)}")
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"--freeze {' '.join(map(printable, names))}: nothing is left that could be trained")


def sampling_probability(highest: float, epoch: int, epochs: int) -> float:
    """The probability of scheduled sampling in an epoch (from 1): from 0 in the first to `highest` in the last."""
    return highest * min(1.0, (epoch - 1) / max(1, epochs - 1))


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


def kl_to_reference(log_probs: torch.Tensor, reference_log_probs: torch.Tensor) -> torch.Tensor:
    """The divergence of the model from a frozen reference, estimated at single tokens that the model decoded.

    `exp(r - l) - (r - l) - 1`, the estimator k3 of Schulman (2020) that TRL takes, where `l` and `r` are the token's
    log-probabilities. It is never negative, and for samples its mean is the Kullback-Leibler divergence.

    Args:
        log_probs: (B, K, L - 1) of `SequenceLogProbs`.
        reference_log_probs: (B, K, L - 1) of the reference, without gradient.

    Returns:
        (B, K, L - 1), 0 at `<pad>`.
    """
    difference = reference_log_probs - log_probs
    return torch.expm1(difference) - difference


def mean_of_tokens(
    values: torch.Tensor, max_new_tokens: int, num_captions: int | float | torch.Tensor
) -> torch.Tensor:
    """A mean over tokens as `self_critical_loss` takes it: divided by the longest length, whatever that of a caption.

    Args:
        values: (B, K, L - 1), 0 at `<pad>`.
        max_new_tokens, num_captions: as those of `self_critical_loss`.
    """
    return values.sum() / (max_new_tokens * num_captions)
