"""Seconds that a program spends in each of its stages, printed at its end.

16 images in 71.1 s, 0.22 images/s: decoding 0.1 s (and 0.2 s beside), grid backbone 7.2 s, segmentation 63.1 s, ..
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageTimes:
    """Measures stages, of the thread that makes it and of threads that work beside that.

    Args:
        stages: their names, in the order in which they are printed; others follow.
    """

    def __init__(self, *stages: str) -> None:
        self.start = time.perf_counter()
        self.thread = threading.current_thread()
        self.seconds = dict.fromkeys(stages, 0.0)
        self.seconds_beside: dict[str, float] = {}
        self.lock = threading.Lock()

    @contextmanager
    def stage(self, name: str, beside: bool = False) -> Iterator[None]:
        """Adds the time that the block takes to a stage.

        Args:
            name: of the stage.
            beside: whether the main thread goes on meanwhile; of other threads it does.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            with self.lock:
                is_beside = beside or threading.current_thread() is not self.thread
                table = self.seconds_beside if is_beside else self.seconds
                table[name] = table.get(name, 0.0) + seconds

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.start

    def summary(self, num_images: int) -> str:
        """One line: all images, and the stages that took time.

        Args:
            num_images: that went through the stages.
        """
        total = self.total
        stages = []
        for name in {**self.seconds, **self.seconds_beside}:
            seconds, beside = self.seconds.get(name, 0.0), self.seconds_beside.get(name, 0.0)
            if seconds or beside:
                stages.append(f"{name} {seconds:.1f} s" + (f" (and {beside:.1f} s beside)" if beside else ""))
        images = f"{num_images:,} image{'s' if num_images != 1 else ''} in {total:.1f} s"
        return f"{images}, {num_images / total:.2f} images/s: {', '.join(stages)}"

    def print_summary(self, num_images: int) -> None:
        """Prints `summary` to standard error, where it is no part of what a program gives to another."""
        print(self.summary(num_images), file=sys.stderr)
