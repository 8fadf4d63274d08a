"""Batches of a packed dataset: for cross-entropy training, SCST, evaluation, and for trainers of Transformers.

In place of the original's `data/dataset.py`. What differs: the seed alone decides the order, processes share an epoch,
and an epoch resumes after any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..command_line import requires
from .packed_dataset import PackedImages

with requires("data"):
    from datasets import Dataset

if TYPE_CHECKING:
    import torch

    from processing_difnet import DifnetTokenizer

IGNORED_LABEL = -100


def check_same_order(state: object, seed: int, num_items: int) -> None:
    """Refuses a saved state of batches whose order is not that of a seed and a number of items.

    Raises:
        ValueError: it is damaged, or of another seed or number.
    """
    fields = ("epoch", "next_batch", "seed", "items")
    if not isinstance(state, Mapping) or any(type(state.get(name)) is not int for name in fields):
        raise ValueError(f"the state of the batches is damaged: it needs the integers {', '.join(fields)}")
    if (state["seed"], state["items"]) != (seed, num_items):
        raise ValueError(
            f"the state was saved with seed {state['seed']} and {state['items']} items, this is seed {seed} and "
            f"{num_items} items; the order of the batches would not be the same"
        )


class Batches:
    """One epoch of batches an iteration: shuffled, shared out over processes, resumable after any batch.

    Epoch `e` goes through the items in the order `numpy.random.default_rng([seed, e]).permutation(n)`. Batch number
    `b` is given to process `b % num_processes`.

    Args:
        dataset: one split of a packed dataset.
        batch_size: items in a batch.
        shuffle: whether the order changes from epoch to epoch; else it is that of the split.
        drop_last: whether only full batches are made, and the same number for every process. Without, every item
            comes exactly once, and some processes may get one batch fewer than others.
        seed: of the order.
        process_index, num_processes: which share of the batches is made.
        dtype, mask_padded_cells: as for `PackedImages`.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        dtype: torch.dtype | None = None,
        mask_padded_cells: bool = True,
    ):
        if batch_size < 1 or not 0 <= process_index < num_processes:
            raise ValueError(
                f"expected batch_size >= 1 and 0 <= process_index < num_processes, got {batch_size}, {process_index} "
                f"and {num_processes}"
            )
        self.images = PackedImages(dataset, dtype, mask_padded_cells)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.epoch = 0
        self._next_batch = 0
        self._resumed = False

    def num_items(self) -> int:
        """Items in an epoch of all processes."""
        return len(self.images)

    def make_batch(self, items: np.ndarray) -> dict[str, Any]:
        """The batch of some items, by number: (B,) int64."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Batches of one epoch for this process."""
        if self.drop_last:
            return self.num_items() // (self.batch_size * self.num_processes)
        batches = -(-self.num_items() // self.batch_size)
        return len(range(self.process_index, batches, self.num_processes))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._resumed:
            self._next_batch = 0
        self._resumed = False
        order = np.arange(self.num_items())
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_items())
        for batch in range(self._next_batch, len(self)):
            start = (batch * self.num_processes + self.process_index) * self.batch_size
            self._next_batch = batch + 1
            yield self.make_batch(order[start : start + self.batch_size])
        self.epoch += 1
        self._next_batch = 0

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands: the batch after the one that was given out last."""
        return {"epoch": self.epoch, "next_batch": self._next_batch, "seed": self.seed, "items": self.num_items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the next iteration resume where `state_dict` was taken.

        Raises:
            ValueError: the seed or the data are others, or the numbers are none that `state_dict` gives.
        """
        check_same_order(state, self.seed, self.num_items())
        if state["epoch"] < 0 or not 0 <= state["next_batch"] <= len(self):
            raise ValueError(
                f"the state says epoch {state['epoch']} and batch {state['next_batch']}; an epoch has {len(self)} "
                "batches"
            )
        self.epoch, self._next_batch, self._resumed = state["epoch"], state["next_batch"], True


