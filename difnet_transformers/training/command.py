"""`difnet train` behind its options: runs the trainer of the stage and says how it ended."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from ..files import printable
from .config import TrainingConfig
from .logging import TrainingFailed
from .processes import is_first_process
from .self_critical_stage import DifnetSelfCriticalTrainer
from .trainer import DifnetTrainer, TrainingStopped


def train(args: TrainingConfig) -> int:
    """Trains, or resumes, as `args` say.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: a user's mistake, too little memory, or a run that cannot continue; one line with the remedy.
        OSError: a file cannot be read or written; the last checkpoint is as it was.
        KeyboardInterrupt: the run was asked to stop.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    trainer_class = DifnetTrainer if args.stage == "xe" else DifnetSelfCriticalTrainer
    try:
        trainer = trainer_class(args=args)
        progress = trainer.train()
    except TrainingStopped:
        if not is_first_process():
            raise SystemExit(130) from None
        raise
    except TrainingFailed as error:
        raise ValueError(str(error)) from error
    except OSError:
        if is_first_process() and (args.output / "last").exists():
            print(f"{args.output / 'last'} is as it was: mend this, then resume with --resume last", file=sys.stderr)
        raise
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{str(error).splitlines()[0]} Lower --xe-batch-size or --scst-batch-size and raise "
            "--gradient-accumulation-steps as much: the result is the same, and --resume last takes it."
        ) from error
    trainer.accelerator.print(
        f"done: best CIDEr-D on {args.validation_split} {progress.best_score:.4f}, "
        f"{printable(args.output / 'best', 300)}"
    )
    return 0


def how_to_resume(output: Path) -> str:
    """What a stopped run says."""
    saved = (output / "last").exists()
    return f"resume with --resume last, from {output / 'last'}" if saved else "nothing was saved yet"
