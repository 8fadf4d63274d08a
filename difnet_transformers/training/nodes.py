"""Checkpoints of a run whose machines each write to a disk of their own.

After a kill, machines may have different checkpoints, a new machine has none, and a launcher may number them in
another order: before a run resumes, all get the newest. The original (mrwu-mac/DIFNet, CVPR 2022) trains on one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..files import printable
from .checkpoint import CHECKPOINTS, CHECKSUMS, STAGES, read_checkpoint, recover, replace_folder
from .processes import all_or_none, raise_for_all

LOG = "log.jsonl"
BYTES_AT_ONCE = 2**26


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
        receive(accelerator, output / name, unfinished if behind else None, source)
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


def receive(accelerator: Accelerator, path: Path, copy: Path | None, source: int) -> None:
    """A file or folder from another process; every process calls it.

    Args:
        accelerator: of the run.
        path: in process `source`.
        copy: where it goes; `None` in processes that need it not.
        source: number of the process that has it.
    """
    pieces = pieces_of(path) if accelerator.process_index == source else None
    while True:
        piece = next(pieces, None) if pieces is not None else None
        (piece,) = broadcast_object_list([piece], from_process=source)
        if piece is None:
            return
        if copy is not None:
            name, content = piece
            target = copy / name if name else copy
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("ab") as file:
                file.write(content)


def pieces_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a folder, or a file, in pieces with their relative paths."""
    for file in [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file()):
        name = file.relative_to(path).as_posix() if file != path else ""
        with file.open("rb") as handle:
            yield name, handle.read(BYTES_AT_ONCE)  # an empty file too
            while content := handle.read(BYTES_AT_ONCE):
                yield name, content
