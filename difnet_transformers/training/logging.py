"""The log of a training run: metrics of every interval, and the error when they are no longer numbers.

The original (mrwu-mac/DIFNet, CVPR 2022) logs the losses, once an epoch, to TensorBoard.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from ..files import name_file_in_errors
from .checkpoint import Progress

OF_CAPTIONS = ("caption_length", "unfinished", "bad_endings")


class TrainingFailed(RuntimeError):
    """The loss or the reward has become useless, so that the run cannot continue."""


class Log:
    """The metrics of every interval: to the terminal, to the trackers and to `log.jsonl`, one JSON object a line.

    Sums are kept on the device and read when a line is due, so that logging does not wait for the device at every
    step. A resumed run cuts the file where its checkpoint was made.

    Args:
        accelerator: of the run.
        path: `log.jsonl`.
        progress: where the run stands; every line says it, and `log_bytes` follows the file.
        on_each_node: whether every machine has the file, on a disk of its own.
    """

    def __init__(self, accelerator: Accelerator, path: Path, progress: Progress, on_each_node: bool = False):
        self.accelerator, self.path, self.progress = accelerator, path, progress
        self.on_each_node = on_each_node
        self.writes = accelerator.is_local_main_process if on_each_node else accelerator.is_main_process
        if self.writes:
            with path.open("ab") as file:
                # Never made longer: that would fill it with NUL characters.
                progress.log_bytes = min(progress.log_bytes, file.tell())
                file.truncate(progress.log_bytes)
        self.reset()

    def reset(self) -> None:
        """Begins an interval."""
        self.sums: dict[str, torch.Tensor | float] = {}
        self.steps = 0
        self.seconds = dict.fromkeys(("data", "decoding", "reward", "backward"), 0.0)
        self.started = time.perf_counter()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Counts the time of the block towards "data", "decoding", "reward" or "backward"."""
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started

    def add(self, **sums: torch.Tensor | float) -> None:
        """Adds to the interval's sums, by name."""
        for name, value in sums.items():
            if isinstance(value, torch.Tensor):
                value = value.detach().double()
            self.sums[name] = self.sums.get(name, 0) + value

    def totals(self) -> dict[str, float]:
        """The sums since the last line, over all processes."""
        names = sorted(self.sums)
        if not names:
            return {}
        device = self.accelerator.device
        sums = torch.stack([torch.as_tensor(self.sums[name], dtype=torch.float64, device=device) for name in names])
        sums = self.accelerator.reduce(sums, "sum")
        return dict(zip(names, sums.tolist(), strict=True))

    def check_finite(self) -> dict[str, float]:
        """`totals`, which are all numbers.

        Raises:
            TrainingFailed: one of them is not.
        """
        totals = self.totals()
        for name, value in totals.items():
            if not math.isfinite(value):
                progress, folder = self.progress, self.path.parent
                raise TrainingFailed(
                    f"{name} is {value} ({progress.stage} epoch {progress.epoch}, near step {progress.step}). The "
                    f"checkpoints in {folder} are from before and good. Start again from one (--model "
                    f"{folder / 'last'}, another --output) with a lower learning rate or --max-grad-norm 1, and "
                    "--mixed-precision bf16 where it was fp16; look for features that are not "
                    "numbers with difnet pack --verify."
                )
        return totals

    def train_line(self, learning_rate: float) -> dict[str, Any]:
        """Writes the line of the interval that ends here, and returns it."""
        totals, processes = self.check_finite(), self.accelerator.num_processes
        elapsed = time.perf_counter() - self.started
        line = {
            "loss": totals["loss"] / self.steps,
            **({"cross_entropy": totals["cross_entropy"] / self.steps} if "cross_entropy" in totals else {}),
            "learning_rate": learning_rate,
            "gradient_norm": totals.get("gradient_norm", 0.0) / self.steps / processes,
        }
        if "captions" in totals:
            of_rewards = sorted(name for name in totals if name.startswith("reward_") and name != "reward_spread")
            for name in ("reward", *of_rewards, "baseline", "reward_spread", *OF_CAPTIONS):
                line[name] = totals[name] / totals["captions"]
        if "tokens" in totals:
            line |= {name: totals[name] / totals["tokens"] for name in ("kl", "entropy") if name in totals}
        line["images_per_second"] = totals["images"] / elapsed
        line |= {f"share_{name}": seconds / elapsed for name, seconds in self.seconds.items()}
        self.write("train", line)
        self.reset()
        return line

    def write(self, event: str, metrics: dict[str, Any]) -> None:
        """Writes a line.

        Args:
            event: "train" or "validation".
            metrics: by name.
        """
        progress = self.progress
        place = {"event": event, "stage": progress.stage, "epoch": progress.epoch, "step": progress.step}
        line = json.dumps({**place, **metrics})
        if self.on_each_node:
            (line,) = broadcast_object_list([line])  # the times differ between processes, the files must not
        if self.writes:
            with name_file_in_errors(self.path), self.path.open("ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                progress.log_bytes = file.tell()
        if self.accelerator.is_main_process:
            where = f"{progress.stage} epoch {progress.epoch} step {progress.step}"
            tqdm.write(f"{where} {event}: {readable(metrics)}")
        self.accelerator.log(
            {f"{progress.stage}/{event}/{name}": value for name, value in metrics.items()}, step=progress.step
        )


def readable(metrics: dict[str, Any]) -> str:
    """One line for a person: `loss 2.776  learning rate 0.0001  .. data 3%  backward 71%`."""
    words = []
    for name, value in metrics.items():
        if name.startswith("share_"):
            words += [f"{name.removeprefix('share_')} {value:.0%}"] if value > 0 else []
        elif isinstance(value, bool):
            words += [name] if value else []
        else:
            words.append(f"{name.replace('_', ' ')} {value:.4g}")
    return "  ".join(words)
