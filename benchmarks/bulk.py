"""Captions of many images: two processes against one, what shards, keys and Parquet cost, and forecasts.

    python benchmarks/bulk.py [--images 6000] [--images-per-tar 500]

Small JPEG images in tars of WebDataset and tiny random networks, so that everything but the networks shows. Each
process is pinned to a core and has one thread. The overhead of shards, keys and Parquet is the time of a run without
that in the captioner, measured in the same run, and without that of reading the tars alone: a difference to another
run would mostly be what else the machine did. Beside it stands the same captioner on the files in memory, whose rows
are dropped, so that a run which slowed its captioner down would show. The last table computes what 10^6 and 10^8
images take on 1, 8 and 64 devices from seconds of each stage: those of docs/speed.md for networks of full size on a
CPU, and with `--speedup` for devices that are so many times as fast. The tables go to the terminal and to
benchmarks/results/.
"""

from __future__ import annotations

import cProfile
import io
import multiprocessing
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from common import (
    ROOT,
    add_output_option,
    header,
    load_module,
    make_parser,
    markdown_table,
    results_path,
    write_report,
)

from difnet_transformers.bulk.captioning import ImageCaptioner
from difnet_transformers.bulk.command import duration_text
from difnet_transformers.bulk.forecast import Forecast, forecast
from difnet_transformers.bulk.inputs import InputConfig, plan_shards
from difnet_transformers.bulk.readers import ImageItem, read_shard
from difnet_transformers.bulk.rows import Row
from difnet_transformers.bulk.run import process_shards
from difnet_transformers.stage_times import StageTimes

campaign = load_module("bulk_campaign", ROOT / "tests" / "bulk_campaign.py")

FORK = multiprocessing.get_context("fork")
OPTIONS = {"batch_size": 64, "num_beams": 5}
# docs/speed.md: seconds of an image on 2 cores of an AMD EPYC, bf16; a photograph of COCO has 160 kB.
FULL_SIZE = {"grid backbone": 0.499, "segmentation": 1.77, "captioning": 0.08, "decoding": 0.0, "writing": 0.0}
DECODING_BESIDE = 0.0125
PHOTOGRAPH = 160e3


