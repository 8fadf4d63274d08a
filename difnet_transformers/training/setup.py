"""What a training run starts from: the model and its vocabulary, from scratch, from weights or from a checkpoint.

Everything that a user can get wrong before the first step is refused here, with the remedy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from datasets import Dataset

from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from modeling_difnet.ensemble_difnet import first_difference
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

from ..checkpoints import load_model, load_processor
from ..command_line import describe
from ..conversion import default_generation_config
from ..data.packed_dataset import PackedImages, load_packed_split
from ..files import printable, read_json
from .checkpoint import Progress, recover

CHECKPOINTS = ("last", "best", "best_xe")
MOST_LAYERS = 1000
# Options that only say where, how often and how long; a resumed run may have others.
MAY_CHANGE = frozenset(
    """dataset output resume report_to log_every save_every evaluation_batch_size xe_epochs scst_epochs xe_patience
    scst_patience max_epochs max_steps debug license""".split()  # noqa: SIM905
)
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


def make_accelerator(options: argparse.Namespace) -> Accelerator:
    trackers = [name for name in options.report_to if name != "none"]
    available = {tracker.value for tracker in get_available_trackers()}
    for name in trackers:
        if name not in available:
            raise ValueError(
                f"--report-to {name}: the package is not installed, or Accelerate does not know it. `pip install "
                f"{name}`, or choose one of: {', '.join(sorted(available | {'none'}))}."
            )
    return Accelerator(
        mixed_precision=options.mixed_precision,
        cpu=options.cpu,
        log_with=trackers or None,
        project_config=ProjectConfiguration(str(options.output), logging_dir=str(options.output / "tensorboard")),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def prepare_output(output: Path, resumed: Path | None) -> None:
    """Readies the folder of a run, or refuses one that another run is in.

    Args:
        output: the run's folder, which exists.
        resumed: the checkpoint that the run goes on from.

    Raises:
        ValueError: `output` holds a run, and `resumed` is none of its checkpoints.
    """
    recover(output, CHECKPOINTS)
    held = next((name for name in CHECKPOINTS if (output / name).exists()), None)
    if held is None or (resumed is not None and resumed.resolve().parent == output.resolve()):
        return
    if resumed is None:
        raise ValueError(
            f"{output} holds a run already. Go on with it by --resume last, or give another --output (or delete it)."
        )
    raise ValueError(
        f"{output} holds a run already, whose checkpoints `{resumed}` would replace. Go on with that run by --resume "
        "last, or give another --output."
    )


def check_same_run(
    facts: dict[str, Any], folder: Path, options: argparse.Namespace, accelerator: Accelerator
) -> list[str]:
    """Refuses to resume what would not be the same run.

    How images are shared out to batches may change where memory did not suffice: before the first step of SCST all
    that concerns SCST, and later its batch size and the accumulation; in the XE stage the batch size and the
    accumulation if their product stays.

    Args:
        facts: what `read_checkpoint` gave. Its progress is put where it is with other batches, and `resized` says
            whether it was.
        folder: the checkpoint.
        options: of the command.
        accelerator: of the run.

    Returns:
        What is not as it was, one line each.

    Raises:
        ValueError: options or the number of processes are others.
    """
    now, before, progress = options_as_json(options), facts["options"], facts["progress"]
    changed = [name for name, value in before.items() if name not in MAY_CHANGE and name in now and now[name] != value]
    notes = []
    for name in changed:
        if not _may_change_here(name, before, now, progress):
            raise ValueError(
                f"{folder} is of a run with {flag(name, before[name])}, this command says {flag(name, now[name])}. "
                "Resume with the options of that run, or start a new one from its weights: "
                f"--model {folder}, another --output."
            )
        notes.append(f"{flag(name, now[name])}, where the run had {flag(name, before[name])}")
    if facts["num_processes"] != accelerator.num_processes:
        raise ValueError(
            f"{folder} is of a run with {facts['num_processes']} processes, these are {accelerator.num_processes}. "
            f"Start as many, or a new run from its weights: --model {folder}, another --output."
        )
    size = f"{progress.stage}_batch_size"
    facts["resized"] = size in changed
    if facts["resized"]:
        # Batches go through the images in one order, whatever their size: the images so far are skipped.
        progress.batch = progress.batch * before[size] // now[size]
    return notes


def _may_change_here(name: str, before: dict[str, Any], now: dict[str, Any], progress: Progress) -> bool:
    xe_goes_on = progress.stage == "xe"
    scst_has_begun = progress.stage == "scst" and progress.step > 0
    xe_images_per_step = [
        options.get("xe_batch_size", 0) * options.get("gradient_accumulation_steps", 1) for options in (before, now)
    ]
    if name in ("xe_batch_size", "gradient_accumulation_steps") and xe_goes_on:
        return xe_images_per_step[0] == xe_images_per_step[1]
    if name in ("scst_batch_size", "gradient_accumulation_steps"):
        return progress.stage != "done"
    of_scst = name.startswith("scst_") or name == "eos_in_reward"
    return of_scst and progress.stage != "done" and not scst_has_begun


def check_same_data(
    before: dict[str, Any] | None, now: dict[str, Any], folder: Path, options: argparse.Namespace
) -> None:
    """Refuses to go on with other data than the run began with; where they lie does not matter.

    Args:
        before: fingerprints of the splits in the checkpoint, "train" and "validation".
        now: those of the splits that this command names.
        folder: the checkpoint.
        options: of the command.

    Raises:
        ValueError: a split has other images, captions or features.
    """
    for split, fingerprint in now.items():
        if before.get(split) == fingerprint:
            continue
        name = getattr(options, f"{split}_split")
        raise ValueError(
            f"{options.dataset}: the split {name!r} is not the one that the run of {folder} began with "
            f"({difference_of_data(before.get(split), fingerprint)}). Resume with that dataset, wherever it lies, or "
            f"start a new run from the weights: --model {folder}, another --output."
        )


def difference_of_data(before: object, now: object) -> str:
    """What differs between two fingerprints, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name, value in now.items():
            if before.get(name) != value:
                return f"{name.replace('_', ' ')} {printable(before.get(name), 24)}, now {printable(value, 24)}"
    return f"fingerprint {printable(before, 24)}, now {printable(now, 24)}"


