"""Captions every image of a split with a model or an ensemble, and scores the captions.

Corresponds to `evaluate_metrics` in `train.py` of the original (mrwu-mac/DIFNet, CVPR 2022). What differs: several
processes share the images and every image is captioned exactly once, ensembles, and the captions are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from training_processes import all_or_none, end_training, raise_for_all
from training_start import (
    ROW_ERRORS,
    check_data,
    form_of,
    open_split,
    reason_of,
    usual_row,
)

from caption_metrics import JavaMissing, check_java, score_captions
from dataset_difnet import ReferenceBatches
from difnet_transformers.checkpoints import checkpoint_folder, load_model, load_processor
from difnet_transformers.command_line import LeftOut, add_debug_option, add_strict_option, describe, run_command
from difnet_transformers.files import atomic_write, folder_lock, naming, printable
from difnet_transformers.weights import check_finite_weights
from model_card import update_results
from modeling_difnet import DifnetEnsemble, DifnetForConditionalGeneration, original_beam_search
from modeling_difnet.ensemble_difnet import raise_for_other_vocabularies
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GENERATION_OPTIONS = {"num_beams": 5, "max_new_tokens": 20}  # the original's evaluation


class CaptionedImage(NamedTuple):
    """An image of a split, the caption that a model gave it and those that people wrote."""

    image_id: int
    caption: str
    references: list[str]


def caption_split(
    model: DifnetForConditionalGeneration | DifnetEnsemble,
    tokenizer: DifnetTokenizer,
    dataset: Dataset,
    accelerator: Accelerator,
    *,
    batch_size: int = 50,
    mask_padded_cells: bool = True,
    original_decoding: bool = True,
    generation_options: Mapping[str, Any] = GENERATION_OPTIONS,
    description: str = "captioning",
    left_out: LeftOut | None = None,
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
        left_out: gets the images that cannot be read, which then have no entry; without it they are an error.

    Returns:
        One entry an image, in the order of the dataset. A caption is the decoded words joined by blanks, immediately
        repeated words collapsed, as the original scores them.

    Raises:
        ValueError: an image of any process cannot be read, and there is no `left_out`. Every process ends.
    """
    batches = ReferenceBatches(
        dataset,
        batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        mask_padded_cells=mask_padded_cells,
    )
    custom_generate = {"custom_generate": original_beam_search} if original_decoding else {}
    processor = DifnetProcessor(DifnetFeatureExtractor(), tokenizer)
    captions: list[tuple[int, str]] = []  # the row of the dataset, and its caption
    broken: list[tuple[int, str]] = []  # the row of the dataset, and what is wrong with it
    problem: Exception | None = None
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(dataset), unit=" images", desc=description, disable=not accelerator.is_main_process)
    # An error waits until the other processes are done: they would wait for this one for ever.
    try:
        usual = form_of(usual_row(batches.images))
        for number in range(len(batches)):
            first_row = (number * accelerator.num_processes + accelerator.process_index) * batch_size
            rows = np.arange(first_row, min(first_row + batch_size, len(dataset)))
            batch, rows, reasons = readable_batch(batches, rows, usual)
            broken += reasons
            if broken and left_out is None:
                break
            if batch is not None:
                del batch["image_ids"], batch["references"]
                features = {
                    name: tensor.to(accelerator.device, model.dtype if tensor.is_floating_point() else None)
                    for name, tensor in batch.items()
                }
                with accelerator.autocast():
                    sequences = model.generate(**features, **generation_options, **custom_generate)
                captions += zip(rows.tolist(), processor.post_process_captions(sequences), strict=True)
            # The other processes are about as far.
            bar.update(min((len(rows) + len(reasons)) * accelerator.num_processes, bar.total - bar.n))
    except Exception as error:
        problem = error
    bar.close()
    model.train(was_training)
    raise_for_all(accelerator, problem)

    captions, broken = gather_object(captions), sorted(gather_object(broken))
    image_ids = dataset.select_columns(["image_id"]).with_format(None)
    for row, reason in broken:
        name = f"image {image_ids[row]['image_id']}"
        if left_out is None:
            raise_for_all(accelerator, ValueError(reason if reason.startswith(f"{name}:") else f"{name}: {reason}"))
        elif accelerator.is_main_process:
            left_out.add(name, reason)
    caption_of = dict(captions)
    assert len(captions) == len(caption_of) == len(dataset) - len(broken), (
        "an image was captioned twice, or not at all"
    )
    rows = dataset.select_columns(["image_id", "captions"]).with_format(None)
    return [
        CaptionedImage(row["image_id"], caption_of[position], row["captions"])
        for position, row in enumerate(rows)
        if position in caption_of
    ]


def readable_batch(
    batches: ReferenceBatches, rows: np.ndarray, usual: dict[str, Any]
) -> tuple[dict[str, Any] | None, np.ndarray, list[tuple[int, str]]]:
    """The batch of those of some rows that can be read.

    Args:
        batches: what makes the batch.
        rows: of the dataset.
        usual: shapes and types of the split's features (`form_of`).

    Returns:
        The batch, or `None` if no row can be read; its rows; and the others, each with what is wrong with it.
    """
    try:
        batch = batches.make_batch(rows)
        if what_is_wrong(batch, usual) is None:
            return batch, rows, []
    except ROW_ERRORS:
        pass  # looked at one by one below
    reasons = []
    for row in rows:
        try:
            reason = what_is_wrong(batches.make_batch(np.array([row])), usual)
        except ROW_ERRORS as error:
            reason = describe(error)
        if reason is not None:
            reasons.append((int(row), reason))
    rows = np.setdiff1d(rows, [row for row, _ in reasons])
    return (batches.make_batch(rows) if len(rows) else None), rows, reasons


def what_is_wrong(batch: dict[str, Any], usual: dict[str, Any]) -> str | None:
    """Why images of a batch cannot be captioned and scored."""
    for name, form in form_of(batch).items():
        if form != usual.get(name):
            (shape, dtype), expected = form, usual.get(name)
            return f"{name} has the shape {shape} and type {dtype}, where the split has {expected}; pack again"
        if not torch.isfinite(batch[name]).all():
            return f"{name} holds NaN or infinity; pack again from features that are numbers"
    if not all(references and all(references) for references in batch["references"]):
        return "it has no caption, or an empty one, to compare with; pack again"
    return None


def score_split(captioned: Sequence[CaptionedImage], with_meteor: bool = False, with_spice: bool = False) -> dict:
    """Scores by the names of `caption_metrics.score_captions`, over all images."""
    return score_captions(
        [image.caption for image in captioned],
        [image.references for image in captioned],
        with_meteor=with_meteor,
        with_spice=with_spice,
    )


# The program


def load_captioner(
    names: Sequence[str], dtype: torch.dtype
) -> tuple[DifnetForConditionalGeneration | DifnetEnsemble, DifnetProcessor]:
    """The model, or the ensemble of several, in eval mode, and the processor of the first."""
    for name in names:
        checkpoint_folder(name)
    try:
        raise_for_other_vocabularies(names)
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
    check_data(model.config, dataset, options)
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


if __name__ == "__main__":
    sys.exit(main())
