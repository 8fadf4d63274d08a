"""Rewards minus their baseline: what self-critical training (SCST) weighs log-probabilities by.

Original file: `train_scst` in `train.py` of mrwu-mac/DIFNet (CVPR 2022), where the baseline is the mean over an
image's beams, as in Cornia et al. (CVPR 2020).
"""

from __future__ import annotations

import torch


def scst_advantages(rewards: torch.Tensor, samples: str = "beam") -> torch.Tensor:
    """Rewards minus their baseline.

    Args:
        rewards: (B, K), of K captions of each image.
        samples: "beam": the baseline is the mean over all captions of the image, as in the original. "sample": the
            mean over the other ones, which makes the gradient of independent samples unbiased.

    Returns:
        Advantages (B, K).
    """
    if samples == "beam":
        return rewards - rewards.mean(-1, keepdim=True)
    others = (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)
    return rewards - others
