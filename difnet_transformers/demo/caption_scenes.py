"""Captions a split of a packed dataset with a trained checkpoint: what anyone would write who is given the folder.

python -m difnet_transformers.demo.caption_scenes CHECKPOINT PACKED_DATASET CAPTIONS.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import AutoModel, AutoProcessor

import modeling_difnet  # noqa: F401, registers the model
from difnet_transformers.data import PackedImages


def main(argv: Sequence[str]) -> None:
    checkpoint, dataset, output = argv
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    scenes = load_from_disk(dataset)["test"]
    inputs = processor(**PackedImages(scenes, torch.float32).read(range(len(scenes))), return_tensors="pt")
    captions = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    rows = [{"image_id": i, "caption": caption} for i, caption in zip(scenes["image_id"], captions, strict=True)]
    Path(output).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__} with {size:,} parameters; unseen scenes:")
    for caption in captions[:5]:
        print("  " + caption)


if __name__ == "__main__":
    main(sys.argv[1:])
