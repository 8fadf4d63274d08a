"""Options of commands that take many images: what they are, how they are cut into shards, and which part is whose."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path  # noqa: F401  (simple_parsing looks up the annotations of subclasses here)
from typing import TYPE_CHECKING

from simple_parsing import field

from ..files import printable
from ..options import check_at_least, option_name

if TYPE_CHECKING:
    from .inputs import InputConfig
    from .ray_engine import RayConfig

MANY = "many images"
OF_PLAN = ("sample", "price_per_hour")
OF_RAY = ("address", "num_workers", "cpus_per_worker", "gpus_per_worker")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")


@dataclass(kw_only=True)
class ManyImagesOptions:
    """Options that `difnet caption` and `difnet extract` share; see `plan_shards` and `process_shards`."""

    plan: bool = field(
        default=False, group=MANY, help="work on a sample, say what all images will take, and write nothing"
    )
    sample: int = field(default=128, group=MANY, metavar="N", help="of --plan: images to measure")
    price_per_hour: float | None = field(
        default=None, group=MANY, metavar="X", help="of --plan: of one process's machine, for the cost"
    )
    shard: str | None = field(
        default=None, group=MANY, metavar="I/N", help="this process's part, I from 0 (default: as its launcher says)"
    )
    images_per_shard: int = field(
        default=1000, group=MANY, metavar="N", help="of folders, tables, lists and datasets; a tar is one shard"
    )
    input_kind: str = field(
        default="auto",
        group=MANY,
        choices=["auto", "images", "tar", "parquet", "list", "dataset"],
        help="what IMAGE names (default: by its name, and by what is there)",
    )
    image_column: str | None = field(
        default=None,
        group=MANY,
        metavar="NAME",
        help="of tables, the images or their paths or URLs; of tars, their suffix (default: the usual names)",
    )
    key_column: str | None = field(
        default=None, group=MANY, metavar="NAME", help="of tables (default: key, id, image_id, or the row's number)"
    )
    split: str | None = field(default=None, group=MANY, metavar="NAME", help="of a dataset that has several")
    dataset_config: str | None = field(default=None, group=MANY, metavar="NAME", help="of a dataset that has several")
    streaming: bool = field(default=False, group=MANY, help="read a dataset from where it lies, one file a shard")
    num_threads: int | None = field(
        default=None,
        group=MANY,
        metavar="N",
        help="that read and decode beside the networks; more for slow storage (default: half the cores, at most 4)",
    )
    engine: str = field(
        default="local", group=MANY, choices=["local", "ray"], help="ray: the workers of a Ray cluster do the shards"
    )
    address: str | None = field(
        default=None,
        group=MANY,
        metavar="HOST:PORT",
        help="of --engine ray: the cluster, or auto (default: RAY_ADDRESS, else workers on this machine)",
    )
    num_workers: str | None = field(
        default=None,
        group=MANY,
        metavar="N",
        help="of --engine ray: N or MIN-MAX (default: all that fit)",
    )
    cpus_per_worker: int = field(default=1, group=MANY, metavar="N", help="of --engine ray: cores, and threads")
    gpus_per_worker: float | None = field(
        default=None, group=MANY, metavar="X", help="of --engine ray: GPUs or a share (default: 1 if there are any)"
    )
    retry_errors: bool = field(default=False, group=MANY, help="do shards that have errors again")
    allow_private_hosts: bool = field(
        default=False, group=MANY, help="let URLs of lists lead to this machine or a private network"
    )

    def check_many(self, needs: str | None, places: list[str]) -> None:
        """For `__post_init__`.

        Args:
            needs: the option without which there are no shards, where it is not given.
            places: the inputs.

        Raises:
            ValueError: a number is too small, or an option belongs to another that is not given.
        """
        check_at_least(self, 1, "images_per_shard", "sample", "cpus_per_worker")
        check_at_least(self, 0, "num_threads")
        for entry in fields(ManyImagesOptions) if needs is not None else ():
            if getattr(self, entry.name) != entry.default:
                raise ValueError(f"{option_name(entry.name)} belongs to {needs}")
        for place in places if needs is not None else ():
            if place.lower().endswith((*TAR_SUFFIXES, *LIST_SUFFIXES, ".parquet")):
                raise ValueError(f"{printable(place, 300)}: tars, Parquet files and lists of images need {needs}")
        for entry in fields(ManyImagesOptions):
            if not self.plan and entry.name in OF_PLAN and getattr(self, entry.name) != entry.default:
                raise ValueError(f"{option_name(entry.name)} belongs to --plan")
            if self.plan and entry.name in ("shard", "retry_errors") and getattr(self, entry.name):
                raise ValueError(f"--plan is of all images: leave {option_name(entry.name)} out")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            raise ValueError(f"--price-per-hour must be a price, not {self.price_per_hour}")

        if self.engine == "local":
            for entry in fields(ManyImagesOptions):
                if entry.name in OF_RAY and getattr(self, entry.name) != entry.default:
                    raise ValueError(f"{option_name(entry.name)} belongs to --engine ray")
        elif self.shard is not None or self.plan:
            given = "--shard" if self.shard is not None else "--plan"
            raise ValueError(f"{given} and --engine ray do not go together")
        self.workers()
        if self.gpus_per_worker is not None and not 0 <= self.gpus_per_worker < 1000:
            raise ValueError(f"--gpus-per-worker must be at least 0, not {self.gpus_per_worker}")

    def workers(self) -> tuple[int, int] | None:
        """Least and largest number of Ray's workers.

        Raises:
            ValueError: --num-workers is neither a number nor two.
        """
        if self.num_workers is None:
            return None
        match = re.fullmatch(r"([1-9][0-9]{0,5})(?:-([1-9][0-9]{0,5}))?", self.num_workers)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"--num-workers is N or MIN-MAX, such as 8 or 2-16; not {self.num_workers[:40]!r}")
        return int(match[1]), int(match[2] or match[1])

    def ray_config(self) -> RayConfig | None:
        """The cluster; `None` where there is to be none."""
        if self.engine == "local":
            return None
        from .ray_engine import RayConfig

        return RayConfig(self.address, self.workers(), self.cpus_per_worker, self.gpus_per_worker)

    def inputs(self, places: list[str]) -> InputConfig:
        """The images that are named.

        Args:
            places: files, folders, URLs and datasets.
        """
        from .inputs import InputConfig

        return InputConfig(
            tuple(places),
            self.input_kind,
            self.images_per_shard,
            self.image_column,
            self.key_column,
            self.split,
            self.dataset_config,
            streaming=self.streaming,
        )
