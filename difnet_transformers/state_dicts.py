"""State dicts under the names of another implementation: the table of keys, the checks, and the report.

Every key of a file is accounted for: it is mapped, or dropped for a stated reason, or the conversion stops. The tables
themselves are in `conversion.py` (the original DIFNet) and `grid_feats_vqa.py` (grid-feats-vqa).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from transformers import PreTrainedModel

from modeling_difnet.weights_difnet import check_finite_weights

from .files import printable

Model = TypeVar("Model", bound=PreTrainedModel)

# Parts of keys: what (Distributed)DataParallel, torch.compile, FSDP and activation checkpointing put there.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass
class Conversion(Generic[Model]):
    """A converted state dict and where each weight came from.

    Args:
        model_class: class of the network.
        config: its configuration, read from the file's keys and shapes.
        state_dict: for `model_class(config).load_state_dict`.
        mapped: the file's key to our key.
        dropped: the file's key to the reason why it has no counterpart.
        shapes: the file's key to its shape, in the order of the file.
        wrappers: parts that were left out of keys, such as `module`; the keys above have them.
    """

    model_class: type[Model]
    config: Any
    state_dict: dict[str, torch.Tensor]
    mapped: dict[str, str]
    dropped: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    wrappers: tuple[str, ...] = ()

    def model(self) -> Model:
        """The network with the converted weights, in eval mode."""
        with torch.device("meta"):
            model = self.model_class(self.config)
        model.load_state_dict(self.state_dict, assign=True)
        return model.eval()


def key_report(conversion: Conversion) -> str:
    """A table of every key of the file: where it went, or why it was dropped."""
    width = max(len(key) for key in conversion.shapes)
    lines = [f"{'original key':<{width}}  {'shape':<13}  here", f"{'-' * width}  {'-' * 13}  {'-' * 4}"]
    for key, shape in conversion.shapes.items():
        here = conversion.mapped.get(key) or f"dropped, {conversion.dropped[key]}"
        lines.append(f"{key:<{width}}  {'x'.join(map(str, shape)):<13}  {here}")
    lines.append(f"{len(conversion.mapped)} keys mapped, {len(conversion.dropped)} dropped.")
    if conversion.wrappers:
        names = ", ".join(f"`{wrapper}.`" for wrapper in conversion.wrappers)
        lines.append(f"Left out of keys: {names}, which DataParallel, torch.compile or the like put there.")
    return "\n".join(lines)


class UnwrappedStateDict(NamedTuple):
    """A state dict under the keys of the network that was wrapped (`module.`, `_orig_mod.`), or of one that was not.

    Args:
        weights: key to tensor.
        file_keys: the same keys to those of the file.
        wrappers: parts that were left out of the file's keys.
    """

    weights: dict[str, torch.Tensor]
    file_keys: dict[str, str]
    wrappers: tuple[str, ...]


def unwrap_state_dict(state_dict: Mapping[str, torch.Tensor], name: str) -> UnwrappedStateDict:
    """Leaves the names of wrappers out of keys, wherever in a key they are.

    Args:
        state_dict: of a network that was wrapped, or not.
        name: what errors call the checkpoint.

    Raises:
        ValueError: a weight is there twice, wrapped and not.
    """
    weights: dict[str, torch.Tensor] = {}
    file_keys: dict[str, str] = {}
    wrappers: dict[str, None] = {}
    for file_key, tensor in state_dict.items():
        parts = file_key.split(".")
        key = ".".join(part for part in parts if part not in WRAPPERS)
        wrappers |= dict.fromkeys(part for part in parts if part in WRAPPERS)
        if key in weights:
            raise ValueError(
                f"{name}: `{printable(file_keys[key])}` and `{printable(file_key)}` are the same weight, wrapped and "
                "not. Save the state dict of one model."
            )
        weights[key], file_keys[key] = tensor, file_key
    return UnwrappedStateDict(weights, file_keys, tuple(wrappers))


def network_shapes(model_class: type[PreTrainedModel], config: Any) -> dict[str, torch.Size]:
    """Key of each weight of a network to its shape; no memory is taken for the weights."""
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in model_class(config).state_dict().items()}


def convert_keys(
    original: UnwrappedStateDict,
    model_class: type[Model],
    config: Any,
    mapped: Mapping[str, str],
    dropped: Mapping[str, str],
    name: str,
    expected: str,
    dtype: torch.dtype | None = None,
) -> Conversion[Model]:
    """Puts the weights of a file under the keys of a network, with every key, shape and value checked.

    Args:
        original: weights of the file.
        model_class, config: the network.
        mapped: original key to the network's key; the file must have all of them.
        dropped: original key to the reason why it has no counterpart; the file may have them.
        name: what errors call the checkpoint.
        expected: what the file was taken for, such as "a checkpoint of DIFNet".
        dtype: of the converted weights; by default that of each weight.

    Returns:
        The conversion, with copies of the weights.

    Raises:
        ValueError: a key is missing or unknown; a weight has another shape than the network, is of another type than
            floating point, or holds NaN or infinity.
    """
    weights, file_keys, wrappers = original
    missing = [key for key in mapped if key not in weights]
    unknown = [key for key in weights if key not in mapped and key not in dropped]
    if missing or unknown:
        raise ValueError(
            f"{name} is not {expected}: {len(missing)} keys are missing{listing(missing)}, {len(unknown)} are unknown"
            f"{listing(unknown)}."
        )
    shapes = network_shapes(model_class, config)
    assert sorted(shapes) == sorted(mapped.values()), set(shapes) ^ set(mapped.values())
    for key, ours in mapped.items():
        tensor = weights[key]
        if tensor.shape != shapes[ours]:
            raise ValueError(
                f"{name}: `{key}` has the shape {tuple(tensor.shape)}, but the other keys ask for "
                f"{tuple(shapes[ours])}. The file is damaged or belongs to a changed network."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: `{key}` is of type {tensor.dtype}; weights are floating point numbers.")
    check_finite_weights({key: weights[key] for key in mapped}, name)
    return Conversion(
        model_class,
        config,
        state_dict={
            ours: weights[key].detach().to(dtype or weights[key].dtype, copy=True) for key, ours in mapped.items()
        },
        mapped={file_keys[key]: ours for key, ours in mapped.items()},
        dropped={file_keys[key]: reason for key, reason in dropped.items() if key in weights},
        shapes={file_keys[key]: tuple(tensor.shape) for key, tensor in weights.items()},
        wrappers=wrappers,
    )


def listing(keys: Iterable[str], count: int = 3) -> str:
    """The first few of many keys in brackets, for a message; empty without keys."""
    keys = list(keys)
    if not keys:
        return ""
    named = [f"`{printable(key)}`" for key in keys[:count]] + [".."] * (len(keys) > count)
    return f" ({', '.join(named)})"
