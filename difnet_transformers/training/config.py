"""`TrainingConfig`: the options of a training run, whose defaults are the original's recipe.

The original (mrwu-mac/DIFNet, CVPR 2022) has these numbers in `train.py`, most of them in the code. Its XE stage has
epochs 0 to 20, and it trains at most 100 epochs in all. `recipes/original.yaml` has the same values as a recipe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from simple_parsing import field

from ..model_card import check_license, license_option
from ..options import check_positive, debug_option, option_name

MODEL = "the model"
RECIPE = "the recipe; the defaults are the paper's"
REGULARIZATION = "regularization; the paper has dropout alone"
MACHINE = "the machine"

# Those of `transformers.SchedulerType` that go by the optimizer step alone and are not among ours.
TRANSFORMERS_SCHEDULES = (
    "polynomial",
    "inverse_sqrt",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "warmup_stable_decay",
)
CHOICES = {
    "stage": ["xe", "scst", "both"],
    "xe_batches": ["pairs", "images"],
    "xe_schedule": ["original", "constant", "linear", "cosine", *TRANSFORMERS_SCHEDULES],
    "scst_schedule": ["constant", "linear", "cosine"],
    "scst_samples": ["beam", "sample"],
    "scst_baseline": ["mean", "leave_one_out", "greedy", "group"],
    "mixed_precision": ["no", "bf16", "fp16", "auto"],
}
POSITIVE = (
    "xe_batch_size",
    "scst_batch_size",
    "scst_num_captions",
    "xe_epochs",
    "scst_epochs",
    "xe_patience",
    "scst_patience",
    "max_epochs",
    "max_new_tokens",
    "max_steps",
    "gradient_accumulation_steps",
    "evaluation_batch_size",
    "log_every",
    "save_every",
    "shuffle_buffer",
    "xe_learning_rate",
    "scst_learning_rate",
    "max_grad_norm",
    "scst_temperature",
)
PROBABILITIES = ("label_smoothing", "scheduled_sampling", "scst_dropout", "grid_cell_dropout", "ema_decay")
NOT_NEGATIVE = (
    "weight_decay",
    "scst_weight_decay",
    "warmup_steps",
    "scst_warmup_steps",
    "scst_kl_weight",
    "scst_entropy_weight",
    "scst_top_k",
)

# Those that have a name; besides them there are `clip_score:MODEL` and `package.module:function`.
REWARDS = (
    "cider_d",
    "cider_d_eos",
    "cider_d_image",
    "cider_d_image_eos",
    "bleu_1",
    "bleu_2",
    "bleu_3",
    "bleu_4",
    "rouge_l",
    "meteor",
    "spice",
    "spider",
    "repeats",
    "bad_endings",
    "unfinished",
)
REWARD_WITH_ARGUMENT = re.compile(r"clip_score:.+|[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass
class TrainingConfig:
    """The options of a training run: the `args` of a trainer, and the options of `difnet train`.

    The help of each field describes it. Batch sizes are those of one process.

    Raises:
        ValueError: a value is out of range, or two of them exclude each other; the text names the option.
    """

    dataset: Path = field(metavar="FOLDER", help="packed dataset, also of Parquet, or the name of one on the Hub")
    output: Path = field(metavar="FOLDER", help="the run's folder")
    stage: str = field(
        default="both",
        choices=CHOICES["stage"],
        help="cross-entropy, self-critical training, or one after the other",
    )
    resume: str | None = field(
        default=None, metavar="WHAT", help="last, best, the folder of a checkpoint, or auto: last if there is one"
    )
    save_on_each_node: bool = field(
        default=False, help="--output is on a disk of each machine's own: each keeps the checkpoints"
    )
    train_split: str = field(default="train", metavar="NAME")
    validation_split: str = field(default="validation", metavar="NAME")
    seed: int = field(default=0, metavar="N")
    license: str | None = license_option()

    model: str | None = field(
        default=None,
        group=MODEL,
        metavar="FOLDER",
        help="start from these weights (also: --init-from; default: from scratch)",
    )
    config: Path | None = field(
        default=None,
        group=MODEL,
        metavar="JSON",
        help="from scratch: fields of DifnetConfig (default: the paper's sizes)",
    )
    no_segmentation: bool = field(
        default=False, group=MODEL, help="from scratch: the paper's baseline, grid features alone"
    )
    dropout: float | None = field(
        default=None, group=MODEL, metavar="P", help="from scratch: both dropouts (default: the configuration's, 0.1)"
    )
    vocab: Path | None = field(
        default=None,
        group=MODEL,
        metavar="JSON",
        help="vocab.json (default: the model's, or made from the captions)",
    )
    min_word_count: int = field(
        default=5, group=MODEL, metavar="N", help="how often a word of the vocabulary occurs in the captions"
    )
    new_vocabulary: bool = field(
        default=False, group=MODEL, help="give --model other words; those it knows keep their weights"
    )
    freeze: list[str] = field(
        default_factory=list,
        group=MODEL,
        metavar="NAME",
        help="parts that keep their weights in both stages, such as model.encoder (default: none)",
    )

    xe_batches: str = field(
        default="pairs",
        group=RECIPE,
        choices=CHOICES["xe_batches"],
        help="(image, caption) pairs, or images with all captions",
    )
    xe_batch_size: int | None = field(
        default=None, group=RECIPE, metavar="N", help="pairs (default: 50) or images (default: 10)"
    )
    xe_learning_rate: float = field(default=1e-4, group=RECIPE, metavar="X", help="where the schedule is highest")
    xe_schedule: str = field(
        default="original",
        group=RECIPE,
        choices=CHOICES["xe_schedule"],
        help="original: by epoch; the longer names are those of Transformers",
    )
    xe_schedule_options: list[str] = field(
        default_factory=list,
        group=RECIPE,
        metavar="NAME=X",
        help="arguments of a schedule of Transformers, such as power=2 or num_cycles=3",
    )
    warmup_steps: int = field(default=0, group=RECIPE, metavar="N", help="of the other schedules")
    xe_adam_betas: tuple[float, float] = field(default=(0.9, 0.98), group=RECIPE, metavar="B")
    xe_epochs: int = field(default=21, group=RECIPE, metavar="N", help="at most")
    xe_patience: int = field(
        default=5, group=RECIPE, metavar="N", help="epochs without a better score that end the stage"
    )
    scst_batch_size: int = field(default=10, group=RECIPE, metavar="N", help="images")
    scst_learning_rate: float = field(default=5e-6, group=RECIPE, metavar="X", help="where the schedule is highest")
    scst_schedule: str = field(
        default="constant",
        group=RECIPE,
        choices=CHOICES["scst_schedule"],
        help="linear and cosine end at 0 after --scst-epochs or --max-steps",
    )
    scst_warmup_steps: int = field(default=0, group=RECIPE, metavar="N", help="of each of these schedules")
    scst_adam_betas: tuple[float, float] = field(default=(0.9, 0.999), group=RECIPE, metavar="B")
    scst_epochs: int | None = field(
        default=None, group=RECIPE, metavar="N", help="at most (default: as the patience says)"
    )
    scst_patience: int = field(default=5, group=RECIPE, metavar="N")
    scst_samples: str = field(
        default="beam",
        group=RECIPE,
        choices=CHOICES["scst_samples"],
        help="the original's beams, or samples of the model's distribution",
    )
    scst_baseline: str | None = field(
        default=None,
        group=RECIPE,
        choices=CHOICES["scst_baseline"],
        help="what is subtracted from a reward: the mean of the image's captions, the mean of the other ones, or the "
        "reward of the greedy caption; group: the mean, in units of the spread (default: mean for beams, "
        "leave_one_out for samples)",
    )
    scst_temperature: float = field(
        default=1.0, group=RECIPE, metavar="X", help="of --scst-samples sample, and of the loss's distribution"
    )
    scst_top_k: int = field(
        default=0, group=RECIPE, metavar="N", help="of --scst-samples sample: among the N likeliest words; 0: all"
    )
    scst_top_p: float = field(
        default=1.0,
        group=RECIPE,
        metavar="P",
        help="of --scst-samples sample: among the likeliest words that have P together",
    )
    scst_num_captions: int = field(default=5, group=RECIPE, metavar="N", help="captions of an image")
    rewards: list[str] = field(
        default_factory=lambda: ["cider_d"],
        group=RECIPE,
        metavar="NAME[=WEIGHT]",
        help="what SCST maximises, a weighted sum: cider_d, cider_d_eos (the end of a caption counts), bleu_4, "
        "rouge_l, meteor, spider, repeats, bad_endings, unfinished .., clip_score:MODEL, or package.module:function "
        "(default: cider_d)",
    )
    reward_images: Path | None = field(
        default=None, group=RECIPE, metavar="FOLDER", help="training images, for --rewards clip_score:MODEL"
    )
    eos_in_reward: bool = field(
        default=False, group=RECIPE, help="the end of a caption counts as a word in the reward cider_d"
    )
    max_epochs: int = field(default=100, group=RECIPE, metavar="N", help="of both stages")
    max_new_tokens: int = field(default=20, group=RECIPE, metavar="N", help="length of decoded captions")
    max_steps: int | None = field(
        default=None, group=RECIPE, metavar="N", help="optimizer steps of a stage, at most (default: no limit)"
    )
    max_grad_norm: float | None = field(
        default=None, group=RECIPE, metavar="X", help="clip gradients (default: no clipping)"
    )
    gradient_accumulation_steps: int = field(default=1, group=RECIPE, metavar="N")

    label_smoothing: float = field(
        default=0.0,
        group=REGULARIZATION,
        metavar="P",
        help="of XE: share of each target that is spread over the vocabulary; the log has the plain cross-entropy too",
    )
    scheduled_sampling: float = field(
        default=0.0,
        group=REGULARIZATION,
        metavar="P",
        help="of XE: the decoder reads words that it predicts in the place of the caption's; from 0 in the first "
        "epoch to P in the last of --xe-epochs",
    )
    weight_decay: float = field(
        default=0.0,
        group=REGULARIZATION,
        metavar="X",
        help="of XE: decoupled, of matrices (AdamW); 0 is the original's Adam",
    )
    scst_weight_decay: float = field(default=0.0, group=REGULARIZATION, metavar="X", help="the same, of SCST")
    scst_kl_weight: float = field(
        default=0.0,
        group=REGULARIZATION,
        metavar="X",
        help="of SCST: weight of the divergence from the weights that it starts from",
    )
    scst_entropy_weight: float = field(
        default=0.0,
        group=REGULARIZATION,
        metavar="X",
        help="of SCST: weight of the entropy of the words, which is to stay high",
    )
    scst_dropout: float | None = field(
        default=None, group=REGULARIZATION, metavar="P", help="both dropouts during SCST (default: the model's)"
    )
    grid_cell_dropout: float = field(
        default=0.0, group=REGULARIZATION, metavar="P", help="hide cells of training images, in both flows"
    )
    ema_decay: float = field(
        default=0.0,
        group=REGULARIZATION,
        metavar="X",
        help="validate and save the moving average of the weights, of which a step keeps X; 0: the weights",
    )

    mixed_precision: str | None = field(
        default=None,
        group=MACHINE,
        choices=CHOICES["mixed_precision"],
        help="auto: bf16 where the device multiplies it natively, which is printed with the reason; default: what "
        "accelerate launch says, or no",
    )
    compile: bool = field(default=False, group=MACHINE, help="torch.compile the pass that is differentiated")
    cpu: bool = field(default=False, group=MACHINE, help="even where there is a GPU")
    evaluation_batch_size: int = field(default=50, group=MACHINE, metavar="N")
    log_every: int = field(default=50, group=MACHINE, metavar="N", help="optimizer steps")
    save_every: int = field(default=1000, group=MACHINE, metavar="N", help="optimizer steps, besides every epoch")
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        group=MACHINE,
        metavar="NAME",
        help="trackers of Accelerate, or none (default: tensorboard)",
    )
    streaming: bool = field(
        default=False,
        group=MACHINE,
        help="read the training images of Parquet, of a folder or the Hub, as they are needed; no copy on the disk",
    )
    shuffle_buffer: int = field(
        default=1000, group=MACHINE, metavar="N", help="of --streaming: images that are shuffled together"
    )
    debug: bool = debug_option()

    def __post_init__(self) -> None:
        self.dataset, self.output = Path(self.dataset), Path(self.output)
        self.config = None if self.config is None else Path(self.config)
        self.vocab = None if self.vocab is None else Path(self.vocab)
        self.reward_images = None if self.reward_images is None else Path(self.reward_images)
        if self.xe_batch_size is None:
            self.xe_batch_size = 50 if self.xe_batches == "pairs" else 10
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"{option_name(name)} {value}: choose from {', '.join(choices)}")
        check_positive(self, *POSITIVE)
        for name in PROBABILITIES:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{option_name(name)} must be at least 0 and less than 1, not {value}")
        for name in NOT_NEGATIVE:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{option_name(name)} must be 0 or a number above it, not {value}")
        if self.scst_num_captions < 2 and self.baseline() != "greedy":
            raise ValueError(
                "--scst-num-captions must be at least 2: the baseline is the mean over an image's captions"
            )
        self._check_samples()
        self._check_rewards()
        if self.model is not None and (self.config is not None or self.no_segmentation):
            raise ValueError(
                "--config and --no-segmentation are for models from scratch; --model has its own configuration"
            )
        if self.new_vocabulary and self.model is None:
            raise ValueError("--new-vocabulary goes with --model")
        if self.warmup_steps and self.xe_schedule == "original":
            raise ValueError(
                "--warmup-steps goes with --xe-schedule constant, linear or cosine, or one of Transformers; the "
                "original's has its own"
            )
        if self.xe_schedule_options and self.xe_schedule not in TRANSFORMERS_SCHEDULES:
            raise ValueError(
                f"--xe-schedule-options go with --xe-schedule {', '.join(TRANSFORMERS_SCHEDULES)}; {self.xe_schedule} "
                "has none"
            )
        self.schedule_options()
        if self.scst_schedule != "constant" and self.scst_epochs is None and self.max_steps is None:
            raise ValueError(
                f"--scst-schedule {self.scst_schedule} has to know where it ends: give --scst-epochs or --max-steps"
            )
        check_license(self.license)

    def _check_samples(self) -> None:
        """Raises ValueError for options of samples that beams do not have."""
        if not self.scst_temperature < math.inf:
            raise ValueError(f"--scst-temperature must be a number greater than 0, not {self.scst_temperature}")
        if not 0 < self.scst_top_p <= 1:
            raise ValueError(f"--scst-top-p must be greater than 0 and at most 1, not {self.scst_top_p}")
        if self.scst_samples == "beam":
            for name in ("scst_temperature", "scst_top_k", "scst_top_p"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{option_name(name)} goes with --scst-samples sample; beams are not drawn")

    def _check_rewards(self) -> None:
        """Raises ValueError for rewards that cannot be, or that lack another option."""
        weights = parse_rewards(self.rewards)
        if self.eos_in_reward and "cider_d" not in weights:
            raise ValueError("--eos-in-reward goes with --rewards cider_d")
        if self.eos_in_reward and "cider_d_eos" in weights:
            raise ValueError("--eos-in-reward makes cider_d the reward cider_d_eos, which --rewards has too")
        sees_images = any(name.startswith("clip_score:") for name in weights)
        if sees_images and self.reward_images is None:
            raise ValueError("--rewards clip_score:MODEL needs --reward-images FOLDER, the training images")
        if self.reward_images is not None and not sees_images:
            raise ValueError("--reward-images goes with --rewards clip_score:MODEL")

    def reward_weights(self) -> dict[str, float]:
        """The rewards by name, with their weights."""
        weights = parse_rewards(self.rewards)
        return {"cider_d_eos" if self.eos_in_reward and name == "cider_d" else name: weights[name] for name in weights}

    def baseline(self) -> str:
        """The baseline of SCST: `scst_baseline`, or what goes with the kind of samples."""
        return self.scst_baseline or ("mean" if self.scst_samples == "beam" else "leave_one_out")

    def schedule_options(self) -> tuple[tuple[str, float], ...]:
        """The arguments of the XE schedule, with their names.

        Raises:
            ValueError: one is no number, or has no name.
        """
        found: dict[str, float] = {}
        for word in self.xe_schedule_options:
            name, _, text = word.partition("=")
            try:
                found[name] = int(text) if text.isdecimal() else float(text)
            except ValueError:
                raise ValueError(f"--xe-schedule-options {word}: write NAME=NUMBER, such as power=2") from None
        return tuple(found.items())

    def regularization(self) -> dict[str, Any]:
        """The options of regularization that are not as in the paper, by name."""
        groups = {entry.name: entry.metadata.get("custom_args", {}).get("group") for entry in fields(self)}
        return {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if groups[entry.name] == REGULARIZATION and getattr(self, entry.name) != entry.default
        }


def parse_rewards(words: Sequence[str]) -> dict[str, float]:
    """Rewards with their weights, of words such as `cider_d` (weight 1) and `bad_endings=0.5`.

    Raises:
        ValueError: a weight or a name cannot be, or a name comes twice.
    """
    weights: dict[str, float] = {}
    for word in words:
        name, equals, text = word.rpartition("=")
        if not equals:
            name, text = word, "1"
        try:
            weight = float(text)
        except ValueError:
            raise ValueError(f"--rewards {word}: write NAME=WEIGHT, such as bad_endings=0.5") from None
        if not math.isfinite(weight) or weight == 0:
            raise ValueError(f"--rewards {word}: a weight is a number other than 0")
        if name not in REWARDS and REWARD_WITH_ARGUMENT.fullmatch(name) is None:
            raise ValueError(
                f"--rewards {word}: choose from {', '.join(REWARDS)}, clip_score:MODEL and package.module:function"
            )
        if name in weights:
            raise ValueError(f"--rewards {word}: {name} comes twice")
        weights[name] = weight
    if not weights:
        raise ValueError("--rewards needs at least one, such as cider_d")
    return weights
