"""The captions that self-critical training (SCST) rewards.

Original file: the call of `beam_search` in `train_scst`, `train.py` of mrwu-mac/DIFNet (CVPR 2022). What differs: no
graph is kept, captions may also be samples, or found greedily, and the model may be any captioner of Transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from modeling_difnet import original_beam_search

from .encoder_decoder import generate_captions, model_kind

# What checkpoints store for good captions, and would make samples others than those of the model's distribution. A
# stored `max_length` is left out, for which `max_new_tokens` stands.
NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "max_length": None,
    "use_cache": True,
}


@torch.no_grad()
def decode_for_scst(
    model: nn.Module,
    features: Mapping[str, Any],
    samples: str = "beam",
    num_captions: int = 5,
    max_new_tokens: int = 20,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    **settings: Any,
) -> torch.LongTensor:
    """The captions that SCST rewards: all beams of a search, or samples of the model's distribution.

    Beams of DIFNet are those of the original's search, of other models those of Transformers', ranked by their
    log-probability as in the original. Dropout is as the model's mode says; the original decodes in training mode.

    Args:
        model: DIFNet, or another captioner that `model_kind` knows.
        features: of B images, by the names of `forward`; or what `encode_images` made of them.
        samples: "beam", "sample", or "greedy" with one caption an image.
        num_captions: K, the captions of an image.
        max_new_tokens: length of a caption at most, `<eos>` counted.
        temperature, top_k, top_p: of samples, as `generate` takes them; by default the model's distribution as it is.
        settings: others of `generate`.

    Returns:
        Sequences (B, K, L) that begin with `<bos>`.
    """
    how: dict[str, Any]
    if samples == "sample":
        how = {"num_beams": 1, "do_sample": True, "top_k": top_k, "top_p": top_p, "temperature": temperature}
    elif samples == "greedy":
        how = {"num_beams": 1, "do_sample": False}
    elif model_kind(model) == "difnet":
        how = {"custom_generate": original_beam_search, "num_beams": num_captions, "do_sample": False}
    else:
        how = {"num_beams": num_captions, "do_sample": False, "length_penalty": 0.0, "early_stopping": False}
    if model_kind(model) != "difnet":
        how = {**NEUTRAL, **how}
    sequences = generate_captions(
        model,
        features,
        **{**how, "num_return_sequences": num_captions, "max_new_tokens": max_new_tokens, **settings},
    )  # (B * K, L)
    return sequences.unflatten(0, (-1, num_captions))
