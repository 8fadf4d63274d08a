"""Checkpoints of a training run: what is in them, how they are written and how they are read.

A checkpoint is a folder for `from_pretrained` with `training_state/` inside: everything that the rest of the run
depends on. The original (mrwu-mac/DIFNet, CVPR 2022) writes one `.pth`; nothing here is a pickle:

    progress.json             stage, epoch, position in it, patience, best score, options of the run
    optimizer.safetensors     the optimizer's tensors, by the names of the parameters
    random_states.safetensors the states of the random numbers of torch, CUDA, numpy and Python, of each process
    trained_weights.safetensors  with --ema-decay: the weights that are trained; the model's files have their average
    SHA256SUMS                of these and of the model's files, as `sha256sum -c training_state/SHA256SUMS` reads it

A checkpoint is written beside the one it replaces and renamed when it is complete. At any moment a complete one is on
disk, as `NAME` or, between the two renames, as `NAME.previous`; `recover` puts that back.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..command_line import describe
from ..files import check_regular_file, name_file_in_errors, printable, read_file, read_json, sha256_of
from .processes import copy_from_process
from .training_state import (
    load_optimizer,
    load_trained_weights,
    optimizer_tensors,
    random_states,
    set_random_states,
)

CHECKPOINTS = ("last", "best", "best_xe")
STATE_FOLDER = "training_state"
CHECKSUMS = f"{STATE_FOLDER}/SHA256SUMS"
PROGRESS = f"{STATE_FOLDER}/progress.json"
TRAINED_WEIGHTS = "trained_weights.safetensors"
# Version 1 has neither checksums nor fingerprints of the data.
VERSION = 2
STAGES = ("xe", "scst", "done")
# What may change in a complete checkpoint: the card, which gets scores, and the code, which training does not run.
UNCHECKED_SUFFIXES = (".md", ".py")


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
        reference: SHA-256 of the weights that the run may not leave far behind, with --scst-kl-weight.
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
    reference: str = ""
    log_bytes: int = 0


@dataclass
class Checkpoint:
    """The content of `progress.json`.

    Args:
        progress: where the run stood.
        options: of the run, by name.
        num_processes: of the run.
        gradient_scaler: state of the scaler of fp16.
        data: fingerprints of the splits "train" and "validation"; `None` in checkpoints of the first version.
        stream: of a run that streams its data, where each process stood (`StreamedBatches.state_dict`).
        version: of the format.
        resized: whether the run resumes with other batch sizes; not in the file.
    """

    progress: Progress
    options: dict[str, Any]
    num_processes: int
    gradient_scaler: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    stream: list[dict[str, Any]] | None = None
    version: int = 1
    resized: bool = field(default=False, init=False)


# Folders


def prepare_output(output: Path, resumed: Path | None) -> None:
    """Readies the folder of a run, or refuses one that another run is in.

    Args:
        output: the run's folder, which exists.
        resumed: the checkpoint that the run resumes from.

    Raises:
        ValueError: `output` holds a run, and `resumed` is none of its checkpoints.
    """
    recover(output, CHECKPOINTS)
    held = next((name for name in CHECKPOINTS if (output / name).exists()), None)
    if held is None or (resumed is not None and resumed.resolve().parent == output.resolve()):
        return
    if resumed is None:
        raise ValueError(
            f"{output} holds a run already. Resume it with --resume last, or give another --output (or delete it)."
        )
    raise ValueError(
        f"{output} holds a run already, whose checkpoints `{resumed}` would replace. Resume that run with --resume "
        "last, or give another --output."
    )


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
            with name_file_in_errors(copy):
                shutil.copy2(original, copy)

    try:
        shutil.copytree(source, unfinished, copy_function=link)
    except shutil.Error as error:  # holds a list of (source, copy, reason)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{folder} could not be written: {error.args[0][0][2]}") from error
    replace_folder(unfinished, folder)


def checked_files(folder: Path) -> list[str]:
    """The files of a checkpoint that must not change, as relative paths; the progress last."""
    names = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in UNCHECKED_SUFFIXES
    ]
    return [*sorted(set(names) - {CHECKSUMS, PROGRESS}), PROGRESS]


def write_checksums(folder: Path) -> None:
    """The SHA-256 of every file of a checkpoint, in the format of `sha256sum`."""
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in checked_files(folder)]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def check_files(folder: Path, version: int) -> bool:
    """Compares the files of a checkpoint with its checksums.

    Args:
        folder: the checkpoint.
        version: of its format.

    Returns:
        Whether it has checksums; those of the first version have none.

    Raises:
        ValueError: a file is missing, or is not what was written.
    """
    path = folder / CHECKSUMS
    if version == 1 and not path.exists():
        return False
    try:
        lines = read_file(path).decode("utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing. Resume from another checkpoint.") from None
    except UnicodeDecodeError:
        lines = [""]
    matches = [re.fullmatch(r"([0-9a-f]{64})  ([^/].*)", line) for line in lines]
    sums = {match[2]: match[1] for match in matches if match}
    if len(sums) < len(lines) or PROGRESS not in sums:
        raise ValueError(f"{path} is damaged. Resume from another checkpoint.")
    for name, expected in sums.items():
        if ".." in Path(name).parts:
            raise ValueError(f"{path} is damaged: {printable(name)}. Resume from another checkpoint.")
        try:
            found = sha256_of(folder / name)
        except FileNotFoundError:
            found = None
        if found != expected:
            what = "is missing" if found is None else "is not what training wrote (its SHA-256 differs)"
            raise ValueError(
                f"{printable(folder / name, 300)} is damaged or was changed: it {what}. Resume from another "
                f"checkpoint, or start a new run from these weights: --model {folder}, another --output."
            )
    return True


def save_checkpoint(
    accelerator: Accelerator,
    output: Path,
    progress: Progress,
    options: dict[str, Any],
    data: dict[str, Any] | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    write_model: Callable[[Path], None],
    also_as: Sequence[str] = (),
    trained_weights: dict[str, torch.Tensor] | None = None,
    stream: dict[str, Any] | None = None,
    on_each_node: bool = False,
) -> None:
    """Writes `last`, and the same checkpoint under the names `also_as`; every process calls it.

    Args:
        accelerator: of the run.
        output: the run's folder.
        progress: where the run stands.
        options: of the run, with which those of a resumed run are compared.
        data: fingerprints of its splits, likewise; needed in the main process.
        model: whose parameters the optimizer has.
        optimizer: of the stage that is under way.
        write_model: makes a folder for `from_pretrained`.
        also_as: further names, such as "best".
        trained_weights: by name, where those of `model` are an average.
        stream: where this process stands in the data that it streams, if it does.
        on_each_node: whether every machine gets the checkpoint, on a disk of its own.

    Raises:
        OSError: the folder cannot be written, for example because the disk is full; the checkpoints of before are
            as they were.
    """
    states, streams = gather_object([random_states()]), gather_object([stream])
    unfinished, is_main = output / "last.unfinished", accelerator.is_main_process
    writes = accelerator.is_local_main_process if on_each_node else is_main
    with _told_to_all(output / "last", unfinished):
        if writes:
            shutil.rmtree(unfinished, ignore_errors=True)
        if is_main:
            write_model(unfinished)
            folder = unfinished / STATE_FOLDER
            folder.mkdir()
            save_file(optimizer_tensors(optimizer, model), folder / "optimizer.safetensors")
            named = {f"{process}/{key}": value for process, each in enumerate(states) for key, value in each.items()}
            save_file(named, folder / "random_states.safetensors")
            if trained_weights is not None:
                tensors = {name: value.cpu().contiguous() for name, value in trained_weights.items()}
                save_file(tensors, folder / TRAINED_WEIGHTS)
            content = {
                "version": VERSION,
                "progress": asdict(progress),
                "options": options,
                "data": data,
                **({"stream": streams} if stream is not None else {}),
                "num_processes": accelerator.num_processes,
                "gradient_scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            }
            (unfinished / PROGRESS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            write_checksums(unfinished)
    if on_each_node:  # Transformers writes weights in the first process only
        copy_from_process(accelerator, unfinished, unfinished if writes and not is_main else None, source=0)
    with _told_to_all(output / "last", unfinished):
        if writes:
            for name in also_as:
                copy_checkpoint(unfinished, output / name)
            replace_folder(unfinished, output / "last")


@contextmanager
def _told_to_all(folder: Path, unfinished: Path) -> Iterator[None]:
    """Around the writing of a checkpoint: an error in one process is raised in all."""
    problem = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = describe(error) if isinstance(error, OSError) else printable(str(error), 300)
        problem = f"{printable(folder, 300)} could not be saved: {reason}"
    problems = [each for each in gather_object([problem]) if each is not None]
    if problems:
        raise OSError(problems[0])


def read_checkpoint(folder: Path) -> Checkpoint:
    """Where the run of a checkpoint stood, and what it was started with.

    Raises:
        ValueError: the folder is no checkpoint of a training run, or its numbers cannot be.
    """
    path = folder / PROGRESS
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            raise ValueError(f"{folder}: no such checkpoint. To start a run, leave --resume out.") from None
        raise ValueError(
            f"{folder} is no checkpoint of a training run: it has no {PROGRESS}. To start a new run "
            f"from its weights, give --model {folder} instead of --resume."
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Resume from another checkpoint.") from None
    wrong = what_is_wrong(content)
    if wrong is not None:
        raise ValueError(f"{path} is damaged: {wrong}. Resume from another checkpoint.")
    known = {field.name for field in fields(Checkpoint) if field.init} & set(content)
    values = {name: content[name] for name in known}
    return Checkpoint(**{**values, "progress": Progress(**content["progress"])})


def what_is_wrong(content: Any) -> str | None:
    """Why the content of `progress.json` cannot be what training wrote."""
    if not isinstance(content, dict):
        return f"an object is expected, not {printable(content)}"
    types: dict[str, Any] = {
        "progress": dict,
        "options": dict,
        "num_processes": int,
        "gradient_scaler": dict | NoneType,
        **({"version": int} if "version" in content else {}),
        **({"data": dict | NoneType} if "data" in content else {}),
        **({"stream": list} if "stream" in content else {}),
    }
    for name, kind in types.items():
        if name not in content:
            return f"it has no {name}"
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            return f"{name} is {printable(content[name])}"
    if content.get("version", 1) not in range(1, VERSION + 1):
        return f"version is {printable(content['version'])}, this program knows up to {VERSION}; take a newer one"
    if content["num_processes"] < 1:
        return f"num_processes is {content['num_processes']}"
    streams = content.get("stream")
    if streams is not None and (
        len(streams) != content["num_processes"] or not all(isinstance(each, dict) for each in streams)
    ):
        return f"stream is {printable(streams)}"
    return what_is_wrong_in_progress(content["progress"])


def what_is_wrong_in_progress(progress: dict[str, Any]) -> str | None:
    """Why the numbers of a run's progress cannot be."""
    types: dict[str, Any] = {"str": str, "int": int, "float": int | float}
    names = {field.name: str(field.type) for field in fields(Progress)}
    for name in progress:
        if name not in names:
            return f"progress has an unknown {printable(name)}"
    if progress.get("stage") not in STAGES:
        return f"stage is {printable(progress.get('stage'))}, not one of {', '.join(STAGES)}"
    for name, value in progress.items():
        kind = types[names[name]]
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} is {printable(value)}"
        if kind is not str and not (0 <= value < 2**53 and math.isfinite(value)):
            return f"{name} is {printable(value)}"
    whole = Progress(**progress)
    if whole.epoch < 1 or whole.epoch - 1 > whole.total_epochs:
        return f"epoch is {whole.epoch} after {whole.total_epochs} whole epochs"
    if whole.stage == "xe" and whole.epoch - 1 != whole.total_epochs:
        return f"epoch is {whole.epoch} of the first stage after {whole.total_epochs} whole epochs"
    if whole.batch > 0 and whole.step == 0:
        return f"batch is {whole.batch} at step 0"
    return None


