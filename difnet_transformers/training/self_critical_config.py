"""`SelfCriticalConfig`: the arguments of `SelfCriticalTrainer`, with the names that TRL gives them where it has them.

The defaults are the paper's, those of `train_scst` in `train.py` of the original (mrwu-mac/DIFNet, CVPR 2022): five
beams of at most 20 tokens, and their mean as the baseline. What differs: AdamW and the schedules of Transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments

from .advantages import BASELINE_OF_SAMPLES, BASELINES


@dataclass
class SelfCriticalConfig(Seq2SeqTrainingArguments):
    """The arguments of `SelfCriticalTrainer`: those of `Seq2SeqTrainingArguments`, and these.

    Other defaults than there: `learning_rate` 5e-6, `logging_steps` 10, `data_seed` that of `seed`, and
    `remove_unused_columns` False, since the columns that the model does not read are for the rewards.

    Args:
        model_init_kwargs: of `from_pretrained`, where the trainer is given the name of a model, such as
            `{"dtype": "bfloat16"}`; or the same as JSON. By default the weights are float32.
        samples: "beam": all beams of a search, as in the original. "sample": samples of the model's distribution.
        num_generations: captions of an image, as many as beams; at least 2 but for `baseline` "greedy".
        max_new_tokens: length of a caption at most, the end counted. It also divides the loss, whatever the length of
            a caption, as in the original (and in TRL's `loss_type="dr_grpo"`).
        temperature: of samples, and of the distribution whose log-probabilities the loss takes.
        top_k: samples are drawn among so many of the likeliest tokens; 0: all.
        top_p: samples are drawn among the likeliest tokens that have this probability together.
        generation_kwargs: further settings of `generate`, such as `{"min_new_tokens": 5}`; or the same as JSON. They
            have the last word. Captions that are not drawn from the model's distribution make the gradient a biased
            one.
        baseline: what is subtracted from a reward: "mean" of the image's captions, "leave_one_out", "greedy" (the
            reward of the caption that greedy decoding finds), or "group", the mean in units of the standard deviation
            as in GRPO. By default "mean" for beams and "leave_one_out" for samples.
        reward_weights: of the reward functions, in their order; by default 1 each.
        beta: weight of the divergence (KL) from the model as it was given to the trainer, per token. 0: no copy of
            the model is kept.
        entropy_coef: weight of the entropy of the tokens, which is to stay high.
        log_completions: prints captions of the newest step, their rewards and a reference caption with every line of
            the log.
        num_completions_to_print: of so many images.
    """

    _VALID_DICT_FIELDS = [*Seq2SeqTrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "generation_kwargs"]

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate for AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many updates; below 1: a share of all."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop columns that the model does not read; rewards read them."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of `from_pretrained`, where the trainer is given a model's name."}
    )
    samples: str = field(
        default="beam",
        metadata={"help": "The captions that are rewarded: beams or samples.", "choices": list(BASELINE_OF_SAMPLES)},
    )
    num_generations: int = field(default=5, metadata={"help": "Captions of an image."})
    max_new_tokens: int = field(default=20, metadata={"help": "Length of a caption at most, the end counted."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of samples."})
    top_k: int = field(default=0, metadata={"help": "Samples are among so many of the likeliest tokens; 0: all."})
    top_p: float = field(
        default=1.0, metadata={"help": "Samples are among the likeliest tokens that have this together."}
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further settings of `generate`; they have the last word."}
    )
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "What is subtracted from a reward (default: mean for beams, leave_one_out for samples).",
            "choices": list(BASELINES),
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the reward functions (default: 1 each)."}
    )
    beta: float = field(default=0.0, metadata={"help": "Weight of the divergence from the model that was given."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy of the tokens."})
    log_completions: bool = field(
        default=False, metadata={"help": "Print captions of the newest step with every line of the log."}
    )
    num_completions_to_print: int = field(default=2, metadata={"help": "Images whose captions are printed."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_seed is None:
            # The processes share out one order, while each has random numbers of its own to decode with.
            self.data_seed = self.seed
        if self.samples not in BASELINE_OF_SAMPLES:
            raise ValueError(f"samples={self.samples!r}: choose from {', '.join(BASELINE_OF_SAMPLES)}")
        self.baseline = self.baseline or BASELINE_OF_SAMPLES[self.samples]
        if self.baseline not in BASELINES:
            raise ValueError(f"baseline={self.baseline!r}: choose from {', '.join(BASELINES)}")
        if self.num_generations < (1 if self.baseline == "greedy" else 2):
            raise ValueError(
                f"num_generations={self.num_generations}: the baseline {self.baseline!r} compares at least two "
                "captions of an image"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: a caption has at least one token")
        if not 0 < self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"temperature={self.temperature}, top_p={self.top_p}, top_k={self.top_k}: a temperature is greater "
                "than 0, top_p in (0, 1] and top_k at least 0"
            )
        if self.samples == "beam" and (self.temperature, self.top_p, self.top_k) != (1.0, 1.0, 0):
            raise ValueError('temperature, top_p and top_k go with samples="sample"; beams are not drawn')
        for name in ("beta", "entropy_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: a weight is 0 or a number above it")