def options_as_json(options: argparse.Namespace) -> dict[str, Any]:
    return json.loads(json.dumps(vars(options), default=str))


def flag(name: str, value: Any) -> str:
    return f"--{name.replace('_', '-')} {value}" if value is not None else f"no --{name.replace('_', '-')}"


def make_model(
    options: argparse.Namespace, resumed: Path | None, train: Dataset, validation: Dataset
) -> tuple[DifnetForConditionalGeneration, DifnetProcessor]:
    """The model to train and its processor: resumed, given, or from scratch."""
    source = resumed or options.model
    if source is not None:
        model = load_model(source)
        processor = load_processor(source)
        if len(processor.tokenizer) != model.config.vocab_size:
            raise ValueError(
                f"{source}: the vocabulary has {len(processor.tokenizer):,} tokens and the model "
                f"{model.config.vocab_size:,}. Take vocab.json and model from one checkpoint, or give "
                "--new-vocabulary."
            )
        if resumed is None and options.new_vocabulary:
            tokenizer = make_tokenizer(options, train, validation)
            tokenizer.model_max_length = model.config.max_position_embeddings
            model = with_new_vocabulary(model, processor.tokenizer, tokenizer)
            processor = DifnetProcessor(processor.feature_extractor, tokenizer)
        elif resumed is None and options.vocab is not None:
            check_same_vocabulary(options.vocab, processor.tokenizer, source)
        if resumed is None and options.dropout is not None:
            raise ValueError(
                "--dropout is for models from scratch; edit dropout in the config.json of --model instead"
            )
        return model, processor

    tokenizer = make_tokenizer(options, train, validation)
    config, cells = make_config(options, tokenizer, train)
    tokenizer.model_max_length = config.max_position_embeddings
    extractor = DifnetFeatureExtractor(math.isqrt(cells), config.grid_feature_size, config.num_segmentation_classes)
    model = DifnetForConditionalGeneration(config)
    model.generation_config = default_generation_config(config)
    return model, DifnetProcessor(extractor, tokenizer)


