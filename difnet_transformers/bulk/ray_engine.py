"""Ray: the work on many images shared out to the workers of a Ray cluster.

`process_shards_on_ray` does what `process_shards` does, with the same plan, outputs and manifests: each shard goes to
one of a pool of actors of Ray Data. Which actor gets it, actors that die, machines that come and go are Ray's; the
driver only finds what is not finished. `stages.py` has stages for pipelines of one's own. The original
(mrwu-mac/DIFNet, CVPR 2022) runs in one process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..command_line import describe, requires
from ..files import printable
from ..progress import progress_bar
from .inputs import InputConfig, InputShard, plan_shards
from .outputs import OutputFolder
from .records import RunSummary, begin, finish, finished_shards, forget
from .rows import RowMaker
from .run import each_once, process_shard

# Read when Ray is imported or started. What it would say of itself is in its logs, under /tmp/ray.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_enable_metrics_collection": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for name, value in QUIET.items():
    os.environ.setdefault(name, value)

with requires("ray"):
    import ray
    import ray.data

SECONDS_TO_CONNECT = 10
DEATHS_AT_A_SHARD = 10
MOST_BLOCKS = 10_000
HEAD_PORT = 6379  # of `ray start`


@dataclass(frozen=True)
class RayConfig:
    """The cluster, and what each worker gets of it.

    Args:
        address: "HOST:PORT" of a cluster, or "auto" for the one that this machine belongs to. By default what
            RAY_ADDRESS says, else a cluster of this machine alone, which ends with the program.
        num_workers: how many, or from how many to how many as Ray scales them. By default as many as fit now.
        cpus_per_worker: cores, which are also its threads of PyTorch unless OMP_NUM_THREADS says otherwise.
        gpus_per_worker: GPUs, or a share of one; by default 1 where the cluster has any.
    """

    address: str | None = None
    num_workers: tuple[int, int] | None = None
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None


def process_shards_on_ray(
    maker: RowMaker,
    inputs: InputConfig,
    place: str,
    config: RayConfig | None = None,
    *,
    format: str = "parquet",
    retry_errors: bool = False,
) -> RunSummary:
    """Makes the rows of all images that are in no finished shard yet, on the workers of a Ray cluster.

    Workers need the inputs, the model and the output under the names by which the driver knows them: URLs, or paths on
    a disk that all machines share. A worker that dies loses the shard that it was at, which another one does. When a
    driver dies Ray ends its workers; the same call does what is left.

    Args:
        maker: networks and options.
        inputs: the images.
        place: the output's path or URL.
        config: the cluster.
        format: "parquet" or "jsonl".
        retry_errors: whether shards with errors are done again.

    Raises:
        ValueError: there is no cluster, or as `process_shards`.
    """
    config = config or RayConfig()
    shards = plan_shards(inputs)
    output = OutputFolder(place)
    work = _Work(maker, inputs, place, format, len(shards), os.getcwd())
    with connected(config):
        resources = resources_of_worker(config)
        # Where the networks will run: a driver may have no GPU, and some precisions depend on that.
        identity = _result_of(ray.remote(_begin).options(**resources).remote(work, shards))
        manifests = finished_shards(output, shards, len(shards), identity, format, maker.what)
        todo = [
            shard
            for shard in shards
            if shard.index not in manifests or (retry_errors and manifests[shard.index].get("errors"))
        ]
        summary = RunSummary(len(shards))
        if len(todo) < len(shards):
            done = len(shards) - len(todo)
            tqdm.write(f"{done:,} of {len(shards):,} shards are finished already", file=sys.stderr)
        if todo:
            redone = frozenset(shard.index for shard in todo if shard.index in manifests)
            work = replace(work, identity=identity, redone=redone)
            workers = config.num_workers or (_num_that_fit(resources),) * 2
            try:
                for said in _results(work, todo, workers, resources):
                    summary.failures += said["failures"]
                    if said["manifest"] is not None:
                        summary.add(said["manifest"])
            except ValueError:
                forget(output)
                raise
    finish(output, shards, shards, identity, format, maker.what, summary)
    return summary


# In the driver


@contextlib.contextmanager
def connected(config: RayConfig) -> Iterator[None]:
    """A connection to a cluster, or a cluster of this machine, while the block runs.

    On this machine there are as many workers as are asked for, whatever its cores.

    Raises:
        ValueError: there is no cluster.
    """
    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    check_address(address)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    logging.getLogger("ray").setLevel(logging.ERROR)
    own: dict[str, Any] = {}
    if address == "local":
        cores = max(os.cpu_count() or 1, config.cpus_per_worker * (config.num_workers or (1, 1))[1])
        own = {"include_dashboard": False, "num_cpus": cores}
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(_no_cluster(address, describe(error))) from None
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Asks whether something answers at an address; Ray would try for minutes.

    Raises:
        ValueError: nothing does.
    """
    if address == "local":
        return
    if address == "auto":
        # Where Ray keeps the address of the cluster that was started last, also when it has been killed.
        known = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        with contextlib.suppress(OSError, UnicodeDecodeError):
            check_address(known.read_text(encoding="utf-8").strip())
        return
    match = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+?)\]?:([0-9]{1,5})", address)
    if match is None or int(match[2]) > 65535:
        raise ValueError(
            f"--address is HOST:PORT of a Ray cluster, such as 10.0.0.1:{HEAD_PORT}, or auto; "
            f"not {printable(address, 100)}"
        )
    try:
        socket.create_connection((match[1], int(match[2])), SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise ValueError(_no_cluster(address, error.strerror or str(error))) from None


def _no_cluster(address: str, reason: str) -> str:
    where = "on this machine" if address in ("local", "auto") else f"at {printable(address, 100)}"
    return (
        f"no Ray cluster {where} ({printable(' '.join(reason.split()), 200)}): start one with `ray start --head`, "
        "or leave --address out for workers on this machine"
    )


def resources_of_worker(config: RayConfig) -> dict[str, float]:
    """What a worker asks Ray for, as options of a task; says so where the cluster has no room for one."""
    cluster = ray.cluster_resources()
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.get("GPU", 0) >= 1 else 0.0
    resources = {"num_cpus": float(config.cpus_per_worker), "num_gpus": float(gpus)}
    if cluster.get("CPU", 0) < resources["num_cpus"] or cluster.get("GPU", 0) < gpus:
        said = f"{config.cpus_per_worker} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        tqdm.write(f"waiting until the cluster has room for a worker: {said}", file=sys.stderr)
    return resources


def _num_that_fit(resources: dict[str, float]) -> int:
    cluster = ray.cluster_resources()
    wanted = {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}
    return max(1, min(math.floor(cluster.get(name, 0) / number) for name, number in wanted.items() if number))


def _results(
    work: _Work, todo: Sequence[InputShard], workers: tuple[int, int], resources: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """What the workers tell of each shard, in the order in which they are done.

    Args:
        work: what they share.
        todo: the shards.
        workers: least and largest number.
        resources: of each.
    """
    least, most = (min(number, len(todo)) for number in workers)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Where the pool cannot grow, no worker has a second shard waiting that another could do.
    waiting: dict[str, Any] = {"max_tasks_in_flight_per_actor": 1} if least == most else {}
    pool = ray.data.ActorPoolStrategy(min_size=least, max_size=most, **waiting)
    plan = ray.data.from_items(
        [{"shard": json.dumps(asdict(shard))} for shard in todo], override_num_blocks=min(len(todo), MOST_BLOCKS)
    )
    results = plan.map_batches(
        _ShardActor,
        fn_constructor_args=(work,),
        batch_size=1,
        compute=pool,
        max_restarts=-1,
        max_task_retries=DEATHS_AT_A_SHARD,
        **resources,
    )
    images = 0
    with progress_bar(total=len(todo), unit=" shards", desc=f"{work.maker.what} on Ray", mininterval=0.5) as bar:
        try:
            for row in results.iter_rows():
                said = json.loads(row["said"])
                if said["error"] is not None:
                    raise ValueError(said["error"]) from RuntimeError(said["traceback"])
                images += said["manifest"]["images"] if said["manifest"] else 0
                bar.set_postfix_str(f"{images:,} images", refresh=False)
                bar.update()
                yield said
        except ray.exceptions.RayError as error:
            raise _cause_of(error) from error


def _result_of(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise _cause_of(error) from error


def _cause_of(error: BaseException) -> Exception:
    """What went wrong in a worker, out of what Ray wraps it in."""
    if isinstance(error, ray.exceptions.ActorDiedError | ray.exceptions.WorkerCrashedError):
        return ValueError(
            f"workers died at one shard {DEATHS_AT_A_SHARD} times, of memory or of a fault; finished shards are kept "
            f"({printable(' '.join(str(error).split()), 300)})"
        )
    inner: Any = error
    while (cause := getattr(inner, "cause", None) or inner.__cause__) is not None and cause is not inner:
        inner = cause
    return inner if isinstance(inner, Exception) else ValueError(str(inner))


# In the workers


@dataclass(frozen=True)
class _Work:
    """What the workers of a run share.

    Args:
        maker, inputs, place, format: as for `process_shards_on_ray`.
        num_shards: of the plan.
        folder: where the driver was started, in which relative paths begin.
        identity: of the run.
        redone: shards that are finished, and are done again.
    """

    maker: RowMaker
    inputs: InputConfig
    place: str
    format: str
    num_shards: int
    folder: str
    identity: str = ""
    redone: frozenset[int] = frozenset()

    def change_folder(self) -> None:
        with contextlib.suppress(OSError):
            os.chdir(self.folder)


def _begin(work: _Work, shards: Sequence[InputShard]) -> str:
    work.change_folder()
    return begin(OutputFolder(work.place), work.inputs, shards, work.maker, work.format)


def shard_of(text: str) -> InputShard:
    said = json.loads(text)
    return InputShard(**{**said, "files": tuple(said["files"])})


class _ShardActor:
    """Does the shards that Ray gives it, for `map_batches`."""

    def __init__(self, work: _Work) -> None:
        work.change_folder()
        self.work = work
        self.output = OutputFolder(work.place)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"said": [json.dumps(self.done(shard_of(text))) for text in batch["shard"]]}

    def done(self, shard: InputShard) -> dict[str, Any]:
        """Does a shard, unless a worker that Ray takes for dead, or another driver's, has done it.

        Returns:
            Its "manifest", or "failures" to read it, or the "error" that ends the run: of what a worker raises Ray
            would tell the driver the traceback alone.
        """
        found: dict[str, Any] = {"failures": [], "manifest": None, "error": None, "traceback": None}
        try:
            found["manifest"] = self._manifest_of(shard, found["failures"])
        except Exception as error:
            found |= {"error": describe(error), "traceback": traceback.format_exc()}
        return found

    def _manifest_of(self, shard: InputShard, failures: list[str]) -> dict[str, Any] | None:
        work, output = self.work, self.output

        def do(shard: InputShard) -> dict[str, Any]:
            return process_shard(
                work.maker, shard, work.inputs, output, work.num_shards, format=work.format, identity=work.identity
            )

        def manifest_of(shard: InputShard) -> dict[str, Any] | None:
            found = finished_shards(output, [shard], work.num_shards, work.identity, work.format, work.maker.what)
            return found.get(shard.index)

        def is_finished(shard: InputShard) -> bool:
            return shard.index not in work.redone and manifest_of(shard) is not None

        for _, manifest in each_once([shard], output, do, is_finished, failures):
            return manifest or manifest_of(shard)
        return None
