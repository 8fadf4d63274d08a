"""`difnet caption --output` and `difnet extract --format parquet`: plan, run, and what is printed of them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..files import printable
from .forecast import Forecast, forecast
from .inputs import InputConfig, plan_shards
from .processes import local_rank, part_of, part_of_process
from .rows import RowMaker
from .run import RunSummary, process_shards

if TYPE_CHECKING:
    from .ray_engine import RayConfig

PROCESSES = (1, 8, 64)  # that a forecast is made for


def process_many(
    maker: RowMaker,
    inputs: InputConfig,
    output: str,
    *,
    format: str = "parquet",
    shard: str | None = None,
    retry_errors: bool = False,
    strict: bool = False,
    ray: RayConfig | None = None,
) -> int:
    """Makes the rows of all images, or of this process's part of them, and says what came of it.

    Args:
        maker: networks and options.
        inputs: the images.
        output: path or URL of the folder.
        format: "parquet" or "jsonl".
        shard: "I/N", this process's part; by default as a launcher says.
        retry_errors: whether shards with errors are done again.
        strict: whether a row with an error makes the exit code 2.
        ray: the cluster whose workers do the work; by default this process does.

    Returns:
        The exit code.

    Raises:
        ValueError: a mistake, shards whose inputs could not be read, or not one image could be used.
    """
    if ray is not None:
        from .ray_engine import process_shards_on_ray

        summary = process_shards_on_ray(maker, inputs, output, ray, format=format, retry_errors=retry_errors)
        return report(summary, output, strict)
    process = part_of_process(os.environ) if shard is None else part_of(shard)
    maker = on_device_of_process(maker)
    summary = process_shards(maker, inputs, output, format=format, process=process, retry_errors=retry_errors)
    return report(summary, output, strict)


def on_device_of_process(maker: RowMaker) -> RowMaker:
    """The maker on this process's GPU, where a launcher has started several processes on one machine."""
    count = torch.cuda.device_count()
    if count < 2 or maker.config.device is not None:
        return maker
    make: Any = type(maker)
    return make(replace(maker.config, device=f"cuda:{local_rank(os.environ) % count}"))


def report(summary: RunSummary, output: str, strict: bool = False) -> int:
    """Prints what was done and what is left, and gives the exit code.

    Raises:
        ValueError: inputs could not be read, or not one image could be captioned.
    """
    shown = printable(output, 300)
    for line in summary.examples:
        print(f"error: {printable(line, 500)}")
    images, errors = summary.images_of_part, summary.errors_of_part
    more = errors - len(summary.examples)
    if more > 0:
        print(f"and {more:,} more rows with an error")
    if errors:
        print("--retry-errors does the shards with errors again")
    for line in summary.duplicates:
        print(f"duplicate: {printable(line, 500)}")
    if summary.num_duplicates:
        print(
            f"{summary.num_duplicates:,} images have the key of another one: within a shard the first is done, in "
            "several shards each; --key-column names a column of other keys"
        )
    now = "" if summary.images == images else f" ({summary.images:,} of them now)"
    print(f"{images:,} images{now}, {errors:,} of them with an error, in {shown}")
    left = summary.shards - summary.finished
    print(f"{summary.finished:,} of {summary.shards:,} shards are finished" + (f", {left:,} are left" if left else ""))
    if summary.failures:
        raise ValueError(
            f"{len(summary.failures):,} shards could not be read; the same command tries them again: "
            + "; ".join(summary.failures[:3])
        )
    if images and errors == images:
        raise ValueError(f"nothing could be done: all {images:,} images have an error")
    return 2 if strict and errors else 0


def print_plan(maker: RowMaker, inputs: InputConfig, *, sample: int, price_per_hour: float | None = None) -> int:
    """Measures a sample and prints what the whole will take, on one process and on several.

    Args:
        maker: networks and options.
        inputs: the images.
        sample: images to measure.
        price_per_hour: of one process's machine or GPU.

    Returns:
        The exit code.

    Raises:
        ValueError: there is nothing to measure: no image of the sample can be used.
    """
    shards = plan_shards(inputs)
    found = forecast(maker, inputs, shards, sample)
    for line in found.examples:
        print(f"error: {printable(line, 500)}")
    size = f", {size_text(found.images * found.bytes_in)}" if found.bytes_in else ""  # of URLs it is not known
    print(f"{found.images:,} images in {found.shards:,} shards{size}")
    print(f"measured: {found.sampled:,} images, {found.errors:,} with an error, on {maker.device}")
    for name, seconds in sorted(found.seconds.items(), key=lambda each: -each[1]):
        beside = found.seconds_beside.get(name, 0.0)
        more = f" (and {beside * 1000:.2f} ms beside)" if beside else ""
        print(f"  {name}: {seconds * 1000:.2f} ms an image, {seconds / found.seconds_of_image:.0%}{more}")
    for number in PROCESSES:
        print(line_of(found.scaled(number), price_per_hour))
    print(f"output: {size_text(found.images * found.bytes_out)}")
    return 0


def line_of(found: Forecast, price_per_hour: float | None = None) -> str:
    """A forecast as a line."""
    number = found.num_processes
    hours = found.total_seconds / 3600
    cost = "" if price_per_hour is None else f", costs {hours * number * price_per_hour:,.2f}"
    return (
        f"{number:,} process{'es' if number > 1 else ''}: {duration_text(found.total_seconds)}, "
        f"{found.images_per_second:,.2f} images/s, limited by: {found.bottleneck}{cost}"
    )


def duration_text(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"


def size_text(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
