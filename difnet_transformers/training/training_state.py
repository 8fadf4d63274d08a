"""What a checkpoint keeps of random numbers, weights and the optimizer, as tensors: no pickle."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..files import printable

# Random numbers


def random_states() -> dict[str, torch.Tensor]:
    """The states of this process's random numbers, as tensors."""
    version, words, gauss = random.getstate()
    assert version == 3
    name, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    assert name == "MT19937"
    assert isinstance(keys, np.ndarray)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor([cached_gaussian], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """The inverse of `random_states`.

    Raises:
        TypeError: the tensors are no such states.
        KeyError: one is missing.
    """
    torch.set_rng_state(states["torch"])
    try:
        gauss = [float(value) for value in states["python_gauss"].tolist()]
        random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
        position, has_gauss = states["numpy_position"].tolist()
        keys = states["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, position, has_gauss, states["numpy_gauss"].item()))
    except ValueError as error:
        raise TypeError(str(error)) from error
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# Weights


@torch.no_grad()
def load_trained_weights(model: nn.Module, tensors: dict[str, torch.Tensor], source: Path) -> None:
    """Gives the parameters that are trained the values of a checkpoint.

    Args:
        model: whose frozen parameters stay.
        tensors: by the names of the parameters.
        source: the file that they come from, for messages.

    Raises:
        ValueError: the tensors are those of another model, or no numbers.
    """
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    for name in sorted(parameters.keys() | tensors.keys()):
        if name not in parameters or name not in tensors or parameters[name].shape != tensors[name].shape:
            raise ValueError(f"{source} does not fit the model: {printable(name)}. Resume from another one.")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{source} is damaged: {name} holds NaN or infinity. Resume from another one.")
        parameters[name].copy_(tensors[name])


# The optimizer

OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")  # Adam's, of each parameter


def optimized_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of an optimizer with their names in the model, in the order of its groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(names[id(parameter)], parameter) for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's state as `{"<parameter's name>/<name in Adam>": tensor}`."""
    parameters = optimized_parameters(optimizer, model)
    state = optimizer.state_dict()["state"]
    return {
        f"{parameters[index][0]}/{key}": value.detach().cpu().contiguous()
        for index, values in state.items()
        for key, value in values.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: dict[str, torch.Tensor],
    source: Path,
    may_be_fresh: bool = True,
) -> None:
    """The inverse of `optimizer_tensors`.

    Args:
        optimizer: of the parameters of `model`.
        tensors: of `optimizer_tensors`.
        source: the file that they come from, for messages.
        may_be_fresh: whether the optimizer may be one that has not taken a step.

    Raises:
        ValueError: the tensors belong to another model, are not all there, or are no state of this optimizer.
    """
    parameters = optimized_parameters(optimizer, model)
    state: dict[int, dict[str, torch.Tensor]] = {}
    index_of = {name: index for index, (name, _) in enumerate(parameters)}
    for key, tensor in tensors.items():
        name, _, what = key.rpartition("/")
        expected = None
        if name in index_of and what in OPTIMIZER_STATE:
            expected = torch.Size() if what == "step" else parameters[index_of[name]][1].shape
        if tensor.shape != expected:
            raise ValueError(
                f"{source} does not fit the model: {printable(key)} {tuple(tensor.shape)}. Resume from another one."
            )
        if (
            not tensor.is_floating_point()
            or not torch.isfinite(tensor).all()
            or (what != "exp_avg" and (tensor < 0).any())
        ):
            raise ValueError(
                f"{source} is damaged: {key} holds values that are none of Adam. Resume from another one."
            )
        state.setdefault(index_of[name], {})[what] = tensor
    if not state and not may_be_fresh:
        raise ValueError(
            f"{source} is damaged: it holds no tensors, and the run has taken optimizer steps. Resume from another "
            "one."
        )
    complete = sum(len(values) == len(OPTIMIZER_STATE) for values in state.values())
    if state and complete != len(parameters):
        raise ValueError(f"{source} holds {complete} of {len(parameters)} parameters. Resume from another one.")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