def pin(number: int) -> None:
    """Gives a forked process one core and one thread, and hides its progress."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number]})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)


def run(model: Path, images: Path, output: Path, num_processes: int) -> float:
    """Seconds from the first shard to the last one, of processes that have their networks and a core each."""
    barrier, queue = FORK.Barrier(num_processes), FORK.SimpleQueue()

    def work(number: int) -> None:
        pin(number)
        captioner = ImageCaptioner(campaign.config_of(model, **OPTIONS))
        captioner([{"key": 0, "image": campaign.image_file(0)}])
        barrier.wait()
        begun = time.time()
        process_shards(captioner, InputConfig((str(images),)), str(output), process=(number, num_processes))
        queue.put((begun, time.time()))

    workers = [FORK.Process(target=work, args=(number,)) for number in range(num_processes)]
    for worker in workers:
        worker.start()
    times = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    return max(end for _, end in times) - min(begun for begun, _ in times)


def forecast_of(model: Path, images: Path, sample: int) -> Forecast:
    """What `--plan` computes, in a process like those of `run`."""
    queue = FORK.SimpleQueue()

    def work() -> None:
        pin(0)
        inputs = InputConfig((str(images),))
        captioner = ImageCaptioner(campaign.config_of(model, **OPTIONS))
        queue.put(forecast(captioner, inputs, plan_shards(inputs), sample))

    worker = FORK.Process(target=work)
    worker.start()
    found = queue.get()
    worker.join()
    return found


class TimedCaptioner(ImageCaptioner):
    """Measures the seconds in the captioner, without those in which it waits for its images."""

    seconds = 0.0

    def rows(
        self, items: Iterable[ImageItem], times: StageTimes | None = None, overlap: bool | None = None
    ) -> Iterator[Row]:
        def waited_for(items: Iterator[ImageItem]) -> Iterator[ImageItem]:
            while True:
                start = time.perf_counter()
                item = next(items, None)
                self.seconds -= time.perf_counter() - start
                if item is None:
                    return
                yield item

        rows = super().rows(waited_for(iter(items)), times, overlap)
        while True:
            start = time.perf_counter()
            row = next(rows, None)
            self.seconds += time.perf_counter() - start
            if row is None:
                return
            yield row


def overhead(model: Path, images: Path, folder: Path, repeats: int) -> tuple[dict[str, float], str]:
    """Seconds of the parts of a run, and of the captioner alone; and a profile of a run."""
    captioner, inputs = TimedCaptioner(campaign.config_of(model, **OPTIONS)), InputConfig((str(images),))
    seconds: dict[str, list[float]] = {"tars": [], "alone": [], "captioner": [], "all": [], "overhead": []}
    for number in range(repeats + 1):  # the first is a warm-up
        start = time.perf_counter()
        items = [item for shard in plan_shards(inputs) for item in read_shard(shard, inputs)]
        tars = time.perf_counter() - start
        captioner.seconds = 0.0
        for _ in captioner.rows(iter(items)):
            pass
        alone, captioner.seconds = captioner.seconds, 0.0
        del items
        start = time.perf_counter()
        process_shards(captioner, inputs, str(folder / f"overhead{number}"))
        whole = time.perf_counter() - start
        if number:
            times = tars, alone, captioner.seconds, whole, whole - captioner.seconds - tars
            for name, each in zip(seconds, times, strict=True):
                seconds[name].append(each)
    profile = cProfile.Profile()
    profile.runcall(process_shards, captioner, inputs, str(folder / "profile"))
    text = io.StringIO()
    stats = pstats.Stats(profile, stream=text).strip_dirs()
    stats.sort_stats("tottime").print_stats(15)
    stats.sort_stats("cumtime").print_stats(
        "run.py|readers.py|outputs.py|captioning.py|rows.py|files.py|tarfile.py", 30
    )
    return {name: statistics.median(each) for name, each in seconds.items()}, text.getvalue()


def scaled_rows(speedup: float, bandwidth: float, price: float) -> list[list[str]]:
    one = Forecast(
        10**6, 1000, FULL_SIZE, {"decoding": DECODING_BESIDE}, bytes_in=PHOTOGRAPH, bytes_out=60, seconds_to_start=30
    )
    rows = []
    for factor in (1.0, speedup):
        for images in (10**6, 10**8):
            for processes in (1, 8, 64):
                found = one.scaled(processes, images, images // 1000, bandwidth, factor)
                hours = found.total_seconds / 3600
                rows.append(
                    [
                        "2 CPU cores" if factor == 1 else f"{factor:g} times as fast",
                        f"10^{len(str(images)) - 1}",
                        f"{processes}",
                        duration_text(found.total_seconds) if hours < 1000 else f"{hours / 24:,.0f} days",
                        f"{found.images_per_second:,.1f}",
                        f"{hours * processes * price:,.0f}",
                        found.bottleneck,
                    ]
                )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--images-per-tar", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sample", type=int, default=1024, help="images of the forecast (default: 1024)")
    parser.add_argument("--speedup", type=float, default=60.0, help="of the last table's faster devices (default: 60)")
    parser.add_argument("--bandwidth", type=float, default=1e9, help="bytes/s of the storage (default: 1e9)")
    parser.add_argument("--price", type=float, default=1.0, help="of a device and hour (default: 1)")
    add_output_option(parser)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = campaign.save_captioner(folder / "model")
        campaign.make_tars(folder / "tars", arguments.images, arguments.images_per_tar, broken=False)
        numbers = (1, 2) if len(os.sched_getaffinity(0)) > 1 else (1,)
        seconds: dict[int, list[float]] = {number: [] for number in numbers}
        said: dict[int, list[float]] = {number: [] for number in numbers}
        for repeat in range(arguments.repeats):
            expected = forecast_of(model, folder / "tars", arguments.sample)
            for number in numbers:
                seconds[number].append(run(model, folder / "tars", folder / f"out{number}-{repeat}", number))
                plan = expected.scaled(number)
                said[number].append(plan.total_seconds - plan.seconds_to_start)
        medians = {number: statistics.median(each) for number, each in seconds.items()}
        speed_rows = [
            [f"{number}", f"{each:.1f} s", f"{arguments.images / each:.0f}", f"{medians[1] / each:.2f}"]
            for number, each in medians.items()
        ]
        speed = markdown_table(["processes, one core each", "time", "images/s", "times as fast"], speed_rows)

        parts, profile = overhead(model, folder / "tars", folder, arguments.repeats)
        cost = markdown_table(
            ["", "ms an image", "of the captioner"],
            [
                [name, f"{1000 * each / arguments.images:.3f}", f"{each / parts['captioner']:.1%}"]
                for name, each in {
                    "captioner": parts["captioner"],
                    "reading the tars": parts["tars"],
                    "shards, keys and Parquet": parts["overhead"],
                    "all": parts["all"],
                    "captioner alone, files in memory": parts["alone"],
                }.items()
            ],
        )
        rows = []
        for number in numbers:
            errors = [each / measured - 1 for each, measured in zip(said[number], seconds[number], strict=True)]
            times = [duration_text(statistics.median(each)) for each in (said[number], seconds[number])]
            rows.append(
                [f"{number}", *times, f"{statistics.median(errors):+.1%}", f"{min(errors):+.1%} to {max(errors):+.1%}"]
            )
        forecasts = markdown_table(["processes", "forecast", "measured", "difference", "of single runs"], rows)
    scaled = markdown_table(
        ["device", "images", "devices", "time", "images/s", "cost", "limited by"],
        scaled_rows(arguments.speedup, arguments.bandwidth, arguments.price),
    )
    storage = f"{PHOTOGRAPH / 1e3:g} kB an image, {arguments.bandwidth / 1e9:g} GB/s of storage"
    sections = {
        f"{arguments.images:,} small images, tiny networks": speed,
        "Overhead": cost,
        f"Forecast from {arguments.sample} images": forecasts,
        f"Model of full size: {storage}, {arguments.price:g} a device and hour": scaled,
        "Profile": ["```text", *profile.strip().splitlines(), "```"],
    }
    lines = header("Captions of many images", "bulk.py", notes=[f"medians of {arguments.repeats} runs"])
    for title, section in sections.items():
        lines += [f"## {title}", "", *section, ""]
    write_report(lines, arguments.output or results_path("bulk", "cpu"))


if __name__ == "__main__":
    main()
