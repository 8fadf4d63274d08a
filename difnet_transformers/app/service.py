"""From a request to its result: decoding in threads, a bounded queue, one thread for the models."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from ..files import printable
from .batching import Batcher
from .inputs import CaptionInput, RequestError
from .starting import StartingCaptioner
from .tasks import Captioner, CaptionResult, CaptionTask

NUM_DECODERS = max(1, min(4, (os.cpu_count() or 1) // 2))


class CaptionService:
    """Captioners behind a queue, for any number of users at once.

    Args:
        captioners: those that are served; the first is the default.
        queue_size: requests that are read, wait or run at most; further ones are refused with status 503.
        timeout: seconds from a request's arrival to its result.
        max_upload: bytes of an image or of features.
        batch_size, batch_wait: see `Batcher`.
    """

    def __init__(
        self,
        captioners: Sequence[Captioner],
        *,
        queue_size: int = 100,
        timeout: float = 60,
        max_upload: int = 20 * 2**20,
        batch_size: int = 8,
        batch_wait: float = 0.1,
    ) -> None:
        self.captioners: dict[str, Captioner] = {each.name: each for each in captioners}
        self.queue_size, self.timeout, self.max_upload = queue_size, timeout, max_upload
        self.decoders = ThreadPoolExecutor(NUM_DECODERS, thread_name_prefix="decoding")
        self.batcher = Batcher(self._run, batch_size=batch_size, batch_wait=batch_wait)
        self.num_open = 0
        self.lock = threading.Lock()

    @property
    def default(self) -> Captioner:
        return next(iter(self.captioners.values()))

    def captioner(self, name: str | None) -> Captioner:
        """The captioner of a name; by default the first.

        Raises:
            RequestError: there is none, with status 404.
        """
        if name is None:
            return self.default
        if name not in self.captioners:
            known = ", ".join(self.captioners)
            raise RequestError(f"no captioner is called {printable(name)}; here are {known}", 404)
        return self.captioners[name]

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue, from a request's arrival to its answer.

        Raises:
            RequestError: the queue is full, or the server ends: status 503.
        """
        with self.lock:
            if self.num_open >= self.queue_size:
                raise RequestError(f"{self.queue_size} requests wait already; try again in a moment", 503)
            self.num_open += 1
        try:
            yield
        finally:
            with self.lock:
                self.num_open -= 1

    def submit(
        self, name: str | None, read: Callable[[], CaptionInput], make_task: Callable[[CaptionInput], CaptionTask]
    ) -> Future:
        """A caption, later. Cancelling its future takes it out of the queue, unless it runs already.

        Args:
            name: of the captioner.
            read: opens the image or the features, in a thread.
            make_task: what is wanted of them.

        Raises:
            RequestError: there is no such captioner.
        """
        captioner, result = self.captioner(name), Future[CaptionResult]()

        def prepare() -> None:
            if result.cancelled():
                return
            try:
                with self.batcher.arriving():
                    self._enqueue(captioner.name, make_task(read()), result)
            except Exception as error:
                _finish(result, error=error)

        self.decoders.submit(prepare)
        return result

    def _enqueue(self, name: str, task: CaptionTask, result: Future) -> None:
        """Hands a task to the model's thread, as soon as there is a captioner that does it."""
        captioner = self.captioners[name]
        if isinstance(captioner, StartingCaptioner) and captioner.waits(task):
            captioner.loading.add_done_callback(lambda _: self._enqueue_later(name, task, result))
            return
        running = self.batcher.submit(captioner.prepare(task), task)
        running.add_done_callback(
            lambda done: (
                None
                if done.cancelled()
                else _finish(result, error=done.exception(), value=None if done.exception() else done.result())
            )
        )
        result.add_done_callback(lambda done: running.cancel() if done.cancelled() else None)

    def _enqueue_later(self, name: str, task: CaptionTask, result: Future) -> None:
        def enqueue() -> None:
            if result.cancelled():
                return
            try:
                self._enqueue(name, task, result)
            except Exception as error:
                _finish(result, error=error)

        self.decoders.submit(enqueue)

    async def caption(
        self, name: str | None, read: Callable[[], CaptionInput], make_task: Callable[[CaptionInput], CaptionTask]
    ) -> CaptionResult:
        """The same for coroutines. Cancelling it takes the request out of the queue."""
        return await asyncio.wrap_future(self.submit(name, read, make_task))

    def _run(self, key: tuple, tasks: list[CaptionTask]) -> Sequence[CaptionResult | Exception]:
        return self.captioners[key[0]].caption(tasks)

    def close(self) -> None:
        """Finishes what waits, and ends the threads."""
        self.decoders.shutdown(wait=True)
        self.batcher.close()


def _finish(result: Future, *, value: Any = None, error: BaseException | None = None) -> None:
    """Sets a future that a user may have cancelled meanwhile."""
    with suppress(InvalidStateError):
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)