class TokenizedCaptions:
    """The labels `w1 .. wn <eos>` of every caption, in one flat array.

    Args:
        dataset: with the columns `image_id` and `captions`.
        tokenizer: of the model.
        max_length: a caption of more tokens (`<eos>` counted) raises ValueError, which names its image.

    Attributes:
        ids: (tokens,), of one caption after another.
        unknown_share: the share of `<unk>` among them.
        starts: where each caption begins in `ids`, and the end, (captions + 1,).
        image_starts: the first caption of each image, and their number, (images + 1,).
    """

    def __init__(self, dataset: Dataset, tokenizer: DifnetTokenizer, max_length: int | None = None):
        ids, lengths, counts = [], [], []
        texts = dataset.select_columns("captions").with_format(None)
        for start in range(0, len(dataset), 1000):
            rows = range(start, min(start + 1000, len(dataset)))
            for row, captions in zip(rows, texts[rows]["captions"], strict=True):
                counts.append(len(captions))
                for words, caption in zip(tokenizer.encode_captions(captions), captions, strict=True):
                    if max_length is not None and len(words) + 1 > max_length:
                        raise ValueError(
                            f"image {dataset[row]['image_id']}: a caption has {len(words) + 1} tokens, the "
                            f"model takes {max_length} (max_position_embeddings); shorten it and pack again, or train "
                            f"a model with a longer position table: {caption[:60]!r}.."
                        )
                    ids.extend([*words, tokenizer.eos_token_id])
                    lengths.append(len(words) + 1)
        self.ids = np.array(ids, dtype=np.int32)
        self.unknown_share = float((self.ids == tokenizer.unk_token_id).mean()) if ids else 0.0
        self.starts = np.cumsum([0, *lengths])
        self.image_starts = np.cumsum([0, *counts])

    def labels(self, captions: np.ndarray) -> torch.Tensor:
        """(captions, length) int64, padded with -100 to the longest."""
        import torch

        lengths = self.starts[captions + 1] - self.starts[captions]
        labels = np.full((len(captions), lengths.max(initial=0)), IGNORED_LABEL, dtype=np.int64)
        for row, start, length in zip(labels, self.starts[captions], lengths, strict=True):
            row[:length] = self.ids[start : start + length]
        return torch.from_numpy(labels)


class CaptionPairBatches(Batches):
    """Batches of (image, caption) pairs, of the original's XE training: 50, shuffled, the last one dropped.

    A batch goes into the model as it is, `model(**batch)`: the features as `PackedImages.read` gives them, and
    `labels` (B, length) int64, `w1 .. wn <eos>` padded with -100. With `max_length`, a caption of more tokens
    (`<eos>` counted) raises ValueError, which names its image. The other arguments are those of `Batches` and
    `PackedImages`. `unknown_share` is the share of `<unk>` among all tokens.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: DifnetTokenizer,
        batch_size: int = 50,
        *,
        shuffle: bool = True,
        drop_last: bool = True,
        max_length: int | None = None,
        **options,
    ):
        super().__init__(dataset, batch_size, shuffle=shuffle, drop_last=drop_last, **options)
        self._captions = TokenizedCaptions(dataset, tokenizer, max_length)
        self.unknown_share = self._captions.unknown_share

    def num_items(self) -> int:
        return int(self._captions.image_starts[-1])

    def make_batch(self, items: np.ndarray) -> dict[str, Any]:
        rows = np.searchsorted(self._captions.image_starts, items, side="right") - 1
        return {**self.images.read(rows), "labels": self._captions.labels(items)}


class ImageCaptionBatches(Batches):
    """Batches of images with all their captions, so that the encoder runs once an image.

    Beside the features of B images: `labels` (captions of all B images, length) and `image_index` (captions,) int64,
    the number in the batch of each caption's image, e.g. for `last_hidden_state[batch["image_index"]]`. `max_length`
    and `unknown_share` are those of `CaptionPairBatches`.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: DifnetTokenizer,
        batch_size: int = 10,
        *,
        shuffle: bool = True,
        drop_last: bool = True,
        max_length: int | None = None,
        **options,
    ):
        super().__init__(dataset, batch_size, shuffle=shuffle, drop_last=drop_last, **options)
        self._captions = TokenizedCaptions(dataset, tokenizer, max_length)
        self.unknown_share = self._captions.unknown_share

    def make_batch(self, items: np.ndarray) -> dict[str, Any]:
        import torch

        starts = self._captions.image_starts
        captions = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in items])
        image_index = np.repeat(np.arange(len(items)), starts[items + 1] - starts[items])
        return {
            **self.images.read(items),
            "labels": self._captions.labels(captions),
            "image_index": torch.from_numpy(image_index),
        }


