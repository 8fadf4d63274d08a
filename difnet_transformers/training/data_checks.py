"""The splits of a packed dataset that a model is trained or evaluated on: opened, and compared with the model."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset

from modeling_difnet import DifnetConfig

from ..command_line import describe
from ..data import PackedImages, StreamedImages, load_packed_split
from ..files import printable

# What reading a row of a packed dataset can raise.
ROW_ERRORS = (ValueError, TypeError, LookupError, OverflowError)
ROWS_LOOKED_AT = 16


def open_split(folder: str | Path, split: str) -> Dataset:
    """One split of a packed dataset, whose features can be read.

    Args:
        folder: the packed dataset.
        split: name of the split.

    Raises:
        ValueError: it is none, or damaged; the text names the folder.
    """
    dataset = load_packed_split(folder, split)
    try:
        PackedImages(dataset)
    except ValueError as error:
        raise ValueError(f"{printable(folder, 300)}: {error}") from error
    return dataset


def sample_of(images: Dataset | StreamedImages) -> PackedImages:
    """The images of a split that can be looked at: all of them, or the first ones of a stream."""
    return PackedImages(images.sample if isinstance(images, StreamedImages) else images)


def form_of(batch: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape of an image and type of the features of a batch, by name."""
    return {
        name: (tuple(batch[name].shape[1:]), batch[name].dtype)
        for name in ("grid_features", "segmentation_features")
        if name in batch
    }


def usual_row(images: PackedImages) -> dict[str, torch.Tensor]:
    """The features of an image, as a batch of one, that have the form of most: single ones may be broken.

    Raises:
        ValueError: none of the images can be read; the reason is that of the first.
    """
    errors: list[Exception] = []
    readable: list[dict[str, torch.Tensor]] = []
    for row in range(len(images)):
        try:
            readable.append(images.read([row]))
        except ROW_ERRORS as error:
            errors.append(error)
        if len(readable) == ROWS_LOOKED_AT:
            break
    if not readable:
        raise ValueError(f"no image of the split can be read; the first: {describe(errors[0])}") from errors[0]
    forms = [form_of(batch) for batch in readable]
    return readable[max(range(len(forms)), key=lambda row: forms.count(forms[row]))]


def check_data(
    config: DifnetConfig, images: Dataset | StreamedImages, source: str | Path, max_new_tokens: int
) -> None:
    """Compares a split with the model.

    Args:
        config: the model's configuration.
        images: a split of a packed dataset, or a stream of one.
        source: the dataset's folder, for messages.
        max_new_tokens: length of the captions to decode.

    Raises:
        ValueError: features or lengths that the model does not take.
    """
    if max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens} is more than the model's position table has rows "
            f"(max_position_embeddings {config.max_position_embeddings}). Give a smaller number."
        )
    try:
        batch = usual_row(sample_of(images))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if config.use_segmentation and "segmentation_features" not in batch:
        raise ValueError(
            f"{source} has no segmentation features, which this model reads. Pack them with --segmentation."
        )
    found = [("grid_feature_size", batch["grid_features"].shape[2])]
    if config.use_segmentation:
        found.append(("num_segmentation_classes", batch["segmentation_features"].shape[1]))
    for name, value in found:
        if getattr(config, name) != value:
            raise ValueError(
                f"{source} has {name} {value}, the model {getattr(config, name)}. Pack the features that the model "
                "was made for, or start from scratch without --model."
            )
