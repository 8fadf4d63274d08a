"""The work on many images, shard by shard: what is finished is never done again, what changed is noticed.

Every process makes the same plan and takes its part of the shards; nothing is sent between processes. Where several
have the same part, and the output is on a disk, they share it by locks. A killed process loses the shard it was at.
The original (mrwu-mac/DIFNet, CVPR 2022) has nothing that corresponds.
"""

from __future__ import annotations

import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

from tqdm import tqdm

from ..command_line import describe
from ..files import sha256_of
from ..progress import progress_bar
from ..stage_times import StageTimes
from .inputs import InputConfig, InputShard, plan_shards
from .outputs import WRITING, OutputFolder, RowWriter, data_name, manifest_name
from .readers import ImageItem, read_shard
from .records import NUM_LISTED, RunSummary, begin, finish, finished_shards, forget
from .rows import RowMaker

ATTEMPTS = 3  # at a shard whose input cannot be read for now
SECONDS_BETWEEN_ATTEMPTS = 2.0
SECONDS_BETWEEN_LOOKS = 1.0  # at shards that other processes are working on
PACKAGES = ("torch", "transformers", "pillow", "pyarrow")


class UnreadableShard(OSError):
    """The input of a shard cannot be read for now."""


# One shard


def process_shard(
    maker: RowMaker,
    shard: InputShard,
    inputs: InputConfig,
    output: OutputFolder,
    num_shards: int,
    *,
    format: str = "parquet",
    identity: str = "",
    times: StageTimes | None = None,
    update: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Makes the rows of a shard's images, writes them, and then the manifest that says so.

    Args:
        maker: networks and options.
        shard: of `plan_shards(inputs)`.
        inputs: what the shard is a part of.
        output: where the two files go.
        num_shards: of the plan.
        format: "parquet" or "jsonl".
        identity: of the run, see `run_identity`.
        times: gets the times of the stages.
        update: called after every row.

    Returns:
        The manifest.

    Raises:
        UnreadableShard: its input cannot be read for now.
        ValueError: the input is not what `inputs` says.
        OSError: the output cannot be written.
    """
    times = times or StageTimes()
    start, before = time.perf_counter(), dict(times.seconds)
    name = data_name(shard.index, num_shards, format, maker.what)
    duplicates: list[str] = []
    counts = {"images": 0, "errors": 0}
    examples: list[dict[str, str]] = []
    with output.writing(name) as path:
        with RowWriter(path, maker.schema, format, times) as writer:
            items = unique(readable(read_shard(shard, inputs), shard), duplicates)
            for row in maker.rows(items, times):
                counts["images"] += 1
                if row["error"] is not None:
                    counts["errors"] += 1
                    if len(examples) < NUM_LISTED:
                        examples.append({"key": row["key"], "error": row["error"]})
                writer.write(row)
                update()
        with times.stage(WRITING):
            size, digest = path.stat().st_size, sha256_of(path)
    manifest = {
        "shard": shard.index,
        "num_shards": num_shards,
        "input": shard.name,
        "input_fingerprint": shard.fingerprint,
        "identity": identity,
        "file": name,
        "bytes": size,
        "sha256": digest,
        **counts,
        "first_errors": examples,
        "duplicates": duplicates[:NUM_LISTED],
        "num_duplicates": len(duplicates),
        "batch_size": maker.batch_size,
        "device": str(maker.device),
        "host": platform.node(),
        "versions": versions(),
        "seconds": round(time.perf_counter() - start, 3),
        "stages": {
            stage: round(seconds - before.get(stage, 0.0), 3) for stage, seconds in times.seconds.items() if seconds
        },
    }
    with times.stage(WRITING):
        output.write_json(manifest_name(shard.index), manifest)
    return manifest


@cache
def versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def readable(items: Iterator[ImageItem], shard: InputShard) -> Iterator[ImageItem]:
    """The items, whose errors are told from those of networks and outputs.

    Raises:
        ValueError: a mistake in what was asked for.
        UnreadableShard: anything else, from a disk that is away to an expired token.
    """
    try:
        yield from items
    except ValueError:
        raise
    except Exception as error:
        said = describe(error).removeprefix(f"{shard.name}: ")
        raise UnreadableShard(f"{shard.name}: {said}") from error


def unique(items: Iterable[ImageItem], duplicates: list[str]) -> Iterator[ImageItem]:
    """The first item of each key; the keys of others go to `duplicates`."""
    keys: set[str] = set()
    for item in items:
        if item.key in keys:
            duplicates.append(item.key)
        else:
            keys.add(item.key)
            yield item


# All shards


def process_shards(
    maker: RowMaker,
    inputs: InputConfig,
    place: str,
    *,
    format: str = "parquet",
    process: tuple[int, int] = (0, 1),
    retry_errors: bool = False,
) -> RunSummary:
    """Makes the rows of all images that are in no finished shard yet, or of this process's part of them.

    Args:
        maker: networks and options.
        inputs: the images.
        place: the output's path or URL.
        format: "parquet" or "jsonl".
        process: number of this process, from 0, and number of all.
        retry_errors: whether shards with errors are done again.

    Raises:
        ValueError: inputs, model or options are not those that the output was begun with; the text names what changed.
    """
    shards = plan_shards(inputs)
    output = OutputFolder(place)
    identity = begin(output, inputs, shards, maker, format)
    number, count = process
    mine = shards[number::count]
    manifests = finished_shards(output, mine, len(shards), identity, format, maker.what)
    todo = [
        shard
        for shard in mine
        if shard.index not in manifests or (retry_errors and manifests[shard.index].get("errors"))
    ]
    summary = RunSummary(len(shards))
    if len(todo) < len(mine):
        tqdm.write(f"{len(mine) - len(todo):,} of {len(mine):,} shards are finished already", file=sys.stderr)
    redone = {shard.index for shard in todo if shard.index in manifests}
    times = StageTimes()
    known = [manifest["images"] for manifest in manifests.values()]
    with _Progress(maker.what, todo, known, count, times) as progress:

        def work(shard: InputShard) -> dict[str, Any]:
            return process_shard(
                maker, shard, inputs, output, len(shards),
                format=format, identity=identity, times=times, update=progress.update,
            )  # fmt: skip

        def is_finished(shard: InputShard) -> bool:
            can_be = output.local is not None and shard.index not in redone
            return can_be and bool(finished_shards(output, [shard], len(shards), identity, format, maker.what))

        try:
            for shard, manifest in each_once(todo, output, work, is_finished, summary.failures):
                progress.finished(shard, None if manifest is None else manifest["images"])
                if manifest is not None:
                    summary.add(manifest)
        except ValueError:
            forget(output)
            raise
    if summary.images:
        times.print_summary(summary.images)
    finish(output, shards, mine, identity, format, maker.what, summary)
    return summary


def each_once(
    shards: Sequence[InputShard],
    output: OutputFolder,
    work: Callable[[InputShard], dict[str, Any]],
    is_finished: Callable[[InputShard], bool],
    failures: list[str],
) -> Iterator[tuple[InputShard, dict[str, Any] | None]]:
    """Works on shards that no other process is at, and waits for the others.

    Args:
        shards: to do.
        output: which has the locks.
        work: on a shard; gives its manifest.
        is_finished: whether another process has done a shard meanwhile.
        failures: gets what could not be read in several attempts.

    Yields:
        Shards with their manifests; `None` for those that another process has finished meanwhile.
    """
    waiting, of_others = deque(shards), deque[InputShard]()
    attempts: dict[int, int] = {}
    while waiting or of_others:
        if not waiting:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            waiting, of_others = of_others, waiting
        shard = waiting.popleft()
        with output.lock(f"{shard.index:05d}") as has_lock:
            if not has_lock:
                of_others.append(shard)
                continue
            try:
                manifest = None if is_finished(shard) else work(shard)
            except UnreadableShard as error:
                attempts[shard.index] = attempts.get(shard.index, 0) + 1
                tqdm.write(f"attempt {attempts[shard.index]} of {ATTEMPTS}: {error}", file=sys.stderr)
                if attempts[shard.index] == ATTEMPTS:
                    failures.append(str(error))
                else:
                    time.sleep(SECONDS_BETWEEN_ATTEMPTS * attempts[shard.index])
                    waiting.append(shard)
                continue
        yield shard, manifest


class _Progress:
    """A bar over images whose number is known, or estimated from the shards that are finished."""

    def __init__(
        self, what: str, todo: Sequence[InputShard], known: Sequence[int], num_processes: int, times: StageTimes
    ) -> None:
        self.left_known = sum(shard.num_images or 0 for shard in todo)
        self.left_unknown = sum(shard.num_images is None for shard in todo)
        self.images_known, self.shards_known = sum(known), len(known)
        self.done = 0
        self.times = times
        name = what if num_processes == 1 else f"{what} (1 of {num_processes} processes)"
        self.bar = progress_bar(total=self._total(), unit=" images", desc=name, mininterval=0.5)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *rest: object) -> None:
        self.bar.close()

    def update(self) -> None:
        self.bar.update()
        if self.bar.n % 64 == 0:
            shares = [(name, each / self.times.total) for name, each in self.times.seconds.items()]
            said = ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)
            self.bar.set_postfix_str(said, refresh=False)

    def finished(self, shard: InputShard, num_images: int | None) -> None:
        """Counts a shard of this process; `num_images` is `None` of one that another process has finished."""
        self.left_known -= shard.num_images or 0
        self.left_unknown -= shard.num_images is None
        if num_images is not None:
            self.shards_known += 1
            self.images_known += num_images
            self.done += num_images
        self.bar.total = self._total()

    def _total(self) -> float | None:
        if self.left_unknown and not self.shards_known:
            return None
        mean = self.images_known / max(1, self.shards_known)
        return round(self.done + self.left_known + self.left_unknown * mean)
