"""The batches of `SelfCriticalTrainer`: tensors for the model, lists for the rewards.

The original (`ImageDetectionsField` and `DataLoader` in mrwu-mac/DIFNet) knows one kind of dataset; rows here may have
any columns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

IGNORED_LABEL = -100
PADDED = ("input_ids", "attention_mask")


@dataclass
class SelfCriticalCollator:
    """Makes a batch of dataset rows: what the model reads becomes tensors, all other columns remain lists.

    Args:
        input_names: what the model reads. `input_ids` and `attention_mask` are padded by the tokenizer, `labels` with
            -100, everything else is stacked.
        tokenizer: of the model.

    Raises:
        ValueError: a column that only some of the rows have.
    """

    input_names: Collection[str]
    tokenizer: Any = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = list(dict.fromkeys(name for row in rows for name in row))
        for name in names:
            missing = next((index for index, row in enumerate(rows) if name not in row), None)
            if missing is not None:
                raise ValueError(f"`{name}` is missing in row {missing} of a batch whose other rows have it")
        batch: dict[str, Any] = {}
        if self.tokenizer is not None and "input_ids" in names and "input_ids" in self.input_names:
            texts = [{name: row[name] for name in PADDED if name in names} for row in rows]
            batch.update(self.tokenizer.pad(texts, return_tensors="pt"))
        for name in names:
            values = [row[name] for row in rows]
            if name in batch:
                continue
            if name not in self.input_names:
                batch[name] = values
            elif name == "labels":
                labels = [torch.as_tensor(value) for value in values]
                batch[name] = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)
            else:
                batch[name] = torch.stack([torch.as_tensor(value) for value in values])
        return batch


def without_labels(read: Mapping[str, Any]) -> dict[str, Any]:
    """What a model reads of images alone.

    Raises:
        ValueError: a prompt of the decoder.
    """
    if "decoder_input_ids" in read and "labels" not in read:
        raise ValueError("`decoder_input_ids` without `labels` would be prompts, which self-critical training has not")
    return {name: value for name, value in read.items() if name != "labels" and not name.startswith("decoder_")}
