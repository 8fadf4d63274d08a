"""Captions every image of a split with a model or an ensemble, and scores the captions.

Corresponds to `evaluate_metrics` in `train.py` of the original (mrwu-mac/DIFNet, CVPR 2022). What differs: several
processes share the images and every image is captioned exactly once, ensembles, and the captions are kept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers.utils import logging as transformers_logging

from caption_metrics import JavaMissing, check_java
from modeling_difnet import DifnetEnsemble, DifnetForConditionalGeneration
from modeling_difnet.ensemble_difnet import check_same_vocabulary
from modeling_difnet.weights_difnet import check_finite_weights
from processing_difnet import DifnetProcessor

from ..checkpoints import checkpoint_folder, load_model, load_processor
from ..command_line import LeftOut, add_debug_option, add_strict_option, reason_of, run_command
from ..files import atomic_write, folder_lock, naming, printable
from ..model_card import update_results
from ..training.data_checks import check_data, open_split
from ..training.processes import all_or_none, end_training
from ..training.validation import GENERATION_OPTIONS, CaptionedImage, caption_split, score_split

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# The program


def load_captioner(
    names: Sequence[str], dtype: torch.dtype
) -> tuple[DifnetForConditionalGeneration | DifnetEnsemble, DifnetProcessor]:
    """The model, or the ensemble of several, in eval mode, and the processor of the first."""
    for name in names:
        checkpoint_folder(name)
    try:
        check_same_vocabulary(names)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{' '.join(names)}: a vocab.json cannot be read ({reason_of(error)})") from error
    processor = load_processor(names[0])
    models = [load_model(name).to(dtype) for name in names]
    for name, model in zip(names, models, strict=True):
        if len(processor.tokenizer) != model.config.vocab_size:
            raise ValueError(
                f"{name}: vocab.json has {len(processor.tokenizer):,} tokens and the model "
                f"{model.config.vocab_size:,}; take both from one checkpoint"
            )
        if dtype == torch.float16:  # which has no numbers above 65,504
            check_finite_weights(model, f"{name} as float16")
    return (models[0] if len(models) == 1 else DifnetEnsemble(models)).eval(), processor


def write_json(path: Path, content: Any) -> None:
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load(
    options: argparse.Namespace,
) -> tuple[Dataset, DifnetForConditionalGeneration | DifnetEnsemble, DifnetProcessor]:
    """Everything that can be wrong is looked at before the first caption is made."""
    try:
        check_java(options.meteor, options.spice)
    except JavaMissing as error:
        raise ValueError(str(error)) from error
    if options.update_card and not (Path(options.model[0]) / "README.md").is_file():
        raise ValueError(f"--update-card: {options.model[0]} is no folder with a README.md, the model card")
    dataset = open_split(options.dataset, options.split)
    model, processor = load_captioner(options.model, DTYPES[options.dtype])
    check_data(model.config, dataset, options.dataset, options.max_new_tokens)
    return dataset, model, processor


def run(options: argparse.Namespace, accelerator: Accelerator) -> int:
    """Captions, scores and writes; returns the exit code."""
    dataset, model, processor = all_or_none(accelerator, lambda: load(options))
    with ExitStack() as held:

        def take_folder() -> None:
            if accelerator.is_main_process:
                with naming(options.output):
                    options.output.mkdir(parents=True, exist_ok=True)
                held.enter_context(folder_lock(options.output, "evaluate_captions.py"))

        all_or_none(accelerator, take_folder)
        generation = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}
        left_out = LeftOut()
        start = time.perf_counter()
        captioned = caption_split(
            model.to(accelerator.device),
            processor.tokenizer,
            dataset,
            accelerator,
            batch_size=options.batch_size,
            mask_padded_cells=processor.feature_extractor.mask_padded_cells,
            original_decoding=options.decoding == "original",
            generation_options=generation,
            description=options.split,
            left_out=left_out,
        )
        report = {
            "model": options.model,
            "dataset": options.dataset_name,
            "split": options.split,
            "images": len(captioned),
            "left_out": sorted(set(dataset["image_id"]) - {image.image_id for image in captioned}),
            "decoding": options.decoding,
            **generation,
            "dtype": options.dtype,
            "seconds": round(time.perf_counter() - start, 3),
            "batch_size": options.batch_size,
            "num_processes": accelerator.num_processes,
            "device": accelerator.device.type,
        }
        return all_or_none(
            accelerator, lambda: finish(options, captioned, report, left_out) if accelerator.is_main_process else 0
        )


def finish(
    options: argparse.Namespace, captioned: Sequence[CaptionedImage], report: dict[str, Any], left_out: LeftOut
) -> int:
    """Writes captions, scores and, if asked to, the card; returns the exit code."""
    exit_code = left_out.report(len(captioned), options.strict)
    captions_file = options.output / f"captions_{options.split}_results.json"
    write_json(captions_file, [{"image_id": image.image_id, "caption": image.caption} for image in captioned])
    scores = score_split(captioned, options.meteor, options.spice)
    seconds = max(report["seconds"], 0.001)
    report |= {"scores": scores, "images_per_second": round(len(captioned) / seconds, 2)}
    scores_file = options.output / f"scores_{options.split}.json"
    write_json(scores_file, report)
    if options.update_card:
        measured_on = {"dataset": options.dataset_name, "split": options.split}
        update_results(options.model[0], scores, **measured_on, decoding=options.decoding, num_beams=options.num_beams)
    for name, score in scores.items():
        print(f"{name:<8} {score:8.4f}")
    print(f"{len(captioned):,} images in {seconds:.1f} s, {len(captioned) / seconds:.1f} images/s")
    print(f"captions in {printable(captions_file, 300)}, scores in {printable(scores_file, 300)}")
    if options.update_card:
        print(f"results in {printable(options.model[0], 300)}/README.md")
    return exit_code


DESCRIPTION = """\
Caption every image of a split and score the captions.

  python scripts/evaluate_captions.py --model ./difnet --dataset coco_packed --output results
  python scripts/evaluate_captions.py --model seed1 seed2 seed3 --dataset coco_packed --output results/ensemble
  accelerate launch scripts/evaluate_captions.py ..   or   torchrun --nproc_per_node 8 scripts/evaluate_captions.py ..

