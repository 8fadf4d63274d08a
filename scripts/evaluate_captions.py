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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoProcessor
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from training_start import check_data, load_model

from caption_metrics import JavaMissing, check_java, score_captions
from convert_checkpoint import written_at_once
from dataset_difnet import ReferenceBatches, load_packed_split
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

    Returns:
        One entry an image, in the order of the dataset. A caption is the decoded words joined by blanks, immediately
        repeated words collapsed, as the original scores them.
    """
    batches = ReferenceBatches(
        dataset,
        batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        dtype=model.dtype,
        mask_padded_cells=mask_padded_cells,
    )
    custom_generate = {"custom_generate": original_beam_search} if original_decoding else {}
    processor = DifnetProcessor(DifnetFeatureExtractor(), tokenizer)
    captions: list[tuple[int, str]] = []  # the row of the dataset, and its caption
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(dataset), unit=" images", desc=description, disable=not accelerator.is_main_process)
    for number, batch in enumerate(batches):
        image_ids = batch.pop("image_ids")
        del batch["references"]
        features = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        with accelerator.autocast():
            sequences = model.generate(**features, **generation_options, **custom_generate)
        first_row = (number * accelerator.num_processes + accelerator.process_index) * batch_size
        captions += enumerate(processor.post_process_captions(sequences), start=first_row)
        # The other processes are about as far.
        bar.update(min(len(image_ids) * accelerator.num_processes, bar.total - bar.n))
    bar.close()
    model.train(was_training)

    captions = gather_object(captions)
    caption_of = dict(captions)
    assert len(captions) == len(caption_of) == len(dataset), "an image was captioned twice, or not at all"
    rows = dataset.select_columns(["image_id", "captions"]).with_format(None)
    return [
        CaptionedImage(row["image_id"], caption_of[position], row["captions"]) for position, row in enumerate(rows)
    ]


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
        if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith(("/", "."))):
            raise ValueError(f"{name}: no such folder, and no name of a repository on the Hub")
    raise_for_other_vocabularies(names)
    processor = AutoProcessor.from_pretrained(names[0])
    models = [load_model(name).to(dtype) for name in names]
    for name, model in zip(names, models, strict=True):
        if len(processor.tokenizer) != model.config.vocab_size:
            raise ValueError(
                f"{name}: vocab.json has {len(processor.tokenizer):,} tokens and the model "
                f"{model.config.vocab_size:,}; take both from one checkpoint"
            )
    return (models[0] if len(models) == 1 else DifnetEnsemble(models)).eval(), processor


def write_json(path: Path, content: Any) -> None:
    with written_at_once(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run(options: argparse.Namespace, accelerator: Accelerator) -> None:
    """Everything that can be wrong is looked at before the first caption is made."""
    check_java(options.meteor, options.spice)
    if options.update_card and not (Path(options.model[0]) / "README.md").is_file():
        raise ValueError(f"--update-card: {options.model[0]} is no folder with a README.md, the model card")
    dataset = load_packed_split(options.dataset, options.split)
    model, processor = load_captioner(options.model, DTYPES[options.dtype])
    check_data(model.config, dataset, options)
    generation = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}

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
    )
    seconds = time.perf_counter() - start
    if not accelerator.is_main_process:
        return

    captions_file = options.output / f"captions_{options.split}_results.json"
    write_json(captions_file, [{"image_id": image.image_id, "caption": image.caption} for image in captioned])
    scores = score_split(captioned, options.meteor, options.spice)
    report = {
        "model": options.model,
        "dataset": options.dataset_name,
        "split": options.split,
        "images": len(captioned),
        "decoding": options.decoding,
        **generation,
        "dtype": options.dtype,
        "scores": scores,
        "seconds": round(seconds, 3),
        "images_per_second": round(len(captioned) / seconds, 2),
        "batch_size": options.batch_size,
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
    }
    scores_file = options.output / f"scores_{options.split}.json"
    write_json(scores_file, report)
    if options.update_card:
        measured_on = {"dataset": options.dataset_name, "split": options.split}
        update_results(options.model[0], scores, **measured_on, decoding=options.decoding, num_beams=options.num_beams)
    for name, score in scores.items():
        print(f"{name:<8} {score:8.4f}")
    print(f"{len(captioned):,} images in {seconds:.1f} s, {len(captioned) / seconds:.1f} images/s")
    print(f"captions in {captions_file}, scores in {scores_file}")
    if options.update_card:
        print(f"results in {options.model[0]}/README.md")


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
100. Every process captions its share and each image is captioned once. Mistakes end the program with one line and exit
code 2."""


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
    accelerator = Accelerator(cpu=options.cpu)
    exit_code = 0
    try:
        run(options, accelerator)
        accelerator.wait_for_everyone()  # for the scores, so that no process goes before its time
    except (ValueError, OSError, ImportError, JavaMissing) as error:
        if accelerator.is_main_process:
            print(f"evaluate_captions.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        exit_code = 2
    except KeyboardInterrupt:
        return 130
    accelerator.end_training()
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
