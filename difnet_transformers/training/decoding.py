"""The captions that self-critical training (SCST) rewards.

Original file: the call of `beam_search` in `train_scst`, `train.py` of mrwu-mac/DIFNet (CVPR 2022). What differs: no
graph is kept, and captions may also be samples, or found greedily.
"""

from __future__ import annotations

from typing import Any

import torch

from modeling_difnet import DifnetForConditionalGeneration, original_beam_search


@torch.no_grad()
def decode_for_scst(
    model: DifnetForConditionalGeneration,
    features: dict[str, torch.Tensor],
    samples: str = "beam",
    num_captions: int = 5,
    max_new_tokens: int = 20,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> torch.LongTensor:
    """The captions that SCST rewards: all beams of the original's search, or samples of the model's distribution.

    Dropout is as the model's mode says; the original decodes in training mode.

    Args:
        model: the network.
        features: of B images, by the names of `forward`.
        samples: "beam", "sample", or "greedy" with one caption an image.
        num_captions: K, the captions of an image.
        max_new_tokens: length of a caption at most, `<eos>` counted.
        temperature, top_k, top_p: of samples, as `generate` takes them; by default the model's distribution as it is.

    Returns:
        Sequences (B, K, L) that begin with `<bos>`.
    """
    how: dict[str, Any] = {"custom_generate": original_beam_search, "num_beams": num_captions, "do_sample": False}
    if samples == "sample":
        how = {"num_beams": 1, "do_sample": True, "top_k": top_k, "top_p": top_p, "temperature": temperature}
    elif samples == "greedy":
        how = {"num_beams": 1, "do_sample": False}
    images: dict[str, Any] = dict(features)
    sequences = model.generate(
        **images, **how, num_return_sequences=num_captions, max_new_tokens=max_new_tokens
    )  # (B * K, L)
    return sequences.unflatten(0, (-1, num_captions))
