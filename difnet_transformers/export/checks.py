"""Whether an exported captioner says what its checkpoint says: both caption the same random features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modeling_difnet import DifnetForConditionalGeneration, original_beam_search, sequence_log_probs
from processing_difnet import DifnetProcessor

from ..runtime.beam_search import BeamSearchOutput
from ..runtime.model import DifnetRuntimeModel


@dataclass
class ExportCheck:
    """What a comparison found.

    Args:
        num_captions: compared captions: all beams of all images.
        num_equal: how many of them are the same at the same place, token for token up to `<pad>`.
        num_equal_best: how many images have the same best caption.
        num_images: of the comparison.
        log_prob_difference: the largest difference of a token's log-probability, of the same captions.
    """

    num_captions: int
    num_equal: int
    num_equal_best: int
    num_images: int
    log_prob_difference: float


@torch.no_grad()
def check_export(
    model: DifnetForConditionalGeneration,
    processor: DifnetProcessor,
    exported: DifnetRuntimeModel,
    num_images: int = 8,
    seed: int = 0,
) -> ExportCheck:
    """Captions random features with a checkpoint and with its export.

    Args:
        model, processor: the checkpoint, the model in eval mode.
        exported: its export.
        num_images: images of the check.
        seed: of their features.
    """
    config = model.config
    rows, columns = processor.feature_extractor.grid_shape
    random = np.random.default_rng(seed)
    features: dict[str, Any] = {
        "grid_features": random.random((num_images, rows * columns, config.grid_feature_size), np.float32)
    }
    if config.use_segmentation:
        shape = (num_images, config.num_segmentation_classes, rows, columns)
        features["segmentation_features"] = random.random(shape, np.float32)
    num_beams = model.generation_config.num_beams or 1
    found = exported.generate(**features, num_return_sequences=num_beams, return_dict_in_generate=True)
    assert isinstance(found, BeamSearchOutput)
    tensors: dict[str, Any] = {name: torch.from_numpy(each).to(model.dtype) for name, each in features.items()}
    expected = model.generate(**tensors, custom_generate=original_beam_search, num_return_sequences=num_beams).numpy()
    # What the checkpoint thinks of the export's captions.
    sequences: Any = torch.from_numpy(found.sequences)
    log_probs = sequence_log_probs(model, sequences, **tensors).float().numpy()
    is_equal = equal_rows(found.sequences, expected, config.pad_token_id)
    is_compared = before_padding(found.sequences, config.pad_token_id)[:, 1:]
    return ExportCheck(
        num_captions=len(is_equal),
        num_equal=int(is_equal.sum()),
        num_equal_best=int(is_equal[::num_beams].sum()),
        num_images=num_images,
        log_prob_difference=float(np.abs(log_probs - found.sequences_log_probs)[is_compared].max(initial=0)),
    )


def before_padding(sequences: np.ndarray, pad_token_id: int) -> np.ndarray:
    """Which tokens stand before `<pad>`. Behind one that a model has written, all words are equally likely."""
    return (sequences == pad_token_id).cumsum(1) == 0


def equal_rows(first: np.ndarray, second: np.ndarray, pad_token_id: int) -> np.ndarray:
    """Which rows of two arrays of ids are the same up to `<pad>`."""
    width = max(first.shape[1], second.shape[1])
    words = []
    for each in (first, second):
        padded = np.pad(each, ((0, 0), (0, width - each.shape[1])), constant_values=pad_token_id)
        words.append(np.where(before_padding(padded, pad_token_id), padded, pad_token_id))
    return (words[0] == words[1]).all(1)
