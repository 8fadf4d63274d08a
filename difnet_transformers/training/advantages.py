"""Rewards minus their baseline: what self-critical training (SCST) weighs log-probabilities by.

Original file: `train_scst` in `train.py` of mrwu-mac/DIFNet (CVPR 2022), where the baseline is the mean over an
image's beams, as in Cornia et al. (CVPR 2020). What differs: three other baselines of the literature.

    mean            of all captions of the image; of beams in the original
    leave_one_out   of the other captions of the image, which makes the gradient of independent samples unbiased (Luo,
                    2020, for captions; RLOO of Ahmadian et al., ACL 2024)
    greedy          the reward of the caption that greedy decoding finds (Rennie et al., CVPR 2017)
    group           the mean, and divided by the standard deviation (GRPO of Shao et al., 2024)
"""

from __future__ import annotations

import torch

BASELINES = ("mean", "leave_one_out", "greedy", "group")
# How the baseline followed from the kind of samples before it could be chosen.
BASELINE_OF_SAMPLES = {"beam": "mean", "sample": "leave_one_out"}
GROUP_EPSILON = 1e-4  # as in TRL


def scst_baseline(
    rewards: torch.Tensor, baseline: str = "mean", greedy_rewards: torch.Tensor | None = None
) -> torch.Tensor:
    """What is subtracted from the rewards.

    Args:
        rewards: (B, K), of K captions of each image.
        baseline: one of `BASELINES`; "beam" and "sample" mean those of `BASELINE_OF_SAMPLES`.
        greedy_rewards: (B,), of the greedily decoded captions; "greedy" needs them.

    Returns:
        (B, K).

    Raises:
        ValueError: no such baseline, or one that needs other captions.
    """
    baseline = BASELINE_OF_SAMPLES.get(baseline, baseline)
    num_captions = rewards.shape[-1]
    if baseline not in BASELINES:
        raise ValueError(f"baseline {baseline!r}: choose from {', '.join(BASELINES)}")
    if baseline == "greedy":
        if greedy_rewards is None:
            raise ValueError('baseline "greedy" needs `greedy_rewards`, the rewards of greedily decoded captions')
        return greedy_rewards.unsqueeze(-1).expand_as(rewards)
    if num_captions < 2:
        raise ValueError(f"baseline {baseline!r} needs at least two captions of an image, not {num_captions}")
    if baseline == "leave_one_out":
        return (rewards.sum(-1, keepdim=True) - rewards) / (num_captions - 1)
    return rewards.mean(-1, keepdim=True).expand_as(rewards)


def scst_advantages(
    rewards: torch.Tensor, baseline: str = "mean", greedy_rewards: torch.Tensor | None = None
) -> torch.Tensor:
    """Rewards minus their baseline, with "group" in units of their standard deviation.

    Args:
        rewards, baseline, greedy_rewards: as those of `scst_baseline`.

    Returns:
        Advantages (B, K).

    Raises:
        ValueError: as `scst_baseline`.
    """
    advantages = rewards - scst_baseline(rewards, baseline, greedy_rewards)
    if baseline == "group":
        return advantages / (rewards.std(-1, keepdim=True) + GROUP_EPSILON)
    return advantages
