"""Several processes of one run: where one of them fails, all end, and one says why."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..command_line import describe

SECONDS_TO_FREE = 0.2

Result = TypeVar("Result")


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
    return result


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


def end_training(accelerator: Accelerator) -> None:
    """`accelerator.end_training()` without a deadlock in Gloo.

    The thread that made the last broadcast needs Python's lock to free its tensors; destroying the process group waits
    for this thread while it holds the lock. A moment of sleep lets go of the lock.
    """
    if accelerator.num_processes > 1:
        time.sleep(SECONDS_TO_FREE)
    accelerator.end_training()
