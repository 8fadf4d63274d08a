"""Checkpoints of a run whose machines each write to a disk of their own.

After a kill, machines may have different checkpoints, a new machine has none, and a launcher may number them in
another order: before a run resumes, all get the newest. The original (mrwu-mac/DIFNet, CVPR 2022) trains on one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..files import printable
from .checkpoint import CHECKPOINTS, CHECKSUMS, STAGES, read_checkpoint, recover, replace_folder
from .processes import all_or_none, copy_from_process, raise_for_all

LOG = "log.jsonl"


def share_newest_run(accelerator: Accelerator, output: Path, writes: bool) -> None:
    """Gives every machine the checkpoints and the log of the one that has trained furthest; every process calls it.

    Args:
        accelerator: of the run.
        output: the run's folder, on every machine.
        writes: whether this process writes its machine's files.

    Raises:
        ValueError: a checkpoint is damaged, or machines have checkpoints of different runs.
        OSError: a folder cannot be written.
    """
    if writes:
        recover(output, CHECKPOINTS)
    state = all_or_none(accelerator, lambda: state_of(output) if writes else None)
    states = gather_object([state])
    newest = max((each for each in states if each is not None), default=None, key=lambda each: each.reached)
    if len({each.run for each in states if each is not None}) > 1:
        raise_for_all(
            accelerator,
            ValueError(
                f"{printable(output, 300)} holds different runs on different machines: empty it where another one is, "
                "or give another --output"
            ),
        )
    behind = writes and state != newest
    if newest is None or not any(gather_object([behind])):
        return
    source = states.index(newest)
    names = [name for name in (*CHECKPOINTS, LOG) if (output / name).exists()]
    (names,) = broadcast_object_list([names], from_process=source)
    for name in names:
        unfinished = output / f"{name}.unfinished"
        if behind:
            shutil.rmtree(unfinished, ignore_errors=True)
        copy_from_process(accelerator, output / name, unfinished if behind else None, source)
        if behind and name == LOG:
            unfinished.replace(output / name)
        elif behind:
            replace_folder(unfinished, output / name)


class RunState(NamedTuple):
    """Which run a machine has, how far it is, and the checksums of its files."""

    run: str
    reached: tuple[int, int, int]
    checksums: str


def state_of(output: Path) -> RunState | None:
    """The state of the checkpoint `last`; `None` where there is none."""
    last = output / "last"
    if not last.exists():
        return None
    checkpoint = read_checkpoint(last)
    progress = checkpoint.progress
    run = json.dumps([checkpoint.data, *(checkpoint.options.get(name) for name in ("seed", "stage", "model"))])
    reached = (progress.total_epochs, STAGES.index(progress.stage), progress.step)
    return RunState(run, reached, (last / CHECKSUMS).read_text(encoding="utf-8"))