def make_config(options: argparse.Namespace, tokenizer: DifnetTokenizer, train: Dataset) -> tuple[DifnetConfig, int]:
    """The configuration of a model from scratch, and the cells of a grid.

    Raises:
        ValueError: --config contradicts the data or the other options, or makes no network.
    """
    batch = usual_row(PackedImages(train))
    cells, width = batch["grid_features"].shape[1:]
    given = read_config(options.config)
    found: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "grid_feature_size": width,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("unk", "pad", "bos", "eos")},
        "decoder_start_token_id": tokenizer.bos_token_id,
    }
    has_segmentation = "segmentation_features" in batch
    if given.get("use_segmentation") is True and options.no_segmentation:
        raise ValueError(
            f"{options.config}: use_segmentation is true, and the command says --no-segmentation; leave out one of "
            "the two"
        )
    if given.get("use_segmentation") is True and not has_segmentation:
        raise ValueError(
            f"{options.config}: use_segmentation is true, and {options.dataset} has no segmentation features; pack "
            "them with --segmentation, or set the field to false for the baseline"
        )
    fields = {"use_segmentation": has_segmentation and not options.no_segmentation, **given}
    if has_segmentation and fields["use_segmentation"]:
        found["num_segmentation_classes"] = batch["segmentation_features"].shape[1]
    elif has_segmentation:
        fields.setdefault("num_segmentation_classes", batch["segmentation_features"].shape[1])
    fixed = {"model_type": DifnetConfig.model_type, "is_encoder_decoder": True}
    for name, value in {**found, **fixed}.items():
        if name in given and given[name] != value:
            fact, remedy = FACTS_OF_DATA[name]
            raise ValueError(
                f"{options.config}: {name} is {printable(given[name])}, and {fact.format(value)}; {remedy}"
            )
    if options.dropout is not None:
        found |= {"dropout": options.dropout, "attention_dropout": options.dropout}
    where = options.config or "the configuration"
    try:
        config = DifnetConfig(**{**fields, **found})
    except Exception as error:  # of the library's checks of types, which is no ValueError
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    check_size(config, where)
    return config, cells


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
        sizes = ("vocab_size", "grid_feature_size", "max_position_embeddings", "d_model", "head_dim")
        sizes += ("encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim")
        largest = max(sizes, key=lambda name: getattr(config, name))
        raise ValueError(
            f"{source}: a network of these sizes has {weights:,} weights, {4 * weights / 2**30:,.0f} GiB; this "
            f"machine has {memory / 2**30:,.0f} GiB of memory. Lower them; the largest is {largest}, "
            f"{getattr(config, largest):,}."
        )


# What reading a row of a packed dataset can raise.
ROW_ERRORS = (ValueError, TypeError, LookupError, OverflowError)
ROWS_LOOKED_AT = 16


def reason_of(error: BaseException) -> str:
    """What an error says, as a part of a line that says more."""
    return " ".join(describe(error).removesuffix("(--debug shows where)").split())


def open_split(folder: str | Path, split: str) -> Dataset:
    """One split of a packed dataset, whose features can be read.

    Raises:
        ValueError: it is none, or damaged; the text names the folder.
    """
    dataset = load_packed_split(folder, split)
    try:
        PackedImages(dataset)
    except ValueError as error:
        raise ValueError(f"{printable(folder, 300)}: {error}") from error
    return dataset


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
    first: Exception | None = None
    readable: list[dict[str, torch.Tensor]] = []
    for row in range(len(images)):
        try:
            readable.append(images.read([row]))
        except ROW_ERRORS as error:
            first = first or error
        if len(readable) == ROWS_LOOKED_AT:
            break
    if not readable:
        raise ValueError(f"no image of the split can be read; the first: {describe(first)}") from first
    forms = [form_of(batch) for batch in readable]
    return readable[max(range(len(forms)), key=lambda row: forms.count(forms[row]))]


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


def make_tokenizer(options: argparse.Namespace, train: Dataset, validation: Dataset) -> DifnetTokenizer:
    if options.vocab is not None:
        return read_vocabulary(options.vocab)
    captions = [caption for images in (train, validation) for each in images["captions"] for caption in each]
    return DifnetTokenizer.from_captions(captions, min_count=options.min_word_count)


def read_vocabulary(path: Path) -> DifnetTokenizer:
    """The tokenizer of a vocab.json; ValueError, which names the file, if it is none."""
    read_json(path)
    try:
        return DifnetTokenizer(vocab_file=path)
    except Exception as error:  # of a content of any other kind
        said = reason_of(error)
        raise ValueError(said if str(path) in said else f"{path}: no vocabulary: {said}") from error


def check_same_vocabulary(vocab: Path, tokenizer: DifnetTokenizer, source: Path) -> None:
    given, own = (list(each.get_vocab()) for each in (read_vocabulary(vocab), tokenizer))
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


def check_data(config: DifnetConfig, images: Dataset, options: argparse.Namespace) -> None:
    """Refuses features and lengths that the model does not take."""
    folder = options.dataset
    if options.max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"--max-new-tokens {options.max_new_tokens} is more than the model's position table has rows "
            f"(max_position_embeddings {config.max_position_embeddings}). Give a smaller number."
        )
    try:
        batch = usual_row(PackedImages(images))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if config.use_segmentation and "segmentation_features" not in batch:
        raise ValueError(
            f"{folder} has no segmentation features, which this model reads. Pack them with --segmentation."
        )
    found = [("grid_feature_size", batch["grid_features"].shape[2])]
    if config.use_segmentation:
        found.append(("num_segmentation_classes", batch["segmentation_features"].shape[1]))
    for name, value in found:
        if getattr(config, name) != value:
            raise ValueError(
                f"{folder} has {name} {value}, the model {getattr(config, name)}. Pack the features that the model "
                "was made for, or start from scratch without --model."
            )