class ReferenceBatches(Batches):
    """Batches of images with their raw captions, for SCST (`shuffle=True, drop_last=True`) and for evaluation.

    Beside the features of B images: `image_ids`, a list of B integers, and `references`, B lists of strings.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int = 10, *, shuffle: bool = False, drop_last: bool = False, **options
    ):
        super().__init__(dataset, batch_size, shuffle=shuffle, drop_last=drop_last, **options)
        self._texts = dataset.select_columns(["image_id", "captions"]).with_format(None)

    def make_batch(self, items: np.ndarray) -> dict[str, Any]:
        texts = self._texts[items.tolist()]
        return {**self.images.read(items), "image_ids": texts["image_id"], "references": texts["captions"]}


class CaptionPairs:
    """(image, caption) pairs as a map-style dataset, for `transformers.Seq2SeqTrainer` or a `DataLoader`.

    Item `i` is a dictionary of tensors: `grid_features` (cells, width), where the dataset has them
    `segmentation_features` (classes, height, width), where any image of the split has padded cells
    `grid_attention_mask` (cells,), and `labels` (length,) int64, `w1 .. wn <eos>`. `CaptionCollator` makes a batch of
    items. The pairs of an image follow one another, in the order of the split.

    Args:
        dataset, dtype, mask_padded_cells: as for `PackedImages`.
        tokenizer: the model's.
        max_length: a caption of more tokens (`<eos>` counted) raises ValueError, which names its image.
        captions_per_image: how many of an image's captions to take, the first ones; None (default) takes all. With 1
            every image comes once, which is what generating captions for an evaluation needs.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: DifnetTokenizer,
        *,
        captions_per_image: int | None = None,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        mask_padded_cells: bool = True,
    ):
        if captions_per_image is not None and captions_per_image < 1:
            raise ValueError(f"expected captions_per_image >= 1, or None for all captions, got {captions_per_image}")
        self.images = PackedImages(dataset, dtype, mask_padded_cells)
        self._captions = TokenizedCaptions(dataset, tokenizer, max_length)
        starts = self._captions.image_starts
        counts = np.diff(starts)
        if captions_per_image is not None:
            counts = np.minimum(counts, captions_per_image)
        # The image and the caption of each pair.
        self._rows = np.repeat(np.arange(len(counts)), counts)
        first_pairs = np.cumsum([0, *counts])[:-1]
        self._numbers = starts[self._rows] + np.arange(len(self._rows)) - first_pairs[self._rows]
        self._has_padded_cells = mask_padded_cells and bool((self.images.cells() < self.images.cell_shape[0]).any())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Several items, read together; `DataLoader` prefers it."""
        import torch

        pairs = np.asarray(indices)
        rows = self._rows[pairs]
        features = self.images.read(rows)
        if self._has_padded_cells and "grid_attention_mask" not in features:
            features["grid_attention_mask"] = torch.ones(features["grid_features"].shape[:2], dtype=torch.int64)
        items = [dict(zip(features, tensors, strict=True)) for tensors in zip(*features.values(), strict=True)]
        for item, number in zip(items, self._numbers[pairs], strict=True):
            item["labels"] = self._captions.labels(np.array([number]))[0]
        return items


@dataclass
class CaptionCollator:
    """Makes a batch for `model(**batch)` of the items of `CaptionPairs`.

    Features are stacked; an item without a mask, beside others with one, has only real cells. `labels` (B, length)
    are padded with -100 to the longest. `decoder_input_ids` (B, length), `<bos> w1 .. wn <pad> ..`, are what the model
    makes of the labels by itself; they are there for a loss that is computed outside of the model, such as the
    Trainer's label smoothing. Items without `labels`, images to predict captions for, make a batch without both.

    Args:
        tokenizer: the model's.

    Raises:
        ValueError: something that only some of the items have.
    """

    tokenizer: DifnetTokenizer

    def __call__(self, items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        import torch

        names = dict.fromkeys(name for item in items for name, value in item.items() if value is not None)
        batch = {}
        for name in names:
            values = {index: item[name] for index, item in enumerate(items) if item.get(name) is not None}
            missing = [index for index in range(len(items)) if index not in values]
            if missing and not name.endswith("_attention_mask"):
                raise ValueError(
                    f"`{name}` is missing in item {missing[0]} of a batch whose other items have it: give it to all "
                    "or to none."
                )
            if name != "labels":
                full_mask = torch.ones_like(next(iter(values.values())))
                batch[name] = torch.stack([values.get(index, full_mask) for index in range(len(items))])
        if "labels" not in names:
            return batch
        labels = [item["labels"] for item in items]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)
        words = batch["labels"][:, :-1]
        words = words.masked_fill(words == IGNORED_LABEL, self.tokenizer.pad_token_id)
        batch["decoder_input_ids"] = torch.nn.functional.pad(words, (1, 0), value=self.tokenizer.bos_token_id)
        return batch
