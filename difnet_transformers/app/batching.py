"""One thread that runs a model on the requests that wait, those that ask for the same together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Job:
    """What waits for the model.

    Args:
        key: jobs with equal ones run together.
        item: for the model.
        future: gets the result, or the error.
    """

    key: Hashable
    item: Any
    future: Future = field(default_factory=Future)


class Batcher:
    """Gives a function the items that wait, as batches, in a thread of its own.

    The first job of the queue decides what runs next; with it go the next ones with the same key. A job that comes
    alone never waits for others. Clients that have just got their answers often send again: the next batch waits until
    as many jobs are there as ran and waited when the last one ended, and while requests are being read, at most
    `batch_wait` seconds.

    Args:
        run: gets a key and items, and returns a result or an exception for each.
        batch_size: most items of a batch.
        batch_wait: in seconds.
    """

    def __init__(
        self, run: Callable[[Any, list[Any]], Sequence[Any]], *, batch_size: int = 8, batch_wait: float = 0.1
    ) -> None:
        self.run, self.batch_size, self.batch_wait = run, batch_size, batch_wait
        self.waiting: list[Job] = []
        self.num_arriving, self.last_size = 0, 0
        self.is_closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="captioning", daemon=True)
        self.thread.start()

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Around reading a request that `submit` will get."""
        with self.changed:
            self.num_arriving += 1
        try:
            yield
        finally:
            with self.changed:
                self.num_arriving -= 1
                self.changed.notify()

    def submit(self, key: Hashable, item: Any) -> Future:
        """The result of an item, later. A future that is cancelled before its turn is never run.

        Raises:
            RuntimeError: the batcher is closed.
        """
        job = Job(key, item)
        with self.changed:
            if self.is_closed:
                raise RuntimeError("the server is ending")
            self.waiting.append(job)
            self.changed.notify()
        return job.future

    def close(self) -> None:
        """Runs what waits, and ends the thread."""
        with self.changed:
            self.is_closed = True
            self.changed.notify()
        self.thread.join()

    def _next_batch(self) -> list[Job]:
        """The jobs that run next; none when the batcher is closed and nothing waits."""
        with self.changed:
            expected, last_end = min(self.last_size + len(self.waiting), self.batch_size), time.monotonic()
            while not self.waiting and not self.is_closed:
                self.changed.wait()
            if not self.waiting:
                return []
            key, begin = self.waiting[0].key, time.monotonic()
            while sum(job.key == key for job in self.waiting) < self.batch_size and not self.is_closed:
                since = begin if self.num_arriving else last_end if len(self.waiting) < expected else None
                remaining = 0 if since is None else since + self.batch_wait - time.monotonic()
                if remaining <= 0:
                    break
                self.changed.wait(remaining)
            chosen = [job for job in self.waiting if job.key == key][: self.batch_size]
            self.waiting = [job for job in self.waiting if job not in chosen]
            return chosen

    def _work(self) -> None:
        while jobs := self._next_batch():
            self.last_size = len(jobs)
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if not jobs:
                continue
            try:
                results = self.run(jobs[0].key, [job.item for job in jobs])
            except BaseException as error:  # the thread outlives whatever a model raises
                results = [error] * len(jobs)
            for job, result in zip(jobs, results, strict=True):
                if isinstance(result, BaseException):
                    job.future.set_exception(result)
                else:
                    job.future.set_result(result)
            # The last batch's tensors would otherwise live until the next one.
            del jobs, results, job, result
