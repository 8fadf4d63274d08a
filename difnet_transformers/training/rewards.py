"""The rewards of self-critical training: loaded by name, weighted and added up, logged, and watched for a collapse.

Corresponds to the lines of `train_scst` in `train.py` of the original (mrwu-mac/DIFNet, CVPR 2022) that tokenize and
score the beams. What differs: no Java, the end of a caption can count in the reward, there are other rewards than
CIDEr-D (`reward_functions.py`, `clip_score.py`, functions of one's own), what they return is checked, and a collapsed
reward ends the run.

    rewards = load_rewards({"cider_d": 1.0, "bad_endings": 0.5}, training_captions=captions)
    total, values = rewards(captions, references, finished=finished)
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from caption_metrics import CiderReward, JavaMissing, check_java
from processing_difnet import DifnetTokenizer

from ..command_line import reason_of
from ..files import printable
from .advantages import scst_baseline
from .checkpoint import Progress
from .config import REWARDS
from .logging import TrainingFailed
from .reward_functions import (
    Captions,
    CiderDReward,
    MeteorReward,
    Reward,
    SpiderReward,
    bad_endings_reward,
    bleu_reward,
    ends_badly,
    repeats_reward,
    rouge_l_reward,
    spice_reward,
    unfinished_reward,
)

# The reward has collapsed when its running mean, over the last hundred steps or so, falls below half of its own peak.
REWARD_DECAY = 0.99
COLLAPSED = 0.5

CLIP_SCORE = "clip_score"
# Names to what `CiderDReward` takes.
CIDER_D: dict[str, dict[str, Any]] = {
    "cider_d": {},
    "cider_d_eos": {"count_eos": True},
    "cider_d_image": {"document": "image"},
    "cider_d_image_eos": {"document": "image", "count_eos": True},
}
FUNCTIONS: dict[str, Reward] = {
    **{f"bleu_{n}": bleu_reward(n) for n in range(1, 5)},
    "rouge_l": rouge_l_reward,
    "repeats": repeats_reward,
    "bad_endings": bad_endings_reward,
    "unfinished": unfinished_reward,
}
OF_JAVA = ("meteor", "spice", "spider")


class RewardFailed(TrainingFailed, ValueError):
    """A reward raised an error, or did not give each caption a number; the text names it."""


class Rewards(NamedTuple):
    """Rewards of a list of captions.

    Args:
        total: (captions,), float32, the weighted sum.
        values: of each reward by name, (captions,), float64, without its weight.
    """

    total: torch.Tensor
    values: dict[str, torch.Tensor]


def load_reward(
    name: str,
    *,
    training_captions: Captions | Callable[[], Captions] | None = None,
    corpus: str = "",
    image_paths: Mapping[int, Path] | None = None,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
) -> Reward:
    """A reward by its name; what it needs and is not there is refused here.

    Args:
        name: one of `REWARDS` of `config.py`; `clip_score:MODEL` with the folder or Hub name of a model of
            Transformers with text and image embeddings in one space, such as CLIP or SigLIP; or
            `package.module:function`, a function of one's own that is a reward.
        training_captions: a list for each image, or a function that returns them, which is called when they are first
            needed. CIDEr-D takes its document frequencies from them.
        corpus: name of the training captions.
        image_paths: of `clip_score`: files by image id.
        cache: of `clip_score`: folder that keeps the embeddings of images.
        device: of `clip_score`.

    Raises:
        ValueError: no such reward, or it lacks something; one line that names it.
    """
    kind, _, argument = name.partition(":")
    if kind == CLIP_SCORE and argument:
        from .clip_score import ClipScore

        return ClipScore.from_pretrained(argument, image_paths, cache=cache, device=device)
    if argument:
        return load_function(name)
    if name in OF_JAVA:
        try:
            check_java(with_meteor=name == "meteor", with_spice=name != "meteor")
        except JavaMissing as missing:
            raise ValueError(f"the reward {name}: {missing}") from missing
    if name in CIDER_D or name == "spider":
        if training_captions is None:
            raise ValueError(f"the reward {name} needs training captions, of which it takes the document frequencies")
        cider_d = CiderDReward(training_captions, corpus=corpus, **CIDER_D.get(name, {}))
        return cider_d if name in CIDER_D else SpiderReward(cider_d)
    if name in ("meteor", "spice"):
        return MeteorReward() if name == "meteor" else spice_reward
    if name not in FUNCTIONS:
        raise ValueError(
            f"there is no reward {printable(name)}: choose from {', '.join(REWARDS)}, {CLIP_SCORE}:MODEL, or "
            "package.module:function"
        )
    return FUNCTIONS[name]


def load_function(name: str) -> Reward:
    """The reward `package.module:function`.

    Raises:
        ValueError: there is no such function, or importing it fails.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"the reward {printable(name)} cannot be loaded ({reason_of(error)}); give package.module:function, and "
            "put its folder on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(f"the reward {printable(name)} is no function: {printable(function)}")
    return function


