"""The optimizer and the learning rate of both stages.

Original file: `train.py` of mrwu-mac/DIFNet (CVPR 2022), `lambda_lr` and the two `Adam`. Other schedules and weight
decay are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from .config import TRANSFORMERS_SCHEDULES, TrainingConfig


def make_optimizer(
    model: nn.Module, betas: tuple[float, float], learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Adam | torch.optim.AdamW:
    """The original's Adam, in one kernel, or AdamW; a stage starts with a fresh one.

    Args:
        model: whose parameters it has, but for frozen ones.
        betas: decay rates of the two moments.
        learning_rate: of the first step.
        weight_decay: what AdamW shrinks weights by at each step, times the learning rate (Loshchilov and Hutter, ICLR
            2019); the original has none. Matrices decay: projections and word embeddings. Biases and the weights of
            layer norms do not, and the position table is no parameter.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {"lr": learning_rate, "betas": (betas[0], betas[1]), "fused": True}
    if not weight_decay:
        return torch.optim.Adam(trained, **settings)
    groups = [
        {"params": [each for each in trained if each.ndim >= 2], "weight_decay": weight_decay},
        {"params": [each for each in trained if each.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **settings)


def original_xe_factor(epoch: int) -> float:
    """What the original's XE learning rate of an epoch (from 1) is of its plateau, 1e-4."""
    if epoch <= 3:
        return epoch / 4
    if epoch <= 10:
        return 1.0
    return 0.2 if epoch <= 12 else 0.04


@cache
def transformers_schedule(
    name: str, learning_rate: float, warmup_steps: int, num_steps: int, options: tuple[tuple[str, float], ...]
) -> Callable[[int], float]:
    """A schedule of Transformers as a function: from an optimizer step to its share of the learning rate.

    Args:
        name: of a `SchedulerType`.
        learning_rate: where it is highest.
        warmup_steps: before it begins.
        num_steps: where it ends.
        options: further arguments of the schedule, with their names.

    Raises:
        ValueError: the schedule lacks an argument, has none of such a name, or refuses one.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=learning_rate)
    try:
        scheduler = get_scheduler(name, optimizer, warmup_steps, num_steps, dict(options))
        schedule = scheduler.lr_lambdas[0]
        schedule(warmup_steps)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"--xe-schedule {name}: {error}; see --xe-schedule-options") from error
    return schedule


def learning_rate(config: TrainingConfig, stage: str, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The learning rate of an optimizer step.

    Args:
        config: of the run.
        stage: "xe" or "scst".
        epoch: of the stage, from 1.
        step: of the stage, from 0.
        steps_per_epoch: optimizer steps of an epoch.

    Raises:
        ValueError: a schedule of Transformers cannot be made of the options given.
    """
    if stage == "scst":
        rate, schedule, warmup_steps = config.scst_learning_rate, config.scst_schedule, config.scst_warmup_steps
        epochs = config.scst_epochs
    else:
        rate, schedule, warmup_steps = config.xe_learning_rate, config.xe_schedule, config.warmup_steps
        epochs = config.xe_epochs
    if schedule == "original":
        return rate * original_xe_factor(epoch)
    if step < warmup_steps:
        return rate * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return rate
    last = config.max_steps if config.max_steps is not None else (epochs or 1) * steps_per_epoch
    if schedule in TRANSFORMERS_SCHEDULES:
        return rate * transformers_schedule(schedule, rate, warmup_steps, last, config.schedule_options())(step)
    done = min(1.0, (step - warmup_steps) / max(1, last - warmup_steps))
    return rate * (1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)
