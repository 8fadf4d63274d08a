"""Images on their way through the feature networks: decoded and prepared in threads beside them, batched where sizes
are equal.

The original (mrwu-mac/DIFNet, CVPR 2022) begins with feature files.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from modeling_difnet.images_difnet import unusual_size
from modeling_difnet.pipeline_difnet import GridBackbone, Segmenter

from ..command_line import requires

with requires("images"):
    from PIL import Image

Item = TypeVar("Item")
Result = TypeVar("Result")

DECODING = "decoding"
"""Name of the stage of files, with what is done to an image before the first layer of a network."""

# The network gets the other half of the cores.
NUM_THREADS = max(1, min(4, (os.cpu_count() or 1) // 2))
NUM_AHEAD = 2 * NUM_THREADS + 2
MAX_BYTES_AHEAD = 2**28
"""Decoded images that wait for the network; one photograph of 12 megapixels takes 36 MB."""


class LoadedImage(NamedTuple):
    """An image that is ready for the networks.

    Args:
        image: RGB; `None` where only the grid backbone needs it.
        pixel_values: the grid backbone's input (1, 3, H, W); `None` without one.
        segmentation_inputs: those of the segmentation model; `None` without one.
        remark: on an unusual size.
    """

    image: Image.Image | None
    pixel_values: torch.Tensor | None
    segmentation_inputs: Mapping[str, Any] | None
    remark: str | None

    @property
    def num_bytes(self) -> int:
        image = 0 if self.image is None else 3 * self.image.width * self.image.height
        values = [self.pixel_values, *(self.segmentation_inputs or {}).values()]
        return image + sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def load_image(
    image: Image.Image, backbone: GridBackbone | None, segmenter: Segmenter | None = None, keep: bool = True
) -> LoadedImage:
    """An open image and what the networks make of it before their first layers.

    Args:
        image: RGB.
        backbone, segmenter: the networks, as far as there are any.
        keep: whether the image itself is needed later.

    Raises:
        ValueError: a network cannot take it.
    """
    pixel_values = None if backbone is None else backbone.preprocess(image)
    inputs = None if segmenter is None else segmenter.prepare(image)
    return LoadedImage(image if keep else None, pixel_values, inputs, unusual_size(image))


def prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_bytes: Callable[[Any], int] = lambda result: 0,
    num_threads: int = NUM_THREADS,
) -> Generator[Result | Exception, None, None]:
    """`function` of every item in order, computed in threads a few items ahead of the consumer.

    Args:
        function: runs in threads; may raise anything.
        items: its arguments, which are taken in the consumer's thread when their turn comes.
        num_bytes: of a result. While about `MAX_BYTES_AHEAD` wait, nothing further is begun.
        num_threads: that run beside the consumer's; 0 for none.

    Yields:
        What `function` returned for an item, or the exception that it raised.
    """
    if num_threads == 0:
        for item in items:
            try:
                result: Result | Exception = function(item)
            except Exception as problem:
                result = problem
            yield result
        return
    executor = ThreadPoolExecutor(num_threads, thread_name_prefix="prefetch")
    waiting: deque[Future[Result]] = deque()
    remaining = iter(items)
    is_exhausted = False
    num_ahead = max(NUM_AHEAD, 2 * num_threads + 2)
    expected = MAX_BYTES_AHEAD / num_threads  # of a result that is not there yet: as much as the one before

    def bytes_of(future: Future[Result]) -> float:
        if not future.done():
            return expected
        return 0 if future.exception() is not None else num_bytes(future.result())

    try:
        while waiting or not is_exhausted:
            while not is_exhausted and len(waiting) < num_ahead:
                if waiting and sum(map(bytes_of, waiting)) > MAX_BYTES_AHEAD:
                    break
                try:
                    item = next(remaining)
                except StopIteration:
                    is_exhausted = True
                    break
                waiting.append(executor.submit(function, item))
            if not waiting:
                break
            future = waiting.popleft()
            error = future.exception()  # waits
            if error is None:
                expected = num_bytes(future.result())
                yield future.result()
            elif isinstance(error, Exception):
                yield error
            else:
                raise error
            del future, error  # or the image would live until the next one is taken
    finally:
        # After an interruption the threads end with the images that they have begun.
        executor.shutdown(wait=False, cancel_futures=True)


def one_ahead(results: Generator[Result, None, None]) -> Generator[Result, None, None]:
    """What a generator yields, in order; a thread is at the next one while the consumer has one.

    Args:
        results: is closed at the end, when the thread is through with the one that it is at.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    end = object()
    try:
        following: Future[Any] = executor.submit(next, results, end)
        while (result := following.result()) is not end:
            following = executor.submit(next, results, end)
            yield result
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        results.close()


def grid_features_of(backbone: GridBackbone, images: Sequence[LoadedImage]) -> list[np.ndarray | Exception]:
    """The grid features (cells, C) of images, or in the place of an image the error that it causes.

    Args:
        backbone: the network.
        images: those whose prepared forms have one size run as one batch.
    """
    pixel_values = [image.pixel_values for image in images if image.pixel_values is not None]
    features: list[np.ndarray | Exception | None] = [None] * len(pixel_values)
    for size in dict.fromkeys(each.shape for each in pixel_values):
        places = [place for place, each in enumerate(pixel_values) if each.shape == size]
        if len(places) > 1:
            # Where a batch fails, its images show one by one which of them it is.
            with suppress(Exception):
                batch = backbone.pooled_features(torch.cat([pixel_values[place] for place in places]))
                for place, grid in zip(places, batch.cpu().numpy(), strict=True):  # (cells, C)
                    features[place] = grid
                continue
        for place in places:
            try:
                features[place] = backbone.pooled_features(pixel_values[place])[0].cpu().numpy()
            except Exception as error:
                features[place] = error
    return [each for each in features if each is not None]
