"""The options of `scripts/train.py`, and the recipes that give them their defaults."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..command_line import add_debug_option
from ..model_card import add_license_option

# The original's `train.py`, to the letter. Its XE stage has epochs 0 to 20, and at most 100 epochs are trained in all.
RECIPES = {
    "original": {
        "xe_batches": "pairs",
        "xe_learning_rate": 1e-4,
        "xe_schedule": "original",
        "xe_adam_betas": (0.9, 0.98),
        "xe_epochs": 21,
        "xe_patience": 5,
        "scst_batch_size": 10,
        "scst_learning_rate": 5e-6,
        "scst_adam_betas": (0.9, 0.999),
        "scst_epochs": None,
        "scst_patience": 5,
        "scst_samples": "beam",
        "scst_num_captions": 5,
        "max_epochs": 100,
        "max_new_tokens": 20,
        "min_word_count": 5,
    }
}

DESCRIPTION = """\
Train DIFNet on a packed dataset (scripts/pack_coco.py): cross-entropy, then self-critical training.

  python scripts/train.py --dataset coco_packed --output runs/difnet                     the paper's model and recipe
  python scripts/train.py --dataset coco_packed --output runs/difnet --resume last       go on where it stopped
  python scripts/train.py --dataset mine --output runs/mine --model difnet --stage xe    fine-tune a checkpoint
  accelerate launch scripts/train.py ..        or        torchrun --nproc_per_node 8 scripts/train.py ..

OUTPUT holds the checkpoints `last` and `best` (by CIDEr-D on the validation split) and, once SCST has begun,
`best_xe`: folders for from_pretrained, with the state of the training inside. log.jsonl and tensorboard/ have the
figures.
The program can be stopped or killed at any time: the same command with --resume last goes on as if nothing had been.
A checkpoint is resumed with the data, the options and the number of processes of its run; its files and the data are
compared with SHA-256 sums. What may change: where data and output lie, what is logged and saved when, the numbers of
epochs and steps, and the patience; until SCST has begun all --scst options, later --scst-batch-size and
--gradient-accumulation-steps; in the XE stage these two, if their product stays.
Batch sizes are those of one process. On several machines OUTPUT must be on a disk that all of them see."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", type=Path, required=True, metavar="FOLDER", help="packed dataset")
    add("--output", type=Path, required=True, metavar="FOLDER", help="the run's folder")
    add("--stage", choices=["xe", "scst", "both"], default="both", help="default: both")
    add("--resume", metavar="WHAT", help="last, best, or the folder of a checkpoint")
    add("--train-split", default="train", metavar="NAME", help="default: train")
    add("--validation-split", default="validation", metavar="NAME", help="default: validation")
    add("--seed", type=int, default=0, help="default: 0")
    add_license_option(parser)

    add = parser.add_argument_group("the model").add_argument
    add("--model", metavar="FOLDER", help="start from these weights; default: from scratch")
    add("--config", type=Path, metavar="JSON", help="from scratch: fields of DifnetConfig; default: the paper's sizes")
    add("--no-segmentation", action="store_true", help="from scratch: the paper's baseline, grid features alone")
    add("--dropout", type=float, metavar="P", help="from scratch: both dropouts (default: the configuration's, 0.1)")
    add("--vocab", type=Path, metavar="JSON", help="vocab.json; default: the model's, or made from the captions")
    add("--min-word-count", type=int, metavar="N", help="how often the captions must have a word")
    add("--new-vocabulary", action="store_true", help="give --model other words; those it knows keep their weights")

    add = parser.add_argument_group("the recipe; each option is the recipe's unless given").add_argument
    add("--recipe", choices=list(RECIPES), default="original", help="default: original, the paper's")
    add("--xe-batches", choices=["pairs", "images"], help="(image, caption) pairs, or images with all captions")
    add("--xe-batch-size", type=int, metavar="N", help="pairs (50) or images (10)")
    add("--xe-learning-rate", type=float, metavar="X", help="where the schedule is highest")
    add("--xe-schedule", choices=["original", "constant", "linear", "cosine"], help="original: by epoch")
    add("--warmup-steps", type=int, default=0, metavar="N", help="of the other schedules (default 0)")
    add("--xe-adam-betas", type=float, nargs=2, metavar="B")
    add("--xe-epochs", type=int, metavar="N", help="at most")
    add("--xe-patience", type=int, metavar="N", help="epochs without a better score that end the stage")
    add("--scst-batch-size", type=int, metavar="N", help="images")
    add("--scst-learning-rate", type=float, metavar="X")
    add("--scst-adam-betas", type=float, nargs=2, metavar="B")
    add("--scst-epochs", type=int, metavar="N", help="at most")
    add("--scst-patience", type=int, metavar="N")
    add(
        "--scst-samples",
        choices=["beam", "sample"],
        help="the original's beams, or samples with leave-one-out baseline",
    )
    add("--scst-num-captions", type=int, metavar="N", help="captions of an image")
    add("--eos-in-reward", action="store_true", help="the end of a caption counts as a word in the reward")
    add("--max-epochs", type=int, metavar="N", help="of both stages")
    add("--max-new-tokens", type=int, metavar="N", help="length of decoded captions")
    add("--max-steps", type=int, metavar="N", help="optimizer steps of a stage, at most")
    add("--max-grad-norm", type=float, metavar="X", help="clip gradients (default: no)")
    add("--gradient-accumulation-steps", type=int, default=1, metavar="N", help="default: 1")

    add = parser.add_argument_group("the machine").add_argument
    add("--mixed-precision", choices=["no", "bf16", "fp16"], help="default: what accelerate launch says, or no")
    add("--compile", action="store_true", help="torch.compile the pass that is differentiated")
    add("--cpu", action="store_true", help="even where there is a GPU")
    add("--evaluation-batch-size", type=int, default=50, metavar="N", help="default: 50")
    add("--log-every", type=int, default=50, metavar="N", help="optimizer steps (default 50)")
    add(
        "--save-every", type=int, default=1000, metavar="N", help="optimizer steps, besides every epoch (default 1000)"
    )
    add("--report-to", nargs="+", default=["tensorboard"], metavar="NAME", help="trackers of Accelerate, or none")
    add_debug_option(parser)
    options = parser.parse_args(argv)

    for name, value in RECIPES[options.recipe].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.xe_batch_size is None:
        options.xe_batch_size = 50 if options.xe_batches == "pairs" else 10
    whole = (
        "xe_batch_size scst_batch_size scst_num_captions xe_epochs scst_epochs xe_patience scst_patience max_epochs "
    )
    whole += "max_new_tokens max_steps gradient_accumulation_steps evaluation_batch_size log_every save_every"
    for name in [*whole.split(), "xe_learning_rate", "scst_learning_rate", "max_grad_norm"]:
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be greater than 0")
    if options.scst_num_captions < 2:
        parser.error("--scst-num-captions must be at least 2: the baseline is the mean over an image's captions")
    if options.stage == "scst" and options.model is None and options.resume is None:
        parser.error("--stage scst starts from trained weights: give --model FOLDER")
    if options.model is not None and (options.config is not None or options.no_segmentation):
        parser.error("--config and --no-segmentation are for models from scratch; --model has its own configuration")
    if options.new_vocabulary and options.model is None:
        parser.error("--new-vocabulary goes with --model")
    if options.warmup_steps and options.xe_schedule == "original":
        parser.error("--warmup-steps goes with --xe-schedule constant, linear or cosine; the original's has its own")
    return options
