"""What the captioning of many images will take, from a sample of them: time, size, cost, and what limits it.

A sample of the images is captioned as the whole will be, its rows are written to a temporary file, and the seconds of
each stage are counted. `Forecast.scaled` computes what more processes change: networks run in each of them, the
inputs come through one line to the storage. The original (mrwu-mac/DIFNet, CVPR 2022) has nothing that corresponds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from ..files import printable
from ..progress import progress_bar
from ..stage_times import StageTimes
from ..vision.image_batches import NUM_THREADS
from .inputs import InputConfig, InputShard
from .outputs import WRITING, OutputFolder, RowWriter
from .places import file_system, is_local, is_web
from .readers import ImageItem, read_shard
from .records import NUM_LISTED
from .rows import RowMaker
from .run import process_shard, readable, unique
from .stored_features import StoredFeatures

SAMPLED_SHARDS = 4
WARM_UP = 2  # batches before the measured ones, in which libraries choose their kernels


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Args:
        images: in all shards, as far as they are known, else estimated.
        shards: number of them.
        seconds: of each stage, of the process that waits for it, for each image.
        seconds_beside: of the threads beside it, all of them together, for each image.
        num_threads: that work beside it.
        bytes_in, bytes_out: of an image file, and of its row.
        seconds_to_start: of the networks to load.
        seconds_of_shard: to open and close one, without its images.
        sampled: images that were measured.
        errors: how many of these cannot be captioned.
        examples: `key: error` of the first of these.
        num_processes: that share the shards.
        bandwidth: bytes a second that the storage gives to all processes together; `None` for no limit.
    """

    images: int
    shards: int
    seconds: dict[str, float]
    seconds_beside: dict[str, float] = field(default_factory=dict)
    num_threads: int = 1
    bytes_in: float = 0.0
    bytes_out: float = 0.0
    seconds_to_start: float = 0.0
    seconds_of_shard: float = 0.0
    sampled: int = 0
    errors: int = 0
    examples: tuple[str, ...] = ()
    num_processes: int = 1
    bandwidth: float | None = None

    @property
    def seconds_of_image(self) -> float:
        """Seconds of one process for each image, if nothing but its own stages limits it."""
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        """Of all processes together."""
        own = min(self.num_processes, self.shards) / self.seconds_of_image
        return own if self.bandwidth is None else min(own, self.bandwidth / max(1.0, self.bytes_in))

    @property
    def total_seconds(self) -> float:
        """From the start of the processes to the end of the last one, whose share of the shards is the largest."""
        largest_share = -(-self.shards // self.num_processes) / self.shards
        own = self.images * largest_share * self.seconds_of_image
        if self.bandwidth is not None:
            own = max(own, self.images * self.bytes_in / self.bandwidth)
        return self.seconds_to_start + own + self.shards * largest_share * self.seconds_of_shard

    @property
    def bottleneck(self) -> str:
        """The stage that takes the most time, or what else limits the whole."""
        if self.bandwidth is not None and self.bandwidth / max(1.0, self.bytes_in) < (
            self.num_processes / self.seconds_of_image
        ):
            return "bandwidth of the inputs"
        if self.shards < self.num_processes:
            return f"number of shards ({self.shards:,})"
        return max(self.seconds, key=lambda name: self.seconds[name])

    def scaled(
        self,
        num_processes: int,
        images: int | None = None,
        shards: int | None = None,
        bandwidth: float | None = None,
        speedup: float = 1.0,
    ) -> Forecast:
        """The forecast for more processes or images.

        Args:
            num_processes: that run at once, each as fast as the one that was measured.
            images, shards: by default those of the inputs.
            bandwidth: bytes a second that the storage gives to all.
            speedup: how many times as fast the networks are, on another device.
        """
        names = [name for name in self.seconds if name not in ("decoding", WRITING)]
        faster = {name: each / (speedup if name in names else 1) for name, each in self.seconds.items()}
        # A faster network waits for the threads beside it, which are as fast as before.
        beside = self.seconds_beside.get("decoding", 0.0) / max(1, self.num_threads)
        waiting = max(faster.get("decoding", 0.0), beside - sum(faster[name] for name in names))
        return replace(
            self,
            num_processes=num_processes,
            images=self.images if images is None else images,
            shards=self.shards if shards is None else shards,
            bandwidth=bandwidth,
            seconds={**faster, "decoding": waiting},
        )


def forecast(maker: RowMaker, inputs: InputConfig, shards: Sequence[InputShard], sample: int) -> Forecast:
    """Captions a sample and measures it.

    Args:
        maker: networks and options.
        inputs: what is to be captioned.
        shards: of `plan_shards(inputs)`.
        sample: number of images, taken from a few shards; a few more come before them.

    Raises:
        UnreadableShard: as `process_shard`.
        ValueError: as `process_shard`, or no image of the sample can be used.
    """
    begun = time.perf_counter()
    maker.identity()  # loads the networks
    seconds_to_start = time.perf_counter() - begun
    num_places = max(1, min(SAMPLED_SHARDS, len(shards), sample // maker.batch_size))
    places = [round(index * (len(shards) - 1) / max(1, num_places - 1)) for index in range(num_places)]
    sampled = [shards[place] for place in dict.fromkeys([*places, *range(len(shards))])]
    per_shard = -(-sample // (num_places * maker.batch_size)) * maker.batch_size  # whole batches
    num_warm = WARM_UP * maker.batch_size
    bytes_in, num_in = 0, 0

    def counted(items: Iterable[ImageItem]) -> Iterator[ImageItem]:
        nonlocal bytes_in, num_in
        for item in items:
            bytes_in += size_of(item)
            num_in += 1
            yield item

    errors, measured = 0, 0
    examples: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="difnet-") as work,
        progress_bar(total=sample, unit=" images", desc="measuring") as bar,
    ):
        output = OutputFolder(work)
        for _ in range(2):  # the first is slower
            begun = time.perf_counter()
            with output.lock("0"):
                process_shard(maker, InputShard(0, "images", "nothing"), inputs, output, 1)
            seconds_of_shard = time.perf_counter() - begun
        with RowWriter(Path(work, "warm-up"), maker.schema, "parquet") as writer:
            for row in maker.rows(islice(readable(read_shard(sampled[0], inputs), sampled[0]), num_warm)):
                writer.write(row)
        path = Path(work, "sample")
        times = StageTimes()
        with RowWriter(path, maker.schema, "parquet", times) as writer:
            for shard in sampled:
                if measured >= sample:
                    break
                items = counted(unique(readable(read_shard(shard, inputs), shard), []))
                for row in maker.rows(islice(items, per_shard), times):
                    writer.write(row)
                    if row["error"] is not None:
                        errors += 1
                        examples.append(f"{row['key']}: {row['error']}")
                    measured += 1
                    bar.update()
            writer.flush()
            total = times.total
        bytes_out = path.stat().st_size / max(1, measured)
    if errors == measured:
        said = f"all {measured:,} of the sample have an error, such as {examples[0]}" if examples else "no image"
        raise ValueError(f"nothing to measure in {printable(inputs.places[0], 300)}: {said}")
    stages = {name: each / max(1, measured) for name, each in times.seconds.items()}
    # What is between the stages: queues, rows, the loop itself.
    stages["other"] = max(0.0, total / max(1, measured) - sum(stages.values()))
    return Forecast(
        images=count_images(shards, inputs),
        shards=len(shards),
        seconds=stages,
        seconds_beside={name: each / max(1, measured) for name, each in times.seconds_beside.items()},
        num_threads=NUM_THREADS if maker.config.num_threads is None else maker.config.num_threads,
        bytes_in=bytes_in / max(1, num_in),
        bytes_out=bytes_out,
        seconds_to_start=seconds_to_start,
        seconds_of_shard=seconds_of_shard,
        sampled=measured,
        errors=errors,
        examples=tuple(examples[:NUM_LISTED]),
    )


def size_of(item: ImageItem) -> int:
    """Bytes of an image file; 0 where it is not known before it is fetched."""
    if isinstance(item.content, bytes):
        return len(item.content)
    if isinstance(item.content, StoredFeatures):
        return item.content.num_bytes
    if isinstance(item.content, str) and not is_web(item.content):
        try:
            fs, path = file_system(item.content)
            return fs.size(path) or 0
        except (OSError, ValueError):
            return 0
    return 0


def count_images(shards: Sequence[InputShard], inputs: InputConfig) -> int:
    """Images of all shards. Of tars one in the middle is counted, on a disk three; the others go by their sizes."""
    known = sum(shard.num_images or 0 for shard in shards)
    unknown = [shard for shard in shards if shard.num_images is None]
    if not unknown:
        return known
    middle = len(unknown) // 2
    places = {0, middle, len(unknown) - 1} if is_local(file_system(unknown[0].source)[0]) else {middle}
    counted = [unknown[place] for place in sorted(places)]
    found = sum(1 for shard in counted for _ in read_shard(shard, inputs))
    sizes, counted_sizes = ([shard.num_bytes or 0 for shard in each] for each in (unknown, counted))
    share = sum(sizes) / sum(counted_sizes) if all(sizes) else len(unknown) / len(counted)
    return known + round(found * share)
