"""The reward of self-critical training, what is logged of the captions it rewards, and the watch over its collapse.

Corresponds to the lines of `train_scst` in `train.py` of the original (mrwu-mac/DIFNet, CVPR 2022) that tokenize and
score the beams. What differs: no Java, the end of a caption can count in the reward, and a collapsed reward ends the
run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from caption_metrics import CiderReward
from processing_difnet import DifnetTokenizer

from .checkpoint import Progress
from .logging import TrainingFailed

# Words that a caption should not end with.
BAD_ENDINGS = frozenset(
    """a an the of in on at to with and or for from by is are was were be near next behind under over above into onto
    through while as his her their its""".split()  # noqa: SIM905 (a list of 35 lines says no more)
)
# The reward has collapsed when its running mean, over the last hundred steps or so, falls below half of its own peak.
REWARD_DECAY = 0.99
COLLAPSED = 0.5


def caption_rewards(
    cider_reward: CiderReward,
    tokenizer: DifnetTokenizer,
    sequences: torch.Tensor,
    references: Sequence[Sequence[str]],
) -> tuple[torch.Tensor, list[str]]:
    """CIDEr-D of decoded captions.

    Args:
        cider_reward: the metric with the document frequencies of the training captions.
        tokenizer: of the model.
        sequences: (B, K, L) on the CPU.
        references: reference captions of the B images, as they are written.

    Returns:
        The rewards (B, K), float32, and the B * K captions.
    """
    num_captions = sequences.shape[1]
    flat = sequences.flatten(0, 1)
    captions = tokenizer.decode_captions(flat)
    finished = (flat == tokenizer.eos_token_id).any(-1).tolist()
    repeated = [captions_of_image for captions_of_image in references for _ in range(num_captions)]
    rewards = cider_reward.reward(captions, repeated, finished=finished)
    return torch.from_numpy(rewards.astype(np.float32)).view(-1, num_captions), captions


def caption_statistics(
    rewards: torch.Tensor,
    advantages: torch.Tensor,
    captions: Sequence[str],
    sequences: torch.Tensor,
    tokenizer: DifnetTokenizer,
) -> dict[str, float]:
    """What SCST logs of the captions it decoded, as sums over them.

    Args:
        rewards: (B, K).
        advantages: (B, K).
        captions: the B * K captions.
        sequences: (B, K, L), their tokens.
        tokenizer: of the model.
    """
    finished = (sequences == tokenizer.eos_token_id).any(-1)
    return {
        "captions": rewards.numel(),
        "reward": rewards.sum().item(),
        "baseline": (rewards - advantages).sum().item(),
        "reward_spread": rewards.std(-1, correction=0).sum().item() * rewards.shape[1],
        "caption_length": sum(len(caption.split()) for caption in captions),
        "unfinished": (~finished).sum().item(),
        "bad_endings": sum(map(ends_badly, captions)),
    }


def ends_badly(caption: str) -> bool:
    """Whether a caption is empty, or its last word cannot be the last: `a man with a`, `a dog ..`."""
    *_, last = caption.split() or [""]
    return last in BAD_ENDINGS or not any(map(str.isalnum, last))


def watch_reward(progress: Progress, reward: float) -> None:
    """Adds the mean reward of an optimizer step to the running mean in `progress`.

    Raises:
        TrainingFailed: the reward has collapsed.
    """
    weight = max(1 - REWARD_DECAY, 1 / (progress.reward_steps + 1))
    progress.reward_steps += 1
    progress.reward_average += weight * (reward - progress.reward_average)
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
