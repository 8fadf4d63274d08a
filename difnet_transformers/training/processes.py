"""The processes of a run: where one of them fails, all end, and one says why; signals that ask a run to stop.

The original (mrwu-mac/DIFNet, CVPR 2022) trains in one process on one GPU.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from tqdm import tqdm

from ..command_line import EXTRA_OF, describe

SECONDS_TO_FREE = 0.2
BYTES_AT_ONCE = 2**26  # of files that are sent

Result = TypeVar("Result")


def make_accelerator(
    output: Path, report_to: Sequence[str] = (), mixed_precision: str | None = None, cpu: bool = False
) -> Accelerator:
    """The accelerator of a training run.

    Args:
        output: the run's folder, which gets the files of trackers.
        report_to: trackers of Accelerate; "none" is ignored.
        mixed_precision: "no", "bf16", "fp16", or "auto" for `native_precision`, which is printed; by default what
            `accelerate launch` says.
        cpu: whether a GPU is left alone.

    Raises:
        ValueError: a tracker is not installed.
    """
    trackers = [name for name in report_to if name != "none"]
    available = {tracker.value for tracker in get_available_trackers()}
    for name in trackers:
        if name not in available:
            package = f'"difnet-transformers[{EXTRA_OF[name]}]"' if name in EXTRA_OF else name
            raise ValueError(
                f"--report-to {name}: the package is not installed, or Accelerate does not know it. `pip install "
                f"{package}`, or choose one of: {', '.join(sorted(available | {'none'}))}."
            )
    if mixed_precision == "auto":
        mixed_precision, reason = native_precision(cpu)
        if is_first_process():
            print(f"--mixed-precision auto: {mixed_precision}, {reason}", file=sys.stderr)
    return Accelerator(
        mixed_precision=mixed_precision,
        cpu=cpu,
        log_with=cast(Any, trackers or None),
        project_config=ProjectConfiguration(str(output), logging_dir=str(output / "tensorboard")),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def native_precision(cpu: bool = False) -> tuple[str, str]:
    """The mixed precision for this machine's device, "bf16" where it multiplies bf16 natively or "no", and the reason.

    Args:
        cpu: whether a GPU is left alone.
    """
    from modeling_difnet.pipeline_difnet import has_native_bf16

    accelerator = None if cpu else torch.accelerator.current_accelerator(check_available=True)
    device = accelerator or torch.device("cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"this machine's {device.type}"
    if has_native_bf16(device):
        return "bf16", f"which {name} multiplies natively"
    return "no", f"since {name} does not multiply bf16 natively"


def is_first_process() -> bool:
    """Whether this is the process that speaks for all; known before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def all_or_none(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Runs `work` in every process; every process calls it.

    Args:
        accelerator: of the run.
        work: must not wait for other processes.

    Returns:
        What `work` returned in this process.

    Raises:
        Exception: that of `work`. In the main process, if another one failed, a ValueError with its message.
        SystemExit: with code 2 in the other processes, which have nothing to say.
    """
    result, problem = None, None
    try:
        result = work()
    except Exception as error:
        problem = error
    raise_for_all(accelerator, problem)
    return cast(Result, result)


def raise_for_all(accelerator: Accelerator, problem: Exception | None) -> None:
    """Raises in every process if there is a problem in one; every process calls it.

    Args:
        accelerator: of the run.
        problem: what went wrong in this process.

    Raises:
        Exception: as `all_or_none`.
    """
    if accelerator.num_processes == 1:
        if problem is not None:
            raise problem
        return
    said = [text for text in gather_object([None if problem is None else describe(problem)]) if text is not None]
    if not said:
        return
    if accelerator.is_main_process:
        raise problem if problem is not None else ValueError(said[0])
    end_training(accelerator)  # a process that just ends may be aborted by threads of the others' connections
    raise SystemExit(2)


def total(accelerator: Accelerator, number: float) -> float:
    """A number, added up over the processes; every process calls it."""
    if accelerator.num_processes == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64, device=accelerator.device)
    return cast(torch.Tensor, accelerator.reduce(tensor, "sum")).item()


def end_training(accelerator: Accelerator) -> None:
    """`accelerator.end_training()` without a deadlock in Gloo.

    The thread that made the last broadcast needs Python's lock to free its tensors; destroying the process group waits
    for this thread while it holds the lock. A moment of sleep lets go of the lock.
    """
    if accelerator.num_processes > 1:
        time.sleep(SECONDS_TO_FREE)
    accelerator.end_training()


def copy_from_process(accelerator: Accelerator, path: Path, copy: Path | None, source: int) -> None:
    """Copies a file or folder from one process to others; every process calls it.

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


class StopRequest:
    """Whether a signal has asked this process to stop.

    Attributes:
        time: when, by `time.monotonic`; 0 where none has.
    """

    def __init__(self) -> None:
        self.time = 0.0

    @contextmanager
    def from_signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP request a stop while the block runs; a second one ends it at once.

        In threads other than the main one, where Python handles no signals, nothing changes.
        """

        def stop(number: int, frame: Any) -> None:
            # A launcher passes the terminal's signal on to processes that have it already.
            if self.time and time.monotonic() - self.time > 1:
                raise KeyboardInterrupt
            self.time = self.time or time.monotonic()
            tqdm.write("stopping after this step; once more to stop at once", file=sys.stderr)

        previous = {}
        try:
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                if hasattr(signal, name) and threading.current_thread() is threading.main_thread():
                    previous[name] = signal.signal(getattr(signal, name), stop)
            yield
        finally:
            for name, handler in previous.items():
                signal.signal(getattr(signal, name), handler)