Writes OUTPUT/captions_SPLIT_results.json, [{"image_id": 42, "caption": "a dog runs"}, ..] as for the COCO server, and
OUTPUT/scores_SPLIT.json: BLEU-1 to 4, ROUGE-L, CIDEr-D, how the captions were made, images a second. Both appear
complete or not at all. Scores of single images: python -m caption_metrics --per-image.

Several models are an ensemble: at each step the mean of their probabilities. They may differ in size and some may be
the baseline without segmentation; they need one vocabulary.

The scores of papers on COCO are those of the defaults on a converted checkpoint and the Karpathy test split, times
100. Every process captions its share and each image is captioned once. An image whose row is broken is named and left
out; scores_SPLIT.json says how many images the scores are of, and which were left out. Mistakes end the program with
one line and exit code 2."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate_captions.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what").add_argument
    add("--model", nargs="+", required=True, metavar="FOLDER", help="a checkpoint, or several for their ensemble")
    add("--dataset", type=Path, required=True, metavar="FOLDER", help="packed dataset (scripts/pack_coco.py)")
    add("--split", default="test", metavar="NAME", help="default: test")
    add("--output", type=Path, required=True, metavar="FOLDER", help="where the two files go")

    add = parser.add_argument_group("captions").add_argument
    add(
        "--decoding",
        choices=["original", "library"],
        default="original",
        help="the original's beam search (default), or generate's with the checkpoint's settings",
    )
    add("--num-beams", type=int, default=GENERATION_OPTIONS["num_beams"], metavar="N", help="default 5; 1 is greedy")
    add("--max-new-tokens", type=int, default=GENERATION_OPTIONS["max_new_tokens"], metavar="N", help="default 20")

    add = parser.add_argument_group("scores").add_argument
    add("--meteor", action="store_true", help="add METEOR 1.5 (needs Java)")
    add("--spice", action="store_true", help="add SPICE (needs Java; slow)")
    add("--update-card", action="store_true", help="put the scores into the README.md of the one --model")
    add("--dataset-name", metavar="NAME", help="what files and card call the data (default: the folder's name)")

    add = parser.add_argument_group("the machine").add_argument
    add("--batch-size", type=int, default=50, metavar="N", help="images of one process at a time (default 50)")
    add("--dtype", choices=list(DTYPES), default="float32", help="of weights and features (default float32)")
    add("--cpu", action="store_true", help="even where there is a GPU")
    add_strict_option(parser)
    add_debug_option(parser)
    options = parser.parse_args(argv)
    for name in ("num_beams", "max_new_tokens", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.update_card and len(options.model) > 1:
        parser.error("--update-card takes one --model: an ensemble has no card")
    options.dataset_name = options.dataset_name or options.dataset.resolve().name
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    def command() -> int:
        accelerator = Accelerator(cpu=options.cpu)
        exit_code = run(options, accelerator)
        end_training(accelerator)
        return exit_code

    return run_command("evaluate_captions.py", command, options.debug)
