"""The model, its vocabulary and its processor at the start of a run: from scratch, or from given weights.

What a user can get wrong in `--config`, `--vocab` and `--model` is refused here, with the remedy. The original
(mrwu-mac/DIFNet, CVPR 2022) has one size of network, and takes whatever `vocab.pkl` is in the working directory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from modeling_difnet.ensemble_difnet import first_difference
from modeling_difnet.generation_difnet import default_generation_config
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

from ..checkpoints import load_model, load_processor
from ..data import StreamedImages
from ..data.feature_records import (
    FeatureRecords,
    difference_of_classes,
    order_of_classes,
    packed_folder_of,
    provenance_of_dataset,
    recorded_classes,
    records_in,
    records_of_split,
)
from ..files import printable, read_json
from ..original_files import read_vocabulary
from .config import TrainingConfig
from .data_checks import sample_of, usual_row

MOST_LAYERS = 1000
# What a field of --config is called in the message when the data says something else, and what to do about it.
LEAVE_OUT = "leave the field out of the file"
FACTS_OF_DATA = {
    "vocab_size": ("the vocabulary has {} tokens", f"{LEAVE_OUT}, or give a --vocab of that size"),
    "grid_feature_size": ("the dataset has {} values a cell", f"{LEAVE_OUT}, or pack features of that width"),
    "num_segmentation_classes": ("the dataset has {} classes", f"{LEAVE_OUT}, or pack a segmentation of as many"),
    **{
        f"{name}_token_id": (f"the vocabulary has <{name}> at {{}}", f"{LEAVE_OUT}, or give a --vocab with that order")
        for name in ("unk", "pad", "bos", "eos")
    },
    "decoder_start_token_id": ("captions begin with <bos>, which is {}", LEAVE_OUT),
    "model_type": ("this program trains a {}", LEAVE_OUT),
    "is_encoder_decoder": ("for this network it is {}", LEAVE_OUT),
}


def make_model(
    args: TrainingConfig, train: Dataset | StreamedImages, validation: Dataset
) -> tuple[DifnetForConditionalGeneration, DifnetProcessor]:
    """The model to train and its processor: `args.model`, or one from scratch.

    Args:
        args: the fields under "the model" in `difnet train --help`.
        train: the training split.
        validation: the validation split.

    Raises:
        ValueError: the options contradict the data, the weights, or one another.
    """
    records = records_of_split(train, args.dataset)
    if args.model is not None:
        model, processor = load_given_model(args, args.model, train, validation)
        match_classes(model, records_of_processor(processor), records, args.dataset, args.model)
        # Of features that nobody knows the origin of, the model's own records may be wrong.
        keep_records(model.config, processor.feature_extractor, records)
        return model, processor
    tokenizer = make_tokenizer(args, train, validation)
    config = make_config(args, tokenizer, train)
    tokenizer.model_max_length = config.max_position_embeddings
    grid_size = grid_size_of(train, args.dataset)
    extractor = DifnetFeatureExtractor(grid_size, config.grid_feature_size, config.num_segmentation_classes)
    keep_records(config, extractor, records)
    model = DifnetForConditionalGeneration(config)
    model.generation_config = default_generation_config(config)
    return model, DifnetProcessor(extractor, tokenizer)


def grid_size_of(train: Dataset | StreamedImages, dataset: str | os.PathLike) -> int | tuple[int, int]:
    """Cells along a side of the grids, or rows and columns: as the segmentation features or the packing say it.

    Raises:
        ValueError: nothing says it, and the grids are not square.
    """
    row = usual_row(sample_of(train))
    cells = row["grid_features"].shape[1]
    if "segmentation_features" in row:
        rows, columns = row["segmentation_features"].shape[2:]
        return rows, columns
    said = provenance_of_dataset(packed_folder_of(train, dataset)).get("grid_size")
    if isinstance(said, list) and len(said) == 2 and math.prod(said) == cells:
        return said[0], said[1]
    if math.isqrt(cells) ** 2 == cells:
        return math.isqrt(cells)
    raise ValueError(
        f"{printable(dataset, 300)}: {cells} cells are no square grid, and nothing says their rows and columns; pack "
        "with --grid-size ROWSxCOLUMNS"
    )


def keep_records(config: DifnetConfig, extractor: DifnetFeatureExtractor, records: FeatureRecords) -> None:
    """Puts what made the features into the processor of the model that is trained on them.

    Raises:
        ValueError: the record names another number of classes than the features have.
    """
    names = recorded_classes(records.segmentation_model)
    if config.use_segmentation and names is not None and len(names) != config.num_segmentation_classes:
        raise ValueError(
            f"provenance.json of the dataset names {len(names)} segmentation classes, its features have "
            f"{config.num_segmentation_classes}; pack again"
        )
    extractor.grid_backbone = records.grid_backbone
    extractor.segmentation_model = records.segmentation_model if config.use_segmentation else None


def records_of_processor(processor: DifnetProcessor) -> FeatureRecords:
    """What made the features that a model was trained on."""
    return records_in(vars(processor.feature_extractor))


def match_classes(
    model: DifnetForConditionalGeneration,
    known: FeatureRecords,
    records: FeatureRecords,
    dataset: str | os.PathLike,
    source: str | os.PathLike,
) -> None:
    """Makes a model read the segmentation classes of a dataset that has them in another order, by name.

    Nothing is done where the classes of one are not known; `check_data` compares their number.

    Args:
        model: whose weights are put in the order of the dataset.
        known: what the model was trained on.
        records: of the dataset.
        dataset, source: the dataset and the model, for messages.

    Raises:
        ValueError: the dataset has other classes; the text names the first that differs.
    """
    difference, order = compare_classes(model.config, known, records)
    if difference is not None:
        raise ValueError(
            f"{printable(dataset, 300)} has other segmentation classes than {printable(source, 300)}: {difference}. "
            "Pack features of the model's classes, or start from scratch without --model."
        )
    if order is not None:
        reorder_classes(model, order)


def compare_classes(
    config: DifnetConfig, known: FeatureRecords, records: FeatureRecords
) -> tuple[str | None, tuple[int, ...] | None]:
    """How the segmentation classes of a dataset differ from a model's: in words, or only in their order.

    Args:
        config: of the model.
        known: what the model was trained on.
        records: of the dataset.

    Returns:
        The first difference, or `None`; and for the same classes in another order the place among the model's of each
        of the dataset's, or `None`.
    """
    if not config.use_segmentation:
        return None, None
    expected = recorded_classes(known.segmentation_model, config.num_segmentation_classes)
    record = records.segmentation_model
    found = recorded_classes(record, None if record else config.num_segmentation_classes)
    if expected is None or found is None:
        return None, None
    difference = difference_of_classes(expected, found)
    return difference, order_of_classes(found, expected) if difference is None else None


@torch.no_grad()
def reorder_classes(model: DifnetForConditionalGeneration, order: Sequence[int]) -> None:
    """Puts the weights of the segmentation classes in another order: class i is then what class `order[i]` was."""
    weight = model.get_encoder().segmentation_embedding.projection.weight  # (d_model, classes)
    weight.copy_(weight[:, list(order)])


def load_given_model(
    args: TrainingConfig, source: str, train: Dataset | StreamedImages, validation: Dataset
) -> tuple[DifnetForConditionalGeneration, DifnetProcessor]:
    """The model of the checkpoint `source`, with other words where `args` say so."""
    model, processor = load_checkpoint(source)
    if args.new_vocabulary:
        tokenizer = make_tokenizer(args, train, validation)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model = with_new_vocabulary(model, processor.tokenizer, tokenizer)
        processor = DifnetProcessor(processor.feature_extractor, tokenizer)
    elif args.vocab is not None:
        check_same_vocabulary(args.vocab, processor.tokenizer, source)
    if args.dropout is not None:
        raise ValueError("--dropout is for models from scratch; edit dropout in the config.json of --model instead")
    return model, processor


def load_checkpoint(source: str | Path) -> tuple[DifnetForConditionalGeneration, DifnetProcessor]:
    """Model and processor of a checkpoint.

    Raises:
        ValueError: it is none, or its vocabulary has another size than its model.
    """
    model = load_model(source)
    processor = load_processor(source)
    if len(processor.tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"{source}: the vocabulary has {len(processor.tokenizer):,} tokens and the model "
            f"{model.config.vocab_size:,}. Take vocab.json and model from one checkpoint, or give "
            "--new-vocabulary."
        )
    return model, processor


def make_config(args: TrainingConfig, tokenizer: DifnetTokenizer, train: Dataset | StreamedImages) -> DifnetConfig:
    """The configuration of a model from scratch.

    Args:
        args: `config`, `dropout`, `no_segmentation`, and `dataset` for messages.
        tokenizer: of the model.
        train: the training split.

    Raises:
        ValueError: --config contradicts the data or the other options, or makes no network.
    """
    batch = usual_row(sample_of(train))
    width = batch["grid_features"].shape[2]
    given = read_config(args.config)
    found: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "grid_feature_size": width,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("unk", "pad", "bos", "eos")},
        "decoder_start_token_id": tokenizer.bos_token_id,
    }
    has_segmentation = "segmentation_features" in batch
    if given.get("use_segmentation") is True and args.no_segmentation:
        raise ValueError(
            f"{args.config}: use_segmentation is true, and the command says --no-segmentation; leave out one of "
            "the two"
        )
    if given.get("use_segmentation") is True and not has_segmentation:
        raise ValueError(
            f"{args.config}: use_segmentation is true, and {args.dataset} has no segmentation features; pack "
            "them with --segmentation, or set the field to false for the baseline"
        )
    fields = {"use_segmentation": has_segmentation and not args.no_segmentation, **given}
    if has_segmentation and fields["use_segmentation"]:
        found["num_segmentation_classes"] = batch["segmentation_features"].shape[1]
    elif has_segmentation:
        fields.setdefault("num_segmentation_classes", batch["segmentation_features"].shape[1])
    fixed = {"model_type": DifnetConfig.model_type, "is_encoder_decoder": True}
    for name, value in {**found, **fixed}.items():
        if name in given and given[name] != value:
            fact, remedy = FACTS_OF_DATA[name]
            raise ValueError(f"{args.config}: {name} is {printable(given[name])}, and {fact.format(value)}; {remedy}")
    if args.dropout is not None:
        found |= {"dropout": args.dropout, "attention_dropout": args.dropout}
    where = args.config or "the configuration"
    try:
        config = DifnetConfig(**{**fields, **found})
    except Exception as error:  # of Transformers' checks of types, which is no ValueError
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    check_size(config, where)
    return config


def least_weights(config: DifnetConfig) -> int:
    """The number of weights that a network of these sizes has at least; nothing is built."""
    attention = 4 * config.d_model * config.head_dim
    inputs = config.grid_feature_size + config.use_segmentation * config.num_segmentation_classes
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size + config.max_position_embeddings
    encoder_layer = attention * config.encoder_attention_heads + 2 * config.d_model * config.encoder_ffn_dim
    decoder_layer = 2 * attention * config.decoder_attention_heads + 2 * config.d_model * config.decoder_ffn_dim
    layers = config.encoder_layers * encoder_layer + config.decoder_layers * decoder_layer
    return (inputs + embeddings) * config.d_model + layers


def check_size(config: DifnetConfig, source: object) -> None:
    """Refuses sizes that no machine could hold, before anything is built.

    Raises:
        ValueError: the network has more layers or weights than make sense here.
    """
    for name in ("encoder_layers", "decoder_layers", "fusion_iterations"):
        if getattr(config, name) > MOST_LAYERS:
            raise ValueError(f"{source}: {name} is {getattr(config, name):,}; at most {MOST_LAYERS:,} are supported")
    weights = least_weights(config)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**40
    if 4 * weights > memory:
        sizes = ["vocab_size", "grid_feature_size", "max_position_embeddings", "d_model", "head_dim"]
        sizes += ["encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim"]
        largest = max(sizes, key=lambda name: getattr(config, name))
        raise ValueError(
            f"{source}: a network of these sizes has {weights:,} weights, {4 * weights / 2**30:,.0f} GiB; this "
            f"machine has {memory / 2**30:,.0f} GiB of memory. Lower them; the largest is {largest}, "
            f"{getattr(config, largest):,}."
        )


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(printable(name, 200) for name in names[:limit]) + more


def read_config(path: Path | None) -> dict[str, Any]:
    """The fields of `DifnetConfig` in a JSON file.

    Raises:
        ValueError: it is no JSON object, or has other fields.
    """
    if path is None:
        return {}
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object with fields of DifnetConfig, not a {type(fields).__name__}")
    unknown = sorted(set(fields) - set(DifnetConfig().to_dict()))
    if unknown:
        known = ", ".join(name for name in DifnetConfig.__annotations__ if not name.startswith("_"))
        raise ValueError(f"{path}: DifnetConfig has no {_some(unknown)}. Its fields: {known}.")
    return fields


def make_tokenizer(args: TrainingConfig, train: Dataset | StreamedImages, validation: Dataset) -> DifnetTokenizer:
    """The tokenizer of `vocab`, or of the words that the captions of both splits have `min_word_count` times."""
    if args.vocab is not None:
        return DifnetTokenizer(vocab=read_vocabulary(args.vocab))
    captions = [caption for images in (train, validation) for each in images["captions"] for caption in each]
    return DifnetTokenizer.from_captions(captions, min_count=args.min_word_count)


def check_same_vocabulary(vocab: Path, tokenizer: DifnetTokenizer, source: str | Path) -> None:
    """Raises ValueError where the file `vocab` is not the vocabulary of the model in `source`."""
    given, own = read_vocabulary(vocab), list(tokenizer.get_vocab())
    if given != own:
        raise ValueError(
            f"{vocab} does not fit {source}: {first_difference(given, own)}. Leave out --vocab, or add "
            "--new-vocabulary to give the model new words."
        )


def with_new_vocabulary(
    model: DifnetForConditionalGeneration, old: DifnetTokenizer, new: DifnetTokenizer
) -> DifnetForConditionalGeneration:
    """The same network with other words: those that both vocabularies have keep their weights, others start anew."""
    special = {f"{name}_token_id": getattr(new, f"{name}_token_id") for name in ("unk", "pad", "bos", "eos")}
    sizes = {**model.config.to_dict(), **special, "vocab_size": len(new), "decoder_start_token_id": new.bos_token_id}
    config = DifnetConfig(**{name: value for name, value in sizes.items() if name != "auto_map"})
    renewed = DifnetForConditionalGeneration(config)
    renewed.generation_config = default_generation_config(config)
    old_ids = old.get_vocab()
    shared = [(index, old_ids[token]) for token, index in new.get_vocab().items() if token in old_ids]
    to, source = (torch.tensor(ids) for ids in zip(*shared, strict=True))
    state = model.state_dict()
    for name in ("model.decoder.embed_tokens.weight", "lm_head.weight"):
        rows = renewed.state_dict()[name].clone()
        rows[to] = state[name][source]
        state[name] = rows
    renewed.load_state_dict(state)
    return renewed
