"""Captions every image of a split and scores the captions.

Corresponds to `evaluate_metrics` in `train.py` of the original (mrwu-mac/DIFNet, CVPR 2022). What differs: several
processes share the images and every image is captioned exactly once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from caption_metrics import score_captions
from dataset_difnet import ReferenceBatches
from modeling_difnet import DifnetForConditionalGeneration, original_beam_search
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

GENERATION_OPTIONS = {"num_beams": 5, "max_new_tokens": 20}  # the original's evaluation


class CaptionedImage(NamedTuple):
    """An image of a split, the caption that a model gave it and those that people wrote."""

    image_id: int
    caption: str
    references: list[str]


def caption_split(
    model: DifnetForConditionalGeneration,
    tokenizer: DifnetTokenizer,
    dataset: Dataset,
    accelerator: Accelerator,
    *,
    batch_size: int = 50,
    mask_padded_cells: bool = True,
    original_decoding: bool = True,
    generation_options: Mapping[str, Any] = GENERATION_OPTIONS,
    description: str = "captioning",
) -> list[CaptionedImage]:
    """Captions every image of a split exactly once, the work shared out over all processes.

    Every process calls it and every process gets the whole list. The model is in eval mode meanwhile.

    Args:
        model: on the accelerator's device, not wrapped for distributed training.
        tokenizer: of the model.
        dataset: one split of a packed dataset, the same on every process.
        batch_size: images of one process at a time.
        mask_padded_cells: whether cells that pad a small grid are hidden; the original attends to them.
        original_decoding: the original's beam search; otherwise the library's, as `generation_options` say.
        generation_options: arguments of `generate`.
        description: what the progress bar says.

    Returns:
        One entry an image, in the order of the dataset. A caption is the decoded words joined by blanks, immediately
        repeated words collapsed, as the original scores them.
    """
    batches = ReferenceBatches(
        dataset,
        batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        dtype=model.dtype,
        mask_padded_cells=mask_padded_cells,
    )
    custom_generate = {"custom_generate": original_beam_search} if original_decoding else {}
    processor = DifnetProcessor(DifnetFeatureExtractor(), tokenizer)
    captions: list[tuple[int, str]] = []  # the row of the dataset, and its caption
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(dataset), unit=" images", desc=description, disable=not accelerator.is_main_process)
    for number, batch in enumerate(batches):
        image_ids = batch.pop("image_ids")
        del batch["references"]
        features = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        with accelerator.autocast():
            sequences = model.generate(**features, **generation_options, **custom_generate)
        first_row = (number * accelerator.num_processes + accelerator.process_index) * batch_size
        captions += enumerate(processor.post_process_captions(sequences), start=first_row)
        # The other processes are about as far.
        bar.update(min(len(image_ids) * accelerator.num_processes, bar.total - bar.n))
    bar.close()
    model.train(was_training)

    caption_of = dict(gather_object(captions))
    rows = dataset.select_columns(["image_id", "captions"]).with_format(None)
    return [
        CaptionedImage(row["image_id"], caption_of[position], row["captions"]) for position, row in enumerate(rows)
    ]


def score_split(captioned: Sequence[CaptionedImage], with_meteor: bool = False, with_spice: bool = False) -> dict:
    """Scores by the names of `caption_metrics.score_captions`, over all images."""
    return score_captions(
        [image.caption for image in captioned],
        [image.references for image in captioned],
        with_meteor=with_meteor,
        with_spice=with_spice,
    )
