"""Captions every image of a split, and scores the captions: the validation of a training run, and `difnet evaluate`.

Corresponds to `evaluate_metrics` in `train.py` of the original (mrwu-mac/DIFNet, CVPR 2022). What differs: several
processes share the images and every image is captioned exactly once, ensembles, and the captions are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset

from caption_metrics import score_captions
from modeling_difnet import (
    DifnetEnsemble,
    DifnetForConditionalGeneration,
    original_beam_search,
    sequence_log_probs,
)
from modeling_difnet.calibration_difnet import Calibration
from modeling_difnet.confidence_difnet import CaptionConfidence, generate_with_confidences
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

from ..command_line import LeftOut, describe
from ..data import CaptionPairBatches, ReferenceBatches
from ..progress import progress_bar
from .data_checks import ROW_ERRORS, form_of, usual_row
from .losses import xe_sequences
from .processes import raise_for_all, total

GENERATION_OPTIONS = {"num_beams": 5, "max_new_tokens": 20}  # the original's evaluation


class CaptionedImage(NamedTuple):
    """An image of a split, the caption that a model gave it and its reference captions.

    `confidence` says how sure the model was, where that was asked for.
    """

    image_id: int
    caption: str
    references: list[str]
    confidence: CaptionConfidence | None = None


@torch.no_grad()
def validation_loss(
    model: DifnetForConditionalGeneration, pairs: CaptionPairBatches, accelerator: Accelerator
) -> float:
    """The mean negative log-likelihood of the tokens of a split's captions. Every process calls it.

    Args:
        model: in eval mode, on the accelerator's device.
        pairs: this process's share of the split.
        accelerator: of the run.
    """
    log_prob, tokens = 0.0, 0
    for batch in pairs:
        on_device = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        sequences, features = xe_sequences(on_device, model.config)
        log_prob += sequence_log_probs(model, sequences, **features).sum().item()
        tokens += int((batch["labels"] != -100).sum())
    return -total(accelerator, log_prob) / total(accelerator, tokens)


def caption_split(
    model: DifnetForConditionalGeneration | DifnetEnsemble,
    tokenizer: DifnetTokenizer,
    dataset: Dataset,
    accelerator: Accelerator,
    *,
    batch_size: int = 50,
    mask_padded_cells: bool = True,
    original_decoding: bool = True,
    generation_options: Mapping[str, Any] = GENERATION_OPTIONS,
    description: str = "captioning",
    left_out: LeftOut | None = None,
    with_confidence: bool = False,
    calibration: Calibration | None = None,
) -> list[CaptionedImage]:
    """Captions every image of a split exactly once, the work shared out over all processes.

    Every process calls it and every process gets the whole list. The model is in eval mode meanwhile.

    Args:
        model: on the accelerator's device, not wrapped for distributed training.
        tokenizer: of the model.
        dataset: one split of a packed dataset, the same on every process.
        batch_size: images of one process at a time.
        mask_padded_cells: whether cells that pad a small grid are hidden; the original attends to them.
        original_decoding: the original's beam search; otherwise Transformers', as `generation_options` say.
        generation_options: arguments of `generate`.
        description: what the progress bar says.
        left_out: gets the images that cannot be read, which then have no entry; without it they are an error.
        with_confidence: whether the model also says how sure it is of each caption.
        calibration: of the model, for its confidences.

    Returns:
        One entry an image, in the order of the dataset. A caption is the decoded words joined by blanks, immediately
        repeated words collapsed, as the original scores them.

    Raises:
        ValueError: an image of any process cannot be read, and there is no `left_out`. Every process ends.
    """
    batches = ReferenceBatches(
        dataset,
        batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        mask_padded_cells=mask_padded_cells,
    )
    custom_generate: dict[str, Any] = {"custom_generate": original_beam_search} if original_decoding else {}
    processor = DifnetProcessor(DifnetFeatureExtractor(), tokenizer)
    options = {**generation_options, **custom_generate}
    words_of = tokenizer.convert_ids_to_tokens(list(range(model.config.vocab_size))) if with_confidence else []
    # The row of the dataset, its caption and how sure the model is of it.
    captions: list[tuple[int, str, CaptionConfidence | None]] = []
    broken: list[tuple[int, str]] = []  # the row of the dataset, and what is wrong with it
    problem: Exception | None = None
    was_training = model.training
    model.eval()
    bar = progress_bar(total=len(dataset), unit=" images", desc=description, disable=not accelerator.is_main_process)
    # An error waits until the other processes are done: they would wait for this one forever.
    try:
        usual = form_of(usual_row(batches.images))
        for number in range(len(batches)):
            first_row = (number * accelerator.num_processes + accelerator.process_index) * batch_size
            rows = np.arange(first_row, min(first_row + batch_size, len(dataset)))
            batch, rows, reasons = readable_batch(batches, rows, usual)
            broken += reasons
            if broken and left_out is None:
                break
            if batch is not None:
                del batch["image_ids"], batch["references"]
                features = {
                    name: tensor.to(accelerator.device, model.dtype if tensor.is_floating_point() else None)
                    for name, tensor in batch.items()
                }
                confidences: list[CaptionConfidence | None] = [None] * len(rows)
                with accelerator.autocast():
                    if with_confidence:
                        found, of_images = generate_with_confidences(model, words_of, features, options, calibration)
                        sequences, confidences = found[:, 0], [each[0] for each in of_images]
                    else:
                        sequences = model.generate(**features, **options)
                captions += zip(rows.tolist(), processor.post_process_captions(sequences), confidences, strict=True)
            # The other processes are about as far.
            bar.update(min((len(rows) + len(reasons)) * accelerator.num_processes, bar.total - bar.n))
    except Exception as error:
        problem = error
    bar.close()
    model.train(was_training)
    raise_for_all(accelerator, problem)

    captions, broken = gather_object(captions), sorted(gather_object(broken))
    image_ids = dataset.select_columns(["image_id"]).with_format(None)
    for row, reason in broken:
        name = f"image {image_ids[row]['image_id']}"
        if left_out is None:
            raise_for_all(accelerator, ValueError(reason if reason.startswith(f"{name}:") else f"{name}: {reason}"))
        elif accelerator.is_main_process:
            left_out.add(name, reason)
    caption_of = {row: (caption, confidence) for row, caption, confidence in captions}
    assert len(captions) == len(caption_of) == len(dataset) - len(broken), (
        "an image was captioned twice, or not at all"
    )
    rows = dataset.select_columns(["image_id", "captions"]).with_format(None)
    return [
        CaptionedImage(row["image_id"], caption_of[position][0], row["captions"], caption_of[position][1])
        for position, row in enumerate(rows)
        if position in caption_of
    ]


def readable_batch(
    batches: ReferenceBatches, rows: np.ndarray, usual: dict[str, Any]
) -> tuple[dict[str, Any] | None, np.ndarray, list[tuple[int, str]]]:
    """The batch of those of some rows that can be read.

    Args:
        batches: what makes the batch.
        rows: of the dataset.
        usual: shapes and types of the split's features (`form_of`).

    Returns:
        The batch, or `None` if no row can be read; its rows; and the others, each with what is wrong with it.
    """
    try:
        batch = batches.make_batch(rows)
        if what_is_wrong(batch, usual) is None:
            return batch, rows, []
    except ROW_ERRORS:
        pass  # looked at one by one below
    reasons = []
    for row in rows:
        try:
            reason = what_is_wrong(batches.make_batch(np.array([row])), usual)
        except ROW_ERRORS as error:
            reason = describe(error)
        if reason is not None:
            reasons.append((int(row), reason))
    rows = np.setdiff1d(rows, [row for row, _ in reasons])
    return (batches.make_batch(rows) if len(rows) else None), rows, reasons


def what_is_wrong(batch: dict[str, Any], usual: dict[str, Any]) -> str | None:
    """Why images of a batch cannot be captioned and scored."""
    for name, form in form_of(batch).items():
        if form != usual.get(name):
            (shape, dtype), expected = form, usual.get(name)
            return f"{name} has the shape {shape} and type {dtype}, where the split has {expected}; pack again"
        if not torch.isfinite(batch[name]).all():
            return f"{name} holds NaN or infinity; pack again from features that are numbers"
    if not all(references and all(references) for references in batch["references"]):
        return "it has no caption, or an empty one, to compare with; pack again"
    return None


def score_split(captioned: Sequence[CaptionedImage], with_meteor: bool = False, with_spice: bool = False) -> dict:
    """Scores by the names of `caption_metrics.score_captions`, over all images."""
    return score_captions(
        [image.caption for image in captioned],
        [image.references for image in captioned],
        with_meteor=with_meteor,
        with_spice=with_spice,
    )