class WeightedRewards:
    """Several rewards as one: their weighted sum, and each one's own values for the log.

    Args:
        functions: the rewards, by name.
        weights: of the rewards, by name; by default 1 each.
    """

    def __init__(self, functions: Mapping[str, Reward], weights: Mapping[str, float] | None = None):
        self.functions = dict(functions)
        self.weights = {name: 1.0 if weights is None else weights[name] for name in functions}
        self._columns = {name: columns_of(function) for name, function in functions.items()}

    def __call__(
        self, captions: Sequence[str], references: Sequence[Sequence[str]], **columns: Sequence[Any]
    ) -> Rewards:
        """The rewards of captions.

        Args:
            captions: as decoded.
            references: for every caption the reference captions of its image.
            columns: further values, one a caption, such as `finished`. A reward gets those that it has arguments for.

        Raises:
            RewardFailed: a reward raises an error, or returns anything but a finite number for each caption.
        """
        total = np.zeros(len(captions))
        values = {}
        for name, function in self.functions.items():
            accepted = self._columns[name]
            given = {key: value for key, value in columns.items() if accepted is None or key in accepted}
            values[name] = checked_values(name, function, captions, references, given)
            total += self.weights[name] * values[name]
        return Rewards(
            torch.from_numpy(total.astype(np.float32)),
            {name: torch.from_numpy(each) for name, each in values.items()},
        )

    def check_columns(self, names: Collection[str]) -> None:
        """Refuses a reward that cannot be called with columns of these names: to find it before the training.

        Raises:
            ValueError: a reward has an argument, without a default value, that is none of them.
        """
        for name, function in self.functions.items():
            accepted = self._columns[name]
            given: dict[str, list] = {column: [] for column in names if accepted is None or column in accepted}
            try:
                inspect.signature(function).bind([], [], **given)
            except ValueError:  # some builtins have no signature
                continue
            except TypeError as error:
                raise ValueError(
                    f"the reward {printable(name)} cannot be called: {error}. It is given captions, their references "
                    f"and, by name if it takes them, {', '.join(names)}."
                ) from error

    @property
    def description(self) -> str:
        """The rewards with their weights, as a model card says them."""
        described = [
            f"{'' if self.weights[name] == 1 else f'{self.weights[name]:g} x '}`{description_of(name, function)}`"
            for name, function in self.functions.items()
        ]
        return " + ".join(described)


def load_rewards(weights: Mapping[str, float], **resources: Any) -> WeightedRewards:
    """Rewards by their names, with weights.

    Args:
        weights: by name, as `parse_rewards` of `config.py` reads them.
        resources: what `load_reward` takes.

    Raises:
        ValueError: as `load_reward`.
    """
    return WeightedRewards({name: load_reward(name, **resources) for name in weights}, weights)


