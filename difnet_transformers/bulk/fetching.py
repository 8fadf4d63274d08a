"""Images that lists and tables name by URL: fetched far ahead of the networks, and again where a server is busy.

The connections are those of `modeling_difnet.images_difnet.fetch`, to public hosts and of bounded sizes, and those of
fsspec, whose file systems try again by themselves. The original (mrwu-mac/DIFNet, CVPR 2022) fetches nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeAlias

from modeling_difnet.images_difnet import DOWNLOAD_TIMEOUT, UnavailableImage, UnreadableImage, fetch, is_url

from ..stage_times import StageTimes
from ..vision.image_batches import DECODING
from .places import is_web
from .readers import ImageItem, content_of

ATTEMPTS = 3  # at an image
PAUSE = 1.0  # seconds before the second attempt; before the third twice as long
LONGEST_PAUSE = 10.0  # seconds; where a server asks for more, there is no other attempt
SECONDS = 60.0  # of an image, with all attempts
ITEMS_AHEAD = 512
BYTES_AHEAD = 2**28

Content: TypeAlias = bytes | str | Exception


class Fetcher:
    """Puts the contents of images in the place of their URLs, in their order.

    Threads fetch while the networks work, so far ahead that a server that does not answer keeps nobody waiting. Python
    waits for the threads of a pool before it ends, also after Ctrl-C, and a download cannot be stopped: these threads
    are daemons, and end with the block.

    Args:
        allow_private_hosts: whether a URL may lead to this machine or a private network.
        num_threads: that fetch; 0 for none beside the caller's.
        times: gets their time, as a part of `DECODING`.
    """

    def __init__(
        self, allow_private_hosts: bool = False, num_threads: int = 0, times: StageTimes | None = None
    ) -> None:
        self.allow_private_hosts = allow_private_hosts
        self.num_threads = num_threads
        self.times = times or StageTimes()
        self._closed = threading.Event()
        self._queue: SimpleQueue[tuple[str, Future[Content]] | None] = SimpleQueue()
        self._waiting: deque[tuple[ImageItem, Future[Content] | None]] = deque()
        self._is_running = False
        self._room = threading.Condition()
        self._bytes_ahead = 0  # that were fetched and not taken
        self._bytes_between = 0  # of items without a URL behind one with a URL

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *rest: object) -> None:
        self._closed.set()
        for _, download in tuple(self._waiting):
            if download is not None:
                download.cancel()  # and who waits for it gets a CancelledError
        for _ in range(self.num_threads):
            self._queue.put(None)
        with self._room:
            self._room.notify_all()

    def fetched(self, items: Iterable[ImageItem]) -> Iterator[ImageItem]:
        """The items with contents, or with what is wrong, in the place of URLs; paths on a disk stay."""
        waiting = self._waiting
        for item in items:
            is_remote = isinstance(item.content, str) and (is_url(item.content) or "://" in item.content)
            if not (is_remote or waiting):
                yield item
                continue
            self._bytes_between += size_of(item.content)
            download = self._begin(str(item.content)) if is_remote else None
            waiting.append((item, download))
            if download is not None and self._closed.is_set():
                download.cancel()
            while waiting:
                first = waiting[0][1]
                is_full = len(waiting) > ITEMS_AHEAD or self._bytes_between > BYTES_AHEAD
                if not (is_full or first is None or first.done()):
                    break
                yield self._first()
        while waiting:
            yield self._first()

    def fetch(self, place: str) -> bytes | str:
        """The content of a URL, in several attempts if need be; of one that leads to a file on a disk its path.

        Raises:
            UnreadableImage: nothing came; see `modeling_difnet.images_difnet.fetch` and `content_of`.
        """
        if not is_web(place):
            return content_of(place)
        ends = time.monotonic() + SECONDS
        attempt = 1
        while True:
            seconds = min(DOWNLOAD_TIMEOUT, ends - time.monotonic())
            try:
                return fetch(place, self.allow_private_hosts, seconds=seconds)
            except UnavailableImage as error:
                pause = PAUSE * 2 ** (attempt - 1) if error.pause is None else error.pause
                is_last = attempt == ATTEMPTS or pause > LONGEST_PAUSE or time.monotonic() + pause >= ends
                if is_last or self._closed.wait(pause):
                    raise UnavailableImage(f"{error} ({attempt} attempts)" if attempt > 1 else str(error)) from None
            except UnreadableImage as error:
                raise UnreadableImage(
                    str(error).replace("allow_private_hosts=True", "--allow-private-hosts")
                ) from None
            attempt += 1

    def _begin(self, place: str) -> Future[Content]:
        download: Future[Content] = Future()
        if self.num_threads == 0:
            download.set_result(self._content(place))
            return download
        if not self._is_running:
            self._is_running = True
            for number in range(self.num_threads):
                threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True).start()
        self._queue.put((place, download))
        return download

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            with self._room:  # what is waited for was begun before what fills the memory
                self._room.wait_for(lambda: self._bytes_ahead <= BYTES_AHEAD or self._closed.is_set())
            if self._closed.is_set():
                return
            place, download = job
            with self.times.stage(DECODING, beside=True):
                content = self._content(place)
            with self._room:
                self._bytes_ahead += size_of(content)
            with suppress(InvalidStateError):  # cancelled
                download.set_result(content)

    def _content(self, place: str) -> Content:
        try:
            return self.fetch(place)
        except Exception as error:
            return error

    def _first(self) -> ImageItem:
        item, download = self._waiting[0]  # where `__exit__` finds it
        content = item.content if download is None else download.result()
        self._waiting.popleft()
        if download is None:
            self._bytes_between -= size_of(content)
            return item
        with self._room:
            self._bytes_ahead -= size_of(content) if self.num_threads else 0
            self._room.notify_all()
        return item._replace(content=content)


def size_of(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else 0
