"""Progress of long work: tqdm's bar on a terminal, and a line every half minute in a file."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


def _take_own_lock() -> None:
    tqdm.set_lock(threading.RLock())


# Forked processes share tqdm's lock: one that is killed while it has it would stop all others.
tqdm.get_lock()  # before a subclass makes one of its own
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_take_own_lock)


class _Lines(tqdm):
    """tqdm for a file, where a bar that is drawn over itself would be one endless line."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        separator = ""

        def print_status(text: str) -> None:
            nonlocal separator
            if text:  # an empty one clears a bar
                file.write(separator + text)
                file.flush()
                separator = "\n"

        return print_status


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """`tqdm(iterable, **settings)`, as lines where the error output is no terminal.

    Work that takes less than half a minute writes none.

    Args:
        iterable: what is passed on, if the bar is to count it.
        settings: of `tqdm`.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, **settings)
    interval = SECONDS_BETWEEN_LINES
    return _Lines(iterable, **{**settings, "mininterval": interval, "maxinterval": interval, "delay": interval})