def columns_of(function: Reward) -> frozenset[str] | None:
    """Names of the columns that a reward takes, by its signature; `None` for all."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some builtins
        return frozenset()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in parameters if parameter.kind in by_name)


def checked_values(
    name: str,
    function: Reward,
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    columns: Mapping[str, Sequence[Any]],
) -> np.ndarray:
    """What a reward returns, (captions,) float64.

    Raises:
        RewardFailed: it raises an error or exits, or its values are not one finite number for each caption.
    """
    try:
        # Lists of its own: a reward that changes them changes nothing for the others.
        returned = function(list(captions), list(references), **{key: list(value) for key, value in columns.items()})
        values = np.asarray(returned)
    except (Exception, SystemExit) as error:
        raise RewardFailed(f"the reward {printable(name)} failed: {reason_of(error)}") from error
    if values.ndim != 1 or len(values) != len(captions):
        shape = f"{len(values)} values" if values.ndim == 1 else f"a {type(returned).__name__}"
        raise RewardFailed(f"the reward {printable(name)} returned {shape} for {len(captions)} captions")
    if values.dtype.kind not in "biuf":
        wrong = next((value for value in returned if not isinstance(value, (int, float))), returned[0])
        raise RewardFailed(f"the reward {printable(name)} returned a {type(wrong).__name__}, which is no number")
    values = values.astype(np.float64)
    # Their sum is kept as float32.
    is_wrong = ~(np.abs(values) <= np.finfo(np.float32).max)
    if is_wrong.any():
        place = int(is_wrong.argmax())
        raise RewardFailed(
            f"the reward {printable(name)} returned {values[place]} for the caption {printable(captions[place])}"
        )
    return values


def description_of(name: str, function: Reward) -> str:
    """What a model card says of a reward: more than its name where it has a `description`."""
    return getattr(function, "description", name)


class ScoredCaptions(NamedTuple):
    """K decoded captions of each of B images.

    Args:
        rewards: (B, K), float32.
        values: each (B, K), float64, of each reward by name.
        captions: the B * K captions.
    """

    rewards: torch.Tensor
    values: dict[str, torch.Tensor]
    captions: list[str]

    @classmethod
    def failed(cls, num_images: int, num_captions: int) -> ScoredCaptions:
        """In the place of captions whose rewards could not be found: NaN."""
        return cls(torch.full((num_images, num_captions), torch.nan), {}, [""] * num_images * num_captions)


def score_sequences(
    rewards: WeightedRewards,
    tokenizer: DifnetTokenizer,
    sequences: torch.Tensor,
    references: Sequence[Sequence[str]],
    **columns: Sequence[Any],
) -> ScoredCaptions:
    """Rewards of decoded captions.

    Args:
        rewards: to add up; they get the column `finished` besides others.
        tokenizer: of the model.
        sequences: (B, K, L) on the CPU.
        references: reference captions of the B images, as they are written.
        columns: further values, one an image.

    Raises:
        RewardFailed: as `WeightedRewards`.
    """
    num_captions = sequences.shape[1]
    flat = sequences.flatten(0, 1)  # (B * K, L)
    captions = tokenizer.decode_captions(flat)
    finished = (flat == tokenizer.eos_token_id).any(-1).tolist()
    repeated = {name: [value for value in values for _ in range(num_captions)] for name, values in columns.items()}
    of_captions = [captions_of_image for captions_of_image in references for _ in range(num_captions)]
    total, values = rewards(captions, of_captions, finished=finished, **repeated)
    of_images = {name: value.view(-1, num_captions) for name, value in values.items()}
    return ScoredCaptions(total.view(-1, num_captions), of_images, captions)


def caption_rewards(
    cider_reward: CiderReward,
    tokenizer: DifnetTokenizer,
    sequences: torch.Tensor,
    references: Sequence[Sequence[str]],
) -> tuple[torch.Tensor, list[str]]:
    """CIDEr-D of decoded captions, the original's reward.

    Args:
        cider_reward: the metric with the document frequencies of the training captions.
        tokenizer: of the model.
        sequences: (B, K, L) on the CPU.
        references: reference captions of the B images, as they are written.

    Returns:
        The rewards (B, K), float32, and the B * K captions.
    """
    rewards = WeightedRewards({"cider_d": CiderDReward(reward=cider_reward)})
    scored = score_sequences(rewards, tokenizer, sequences, references)
    return scored.rewards, scored.captions


def caption_statistics(
    scored: ScoredCaptions,
    sequences: torch.Tensor,
    tokenizer: DifnetTokenizer,
    baseline: str = "mean",
    greedy_rewards: torch.Tensor | None = None,
) -> dict[str, float]:
    """What SCST logs of the captions it decoded, as sums over them.

    Args:
        scored: the captions and their rewards.
        sequences: (B, K, L), their tokens.
        tokenizer: of the model.
        baseline, greedy_rewards: as those of `scst_baseline`.
    """
    rewards, captions = scored.rewards, scored.captions
    finished = (sequences == tokenizer.eos_token_id).any(-1)
    of_rewards = {}
    if len(scored.values) > 1:
        of_rewards = {f"reward_{name}": values.sum().item() for name, values in scored.values.items()}
    return {
        "captions": rewards.numel(),
        "reward": rewards.sum().item(),
        **of_rewards,
        "baseline": scst_baseline(rewards, baseline, greedy_rewards).sum().item(),
        "reward_spread": rewards.std(-1, correction=0).sum().item() * rewards.shape[1],
        "caption_length": sum(len(caption.split()) for caption in captions),
        "unfinished": (~finished).sum().item(),
        "bad_endings": sum(map(ends_badly, captions)),
    }


def watch_reward(progress: Progress, reward: float) -> None:
    """Adds the mean reward of an optimizer step to the running mean in `progress`.

    Raises:
        TrainingFailed: the reward has collapsed.
    """
    weight = max(1 - REWARD_DECAY, 1 / (progress.reward_steps + 1))
    progress.reward_steps += 1
    average = progress.reward_average + weight * (reward - progress.reward_average)
    # Of rewards below 0, such as penalties, no share means a collapse: there is nothing to watch.
    progress.reward_average = max(0.0, average)
    if progress.reward_steps >= 1 / (1 - REWARD_DECAY):
        progress.reward_peak = max(progress.reward_peak, progress.reward_average)
    if progress.reward_average < COLLAPSED * progress.reward_peak:
        raise TrainingFailed(
            f"the reward has collapsed: {progress.reward_average:.3f} on average over the last hundred steps, after "
            f"{progress.reward_peak:.3f} (epoch {progress.epoch}, step {progress.step}). The checkpoint `best` "
            "is from before. Start SCST again from it (--stage scst --model RUN/best) with a lower "
            "--scst-learning-rate, with --max-grad-norm, or with "
            "--eos-in-reward if captions had become unfinished or ended badly."
        )
