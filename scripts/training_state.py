"""Checkpoints of a training run: what is in them, how they are written and how they are read back.

A checkpoint is a folder for `from_pretrained` with `training_state/` inside: everything that the rest of the run
depends on. Unlike the original's `.pth`, nothing in it is a pickle:

    progress.json             stage, epoch, position in it, patience, best score, options of the run
    optimizer.safetensors     the optimizer's tensors, by the names of the parameters
    random_states.safetensors the states of torch's, CUDA's, numpy's and Python's random numbers of each process

A checkpoint is written beside the one it replaces and renamed when it is complete. At any moment a complete one is on
disk, as `NAME` or, between the two renames, as `NAME.previous`; `recover` puts that back.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

STATE_FOLDER = "training_state"


@dataclass
class Progress:
    """Where a run stands.

    Args:
        stage: "xe", "scst" or, when all is done, "done".
        epoch: the epoch of the stage that is under way, from 1.
        batch: batches of this epoch that every process is done with.
        step: optimizer steps of the stage.
        total_epochs: epochs of all stages that are done.
        patience: epochs since the validation score was last as good as the best.
        best_score: the best CIDEr-D on the validation split, over both stages.
        reward_average, reward_peak, reward_steps: of SCST, a running mean of the reward, the highest that it has been,
            and the optimizer steps that it was taken over.
        log_bytes: length of `log.jsonl`.
    """

    stage: str
    epoch: int = 1
    batch: int = 0
    step: int = 0
    total_epochs: int = 0
    patience: int = 0
    best_score: float = 0.0
    reward_average: float = 0.0
    reward_peak: float = 0.0
    reward_steps: int = 0
    log_bytes: int = 0


# Random numbers


def random_states() -> dict[str, torch.Tensor]:
    """The states of this process's random numbers, as tensors."""
    version, words, gauss = random.getstate()
    assert version == 3
    name, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    assert name == "MT19937"
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
    """The inverse of `random_states`."""
    torch.set_rng_state(states["torch"])
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = states["numpy_position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, states["numpy_gauss"].item()))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# The optimizer


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's state as `{"<parameter's name>/<what>": tensor}`."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": value.detach().cpu().contiguous()
        for index, values in state.items()
        for key, value in values.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor], source: Path
) -> None:
    """The inverse of `optimizer_tensors`; ValueError if the file belongs to another model."""
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    state: dict[int, dict[str, torch.Tensor]] = {}
    index_of = {name: index for index, (name, _) in enumerate(parameters)}
    for key, tensor in tensors.items():
        name, _, what = key.rpartition("/")
        if name not in index_of or (tensor.ndim and tensor.shape != parameters[index_of[name]][1].shape):
            raise ValueError(f"{source} does not fit the model: {key} {tuple(tensor.shape)}. Resume from another one.")
        state.setdefault(index_of[name], {})[what] = tensor
    if state and len(state) != len(parameters):
        raise ValueError(f"{source} holds {len(state)} of {len(parameters)} parameters. Resume from another one.")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# Folders


def recover(output: Path, names: tuple[str, ...]) -> None:
    """Finishes what a killed run left between two renames, and removes what it left unfinished."""
    for name in names:
        folder, previous = output / name, output / f"{name}.previous"
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        for left_over in (previous, output / f"{name}.unfinished"):
            shutil.rmtree(left_over, ignore_errors=True)


def replace_folder(unfinished: Path, folder: Path) -> None:
    """Puts a complete folder in the place of `folder`, which stays on disk until then."""
    previous = folder.with_name(f"{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    unfinished.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def copy_checkpoint(source: Path, folder: Path) -> None:
    """A second name for a checkpoint: hard links where the disk has them, for its files are never changed in place."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)

    def link(original: str, copy: str) -> None:
        try:
            os.link(original, copy)
        except OSError:
            shutil.copy2(original, copy)

    shutil.copytree(source, unfinished, copy_function=link)
    replace_folder(unfinished, folder)


def save_checkpoint(
    accelerator: Accelerator,
    output: Path,
    progress: Progress,
    options: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    write_model: Callable[[Path], None],
    also_as: Sequence[str] = (),
) -> None:
    """Writes `last`, and the same checkpoint under the names `also_as`; every process calls it.

    Raises:
        OSError: the folder cannot be written, for example because the disk is full; the checkpoints of before are
            as they were.
    """
    states = gather_object([random_states()])
    problem = None
    if accelerator.is_main_process:
        unfinished = output / "last.unfinished"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            write_model(unfinished)
            folder = unfinished / STATE_FOLDER
            folder.mkdir()
            save_file(optimizer_tensors(optimizer, model), folder / "optimizer.safetensors")
            named = {f"{process}/{key}": value for process, each in enumerate(states) for key, value in each.items()}
            save_file(named, folder / "random_states.safetensors")
            facts = {
                "progress": asdict(progress),
                "options": options,
                "num_processes": accelerator.num_processes,
                "gradient_scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            }
            (folder / "progress.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            for name in also_as:
                copy_checkpoint(unfinished, output / name)
            replace_folder(unfinished, output / "last")
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            problem = f"{output / 'last'} could not be saved: {error}"
    (problem,) = broadcast_object_list([problem])
    if problem is not None:
        raise OSError(problem)


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """`progress`, `options`, `num_processes` and `gradient_scaler` of a checkpoint.

    Raises:
        ValueError: the folder is no checkpoint of a training run.
    """
    path = folder / STATE_FOLDER / "progress.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return {**facts, "progress": Progress(**facts["progress"])}
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is no checkpoint of a training run: it has no {STATE_FOLDER}/progress.json. To start a new run "
            f"from its weights, give --model {folder} instead of --resume."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Resume from another checkpoint.") from error


def load_state(
    accelerator: Accelerator, folder: Path, facts: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Puts the optimizer, the gradient scaler and this process's random numbers back."""
    path = folder / STATE_FOLDER / "optimizer.safetensors"
    try:
        load_optimizer(optimizer, model, load_file(path), path)
        path = folder / STATE_FOLDER / "random_states.safetensors"
        prefix = f"{accelerator.process_index}/"
        states = {key.removeprefix(prefix): value for key, value in load_file(path).items() if key.startswith(prefix)}
        set_random_states(states)
    except (SafetensorError, FileNotFoundError, KeyError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}). Resume from another checkpoint.") from error
    if accelerator.scaler is not None and facts["gradient_scaler"] is not None:
        accelerator.scaler.load_state_dict(facts["gradient_scaler"])
