"""What `SelfCriticalTrainer` logs and prints of the captions that it rewards; names as TRL has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .rewards import ScoredCaptions


def averages(sums: Mapping[str, float]) -> dict[str, float]:
    """What is logged, of sums over images: means over images, captions or tokens."""
    of_images = ("reward_std", "frac_reward_zero_std")
    tokens, captions = sums["completions/mean_length"], sums["captions"]
    means = {}
    for name, value in sums.items():
        if name in ("kl", "entropy"):
            means[name] = value / max(tokens, 1)
        elif name not in ("images", "captions"):
            means[name] = value / (sums["images"] if name in of_images else captions)
    return means


def completions_table(scored: ScoredCaptions, references: Sequence[Sequence[str]], num_images: int) -> list[str]:
    """The captions of the first images of a batch, a line each: total reward, each reward's own value, caption.

    Args:
        scored: captions of B images and their rewards.
        references: the reference captions of the B images; the first one of an image is shown.
        num_images: how many are shown.
    """
    lines = []
    num_captions = scored.rewards.shape[1]
    for image, of_image in enumerate(references[:num_images]):
        lines.append(f"reference: {of_image[0] if of_image else ''}")
        for index, total in enumerate(scored.rewards[image].tolist()):
            parts = [f"{name} {values[image, index].item():.3f}" for name, values in scored.values.items()]
            own = f" ({', '.join(parts)})" if len(parts) > 1 else ""
            lines.append(f"{total:8.3f}{own}  {scored.captions[image * num_captions + index]}")
    return lines