def load_state(
    accelerator: Accelerator,
    folder: Path,
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    has_average: bool = False,
) -> None:
    """Puts the optimizer, the gradient scaler, this process's random numbers and, if averaged, the weights back.

    Args:
        accelerator: of the run.
        folder: the checkpoint's folder.
        checkpoint: of `read_checkpoint`.
        model: whose parameters the optimizer has.
        optimizer: of the stage that is under way.
        has_average: whether the weights of the checkpoint's model are an average of those that were trained.

    Raises:
        ValueError: a file is missing, damaged, or of another run.
    """
    path = folder / STATE_FOLDER / "optimizer.safetensors"
    # With a gradient scaler the first steps may have been skipped.
    may_be_fresh = checkpoint.progress.step == 0 or checkpoint.gradient_scaler is not None
    try:
        load_optimizer(optimizer, model, read_tensors(path), path, may_be_fresh)
        if has_average:
            path = folder / STATE_FOLDER / TRAINED_WEIGHTS
            load_trained_weights(model, read_tensors(path), path)
        path = folder / STATE_FOLDER / "random_states.safetensors"
        prefix = f"{accelerator.process_index}/"
        tensors = read_tensors(path)
        states = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        set_random_states(states)
        if accelerator.scaler is not None and checkpoint.gradient_scaler is not None:
            path = folder / PROGRESS
            accelerator.scaler.load_state_dict(checkpoint.gradient_scaler)
    except (SafetensorError, FileNotFoundError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({printable(str(error))}). Resume from another checkpoint."
        ) from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, which must be a regular file."""
    check_regular_file(path)
    return load_file(path)
