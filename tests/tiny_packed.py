"""A packed dataset that a tiny model learns in seconds: one thing in one colour, and captions that name both."""

import json
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from datasets.arrow_writer import ParquetWriter

from difnet_transformers.data.packed_dataset import encode_segmentation, packed_features

THINGS = ["dog", "cat", "bus", "kite", "horse"]
COLOURS = ["red", "blue", "green"]
GRID_FEATURE_SIZE = 6
NUM_CLASSES = 5
SIZES = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "head_dim": 8,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 12,
}


def row(image: int, with_segmentation: bool) -> dict:
    """The thing is in the segmentation features, the colour in the grid features."""
    rng = np.random.default_rng(image)
    thing, colour = int(rng.integers(len(THINGS))), int(rng.integers(len(COLOURS)))
    grid = rng.random((4, GRID_FEATURE_SIZE)) * 0.1
    grid[:, colour] += 1
    segmentation = np.zeros((NUM_CLASSES, 2, 2))
    segmentation[thing] = 1
    names = (COLOURS[colour], THINGS[thing])
    values = {
        "image_id": 100 + image,
        "file_name": f"{image}.jpg",
        "restval": False,
        "grid_features": grid.astype(np.float16),
        "grid_cells": 4,
        "captions": [
            "A {} {} on the grass.".format(*names),
            "a photo of a {} {}".format(*names),
            "there is one {} {} here".format(*names),
        ],
    }
    if with_segmentation:
        values["segmentation_features"] = encode_segmentation(segmentation.astype(np.float16))
    return values


def write_packed(folder: Path, sizes: dict[str, int], with_segmentation: bool = True) -> Path:
    """A packed dataset with so many images in each split."""
    columns = packed_features(
        "float16", grid_size=2, grid_feature_size=GRID_FEATURE_SIZE, with_segmentation=with_segmentation
    )
    first = 0
    splits = {}
    for name, size in sizes.items():
        rows = [row(image, with_segmentation) for image in range(first, first + size)]
        splits[name] = Dataset.from_list(rows, features=columns)
        first += size
    DatasetDict(splits).save_to_disk(folder)
    return folder


def write_parquet(folder: Path, sizes: dict[str, list[int]], with_segmentation: bool = True) -> Path:
    """The same images as Parquet, with so many in each file of a split and three in a row group."""
    columns = packed_features(
        "float16", grid_size=2, grid_feature_size=GRID_FEATURE_SIZE, with_segmentation=with_segmentation
    )
    (folder / "data").mkdir(parents=True)
    first = 0
    for name, files in sizes.items():
        for number, size in enumerate(files):
            rows = [row(image, with_segmentation) for image in range(first, first + size)]
            path = folder / "data" / f"{name}-{number:05d}-of-{len(files):05d}.parquet"
            with ParquetWriter(features=columns, path=str(path), writer_batch_size=3) as writer:
                for each in rows:
                    writer.write(each)
                writer.finalize()
            first += size
    return folder


def write_config(path: Path) -> Path:
    path.write_text(json.dumps(SIZES))
    return path
