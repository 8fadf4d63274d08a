"""What a resumed run shares with the run of its checkpoint: options, number of processes, data.

The original (mrwu-mac/DIFNet, CVPR 2022) resumes with whatever the command says.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..files import printable
from ..options import option_name
from .checkpoint import Checkpoint, Progress
from .config import TrainingConfig

AUTO = "auto"  # resumes `last` where there is one, and begins where there is none

# Options that only say where, how often and how long; a resumed run may have others.
MAY_CHANGE = frozenset(
    """dataset output resume save_on_each_node report_to log_every save_every evaluation_batch_size xe_epochs
    scst_epochs xe_patience scst_patience max_epochs max_steps reward_images debug license""".split()  # noqa: SIM905
)


def check_same_run(checkpoint: Checkpoint, folder: Path, args: TrainingConfig, num_processes: int) -> list[str]:
    """Refuses to resume what would not be the same run.

    How images are shared out to batches may change where memory did not suffice: before the first step of SCST all
    that concerns SCST, and later its batch size and the accumulation; in the XE stage the batch size and the
    accumulation if their product stays.

    Args:
        checkpoint: what the run resumes from. With another batch size its progress is moved to the same image, and
            `resized` is set.
        folder: the checkpoint's folder, for messages.
        args: options of the resumed run.
        num_processes: of the resumed run.

    Returns:
        What has changed, one line each.

    Raises:
        ValueError: options or the number of processes differ.
    """
    now, progress = options_as_json(args), checkpoint.progress
    # Checkpoints of earlier versions lack options, which were as the defaults are, and have some that are gone.
    defaults = options_as_json(TrainingConfig(dataset=args.dataset, output=args.output))
    before = {**defaults, **checkpoint.options}
    changed = [name for name, value in before.items() if name not in MAY_CHANGE and name in now and now[name] != value]
    notes = []
    for name in changed:
        if not _may_change_here(name, before, now, progress):
            raise ValueError(
                f"{folder} is of a run with {flag(name, before[name])}, this command says {flag(name, now[name])}. "
                "Resume with the options of that run, or start a new one from its weights: "
                f"--model {folder}, another --output."
            )
        notes.append(f"{flag(name, now[name])}, where the run had {flag(name, before[name])}")
    if checkpoint.num_processes != num_processes:
        raise ValueError(
            f"{folder} is of a run with {checkpoint.num_processes} processes, these are {num_processes}. "
            f"Start as many, or a new run from its weights: --model {folder}, another --output."
        )
    size = f"{progress.stage}_batch_size"
    if size in changed:
        checkpoint.resized = True
        # Batches go through the images in one order, whatever their size: the images so far are skipped.
        progress.batch = progress.batch * before[size] // now[size]
    return notes


def _may_change_here(name: str, before: dict[str, Any], now: dict[str, Any], progress: Progress) -> bool:
    in_xe = progress.stage == "xe"
    scst_has_begun = progress.stage == "scst" and progress.step > 0
    xe_images_per_step = [
        options.get("xe_batch_size", 0) * options.get("gradient_accumulation_steps", 1) for options in (before, now)
    ]
    if name in ("xe_batch_size", "gradient_accumulation_steps") and in_xe:
        return xe_images_per_step[0] == xe_images_per_step[1]
    if name in ("scst_batch_size", "gradient_accumulation_steps"):
        return progress.stage != "done"
    of_scst = name.startswith("scst_") or name in ("rewards", "eos_in_reward")
    return of_scst and progress.stage != "done" and not scst_has_begun


def check_same_data(
    before: dict[str, Any], now: dict[str, Any], folder: Path, dataset: str | Path, split_names: dict[str, str]
) -> None:
    """Refuses to resume with other data than the run began with; where they lie does not matter.

    Args:
        before: fingerprints of the splits in the checkpoint, "train" and "validation".
        now: those of the splits of this run.
        folder: the checkpoint, for messages.
        dataset: the packed dataset, for messages.
        split_names: names of the two splits in the dataset.

    Raises:
        ValueError: a split has other images, captions or features.
    """
    for split, fingerprint in now.items():
        if before.get(split) == fingerprint:
            continue
        raise ValueError(
            f"{dataset}: the split {split_names[split]!r} is not the one that the run of {folder} began with "
            f"({difference_of_data(before.get(split), fingerprint)}). Resume with that dataset, wherever it lies, or "
            f"start a new run from the weights: --model {folder}, another --output."
        )


def difference_of_data(before: object, now: object) -> str:
    """What differs between two fingerprints, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name, value in now.items():
            if before.get(name) != value:
                return f"{name.replace('_', ' ')} {printable(before.get(name), 24)}, now {printable(value, 24)}"
    return f"fingerprint {printable(before, 24)}, now {printable(now, 24)}"


def options_as_json(args: TrainingConfig) -> dict[str, Any]:
    """The options as a checkpoint keeps them."""
    return json.loads(json.dumps(dataclasses.asdict(args), default=str))


def flag(name: str, value: Any) -> str:
    """An option with its value, as a message names it."""
    if isinstance(value, list):
        value = " ".join(map(str, value)) if value else None
    return f"{option_name(name)} {value}" if value is not None else f"no {option_name(name)}"
