"""`difnet train`: cross-entropy, then self-critical training. Its options are `training/config.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..command_line import run_command
from ..options import parse_options
from ..training.config import TrainingConfig

DESCRIPTION = """\
Train DIFNet on a packed dataset (difnet pack): cross-entropy (XE), then self-critical sequence training (SCST).

  difnet train --dataset coco_packed --output runs/difnet                     the paper's model and recipe
  difnet train --dataset coco_packed --output runs/difnet --resume last       resume it
  difnet train --dataset mine --output runs/mine --model difnet --stage xe    fine-tune a checkpoint
  difnet train recipe.yaml --seed 3                                           options from a file
  torchrun --nproc-per-node 8 -m difnet_transformers train ..                 on several GPUs; accelerate launch -m

OUTPUT holds the checkpoints `last` and `best` (by CIDEr-D on the validation split) and, once SCST has begun,
`best_xe`: folders for from_pretrained, with the state of the training inside. log.jsonl and tensorboard/ have the
metrics, recipe.yaml the options: the file that repeats the run.
The program can be stopped or killed at any time: the same command with --resume last resumes the run, which ends with
the same weights. A checkpoint is resumed with the data, the options and the number of processes of its run; its files
and the data are compared with SHA-256 sums. What may change: where data and output lie, what is logged and saved when,
the numbers of epochs and steps, and the patience; until SCST has begun --rewards and all --scst options, later
--scst-batch-size and --gradient-accumulation-steps; in the XE stage these two, if their product stays.
Batch sizes are those of one process. On several machines OUTPUT must be on a disk that all of them see."""

OTHER_NAMES = {"--init-from": "--model"}


def main(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    args = parse_options(
        TrainingConfig, argv, prog=prog, description=DESCRIPTION, renamed=OTHER_NAMES, positional_recipe=True
    )

    def command() -> int:
        from ..training.command import train

        return train(args)

    def how_to_resume() -> str:
        from ..training.command import how_to_resume

        return how_to_resume(args.output)

    return run_command(prog, command, args.debug, how_to_resume)


if __name__ == "__main__":
    sys.exit(main())
