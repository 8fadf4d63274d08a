"""What a training run starts from: the model and its vocabulary, from scratch, from weights or from a checkpoint.

Everything that a user can get wrong before the first step is refused here, with the remedy.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from datasets import Dataset
from transformers import AutoProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training_state import recover  # noqa: E402

from convert_checkpoint import default_generation_config  # noqa: E402
from dataset_difnet import PackedImages  # noqa: E402
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration  # noqa: E402
from modeling_difnet.ensemble_difnet import first_difference  # noqa: E402
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer  # noqa: E402

CHECKPOINTS = ("last", "best", "best_xe")
# Options that only say where, how often and how long; a resumed run may have others.
MAY_CHANGE = frozenset(
    """dataset output resume report_to log_every save_every evaluation_batch_size xe_epochs scst_epochs xe_patience
    scst_patience max_epochs max_steps license""".split()  # noqa: SIM905
)


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
    """Makes the folder of a run, or refuses one that another run is in."""
    output.mkdir(parents=True, exist_ok=True)
    recover(output, CHECKPOINTS)
    if resumed is None and (output / "last").exists():
        raise ValueError(
            f"{output} holds a run already. Go on with it by --resume last, or give another --output (or delete it)."
        )


def check_same_run(
    facts: dict[str, Any], folder: Path, options: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Any]:
    """Refuses to resume what would not be the same run."""
    now = options_as_json(options)
    for name, value in facts["options"].items():
        if name not in MAY_CHANGE and now.get(name) != value:
            raise ValueError(
                f"{folder} is of a run with {flag(name, value)}, this command says {flag(name, now.get(name))}. "
                "Resume with the options of that run, or start a new one from its weights: "
                f"--model {folder}, another --output."
            )
    if facts["num_processes"] != accelerator.num_processes:
        raise ValueError(
            f"{folder} is of a run with {facts['num_processes']} processes, these are {accelerator.num_processes}. "
            f"Start as many, or a new run from its weights: --model {folder}, another --output."
        )
    return facts


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
        processor = AutoProcessor.from_pretrained(source)
        if len(processor.tokenizer) != model.config.vocab_size:
            raise ValueError(
                f"{source}: the vocabulary has {len(processor.tokenizer):,} tokens and the model "
                f"{model.config.vocab_size:,}. Take vocab.json and model from one checkpoint, or give "
                "--new-vocabulary."
            )
        if resumed is None and options.new_vocabulary:
            tokenizer = make_tokenizer(options, train, validation)
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
    batch = PackedImages(train).read([0])
    cells, width = batch["grid_features"].shape[1:]
    facts: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "grid_feature_size": width,
        "use_segmentation": "segmentation_features" in batch and not options.no_segmentation,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("unk", "pad", "bos", "eos")},
        "decoder_start_token_id": tokenizer.bos_token_id,
    }
    if "segmentation_features" in batch:
        facts["num_segmentation_classes"] = batch["segmentation_features"].shape[1]
    if options.dropout is not None:
        facts |= {"dropout": options.dropout, "attention_dropout": options.dropout}
    config = DifnetConfig(**{**read_config(options.config), **facts})
    extractor = DifnetFeatureExtractor(math.isqrt(cells), width, config.num_segmentation_classes)
    model = DifnetForConditionalGeneration(config)
    model.generation_config = default_generation_config(config)
    return model, DifnetProcessor(extractor, tokenizer)


def load_model(folder: Path) -> DifnetForConditionalGeneration:
    try:
        model, report = DifnetForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    except OSError as error:  # also the Hub's errors
        raise ValueError(
            f"{folder}: no model can be loaded from there. Give a folder that convert_checkpoint.py or train.py "
            f"wrote, or a repository of the Hub. ({str(error).splitlines()[0]})"
        ) from error
    wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"{folder}: the weights do not fit its config.json: {wrong}. Take both from one checkpoint.")
    return model


def read_config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object with fields of DifnetConfig, not a {type(fields).__name__}")
    unknown = sorted(set(fields) - set(DifnetConfig().to_dict()))
    if unknown:
        known = ", ".join(name for name in DifnetConfig.__annotations__ if not name.startswith("_"))
        raise ValueError(f"{path}: DifnetConfig has no {', '.join(unknown)}. Its fields: {known}.")
    return fields


def make_tokenizer(options: argparse.Namespace, train: Dataset, validation: Dataset) -> DifnetTokenizer:
    if options.vocab is not None:
        return DifnetTokenizer(vocab_file=options.vocab)
    captions = [caption for images in (train, validation) for each in images["captions"] for caption in each]
    return DifnetTokenizer.from_captions(captions, min_count=options.min_word_count)


def check_same_vocabulary(vocab: Path, tokenizer: DifnetTokenizer, source: Path) -> None:
    given, own = (list(each.get_vocab()) for each in (DifnetTokenizer(vocab_file=vocab), tokenizer))
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
    batch = PackedImages(images).read([0])
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
