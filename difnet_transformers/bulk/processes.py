"""Which part of the shards a process takes: as `--shard` says, or as a launcher says in the environment.

`torchrun` and `accelerate launch` set RANK and WORLD_SIZE, `srun` SLURM_PROCID and SLURM_NTASKS, an array job
SLURM_ARRAY_TASK_ID. An array of jobs that launch several processes each counts both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


def part_of(text: str) -> tuple[int, int]:
    """Number and count of `I/N`, such as "0/8".

    Raises:
        ValueError: it is no part.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([1-9][0-9]{0,8})", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"--shard is I/N, with I from 0 to N - 1, such as 0/8; not {text[:40]!r}")
    return int(match[1]), int(match[2])


def part_of_process(environment: Mapping[str, str]) -> tuple[int, int]:
    """Number and count of this process among those that a launcher has started; (0, 1) without one.

    Raises:
        ValueError: an array job has gaps, so that its tasks do not say which part is theirs.
    """
    index, count = 0, 1
    for number, total in (_array_task(environment), _rank(environment)):
        index, count = index * total + number, count * total
    return index, count


def _array_task(environment: Mapping[str, str]) -> tuple[int, int]:
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return 0, 1
    task, first, last, count = (
        int(environment.get(f"SLURM_ARRAY_TASK_{name}") or 0) for name in ("ID", "MIN", "MAX", "COUNT")
    )
    step = int(environment.get("SLURM_ARRAY_TASK_STEP") or 1)
    if count < 1 or (last - first) // step + 1 != count or (task - first) % step:
        raise ValueError("the tasks of this array job have gaps; say which part is whose: --shard I/N")
    return (task - first) // step, count


def _rank(environment: Mapping[str, str]) -> tuple[int, int]:
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in environment and size in environment:
            return int(environment[rank]), int(environment[size])
    return 0, 1


def local_rank(environment: Mapping[str, str]) -> int:
    """Number of this process on its machine, for the choice of a GPU."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if name in environment:
            return int(environment[name])
    return 0
