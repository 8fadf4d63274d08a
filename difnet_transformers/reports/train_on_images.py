"""From pictures with captions to a captioner of one's own: the other programs of this folder, one after another.

The original (mrwu-mac/DIFNet, CVPR 2022) starts from feature files that others made. Nothing happens here that the
printed commands do not do; this program knows their order and their defaults for a few hundred pictures.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import shlex
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from processing_difnet import DifnetTokenizer

from ..child_process import run_child
from ..command_line import LeftOut, add_debug_option, add_strict_option, run_command
from ..data.packed_dataset import load_packed_split
from ..data.sources import find_pictures, match_images, read_annotations
from ..files import (
    atomic_output,
    atomic_write,
    check_regular_file,
    folder_lock,
    naming,
    printable,
    read_file,
    read_json,
)
from ..model_card import METRICS, add_license_option
from ..vision.images import thumbnail

MODULES = {
    "extract_features.py": "extract",
    "pack_coco.py": "pack",
    "train.py": "train",
    "evaluate_captions.py": "evaluate",
    "caption.py": "caption",
}
SPLITS = ("train", "validation", "test")

# The paper's sizes are for 113,000 pictures; with a few hundred these learn as much, in minutes on a CPU.
SMALL_CONFIG = {
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "head_dim": 32,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
}
SMALL_TRAINING = {
    "--xe-batches": "images",
    "--xe-batch-size": 4,
    "--xe-schedule": "constant",
    "--xe-learning-rate": 1e-3,
    "--xe-epochs": 40,
    "--xe-patience": 10,
    "--scst-epochs": 30,
    "--scst-patience": 10,
    "--scst-learning-rate": 2e-4,
    "--log-every": 20,
}


class StepFailed(ValueError):
    """A program of the sequence ended with an error, which it has explained itself."""

    def __init__(self, name: str, exit_code: int):
        super().__init__(f"{name} ended with exit code {exit_code}; the same command goes on from here")


# The steps


def call(program: str, *arguments: object) -> None:
    """Runs a program of this folder, its command printed first; it ends with this one.

    Raises:
        StepFailed: it ended with an error.
        KeyboardInterrupt: it, or this program, was asked to stop.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n$ python scripts/{program} {printable(shlex.join(words), 4000)}", flush=True)
    exit_code = run_child(["-m", f"difnet_transformers.cli.{MODULES[program]}", *words])
    if exit_code in (130, 143, -signal.SIGTERM, -signal.SIGINT):
        raise KeyboardInterrupt
    if exit_code != 0:
        raise StepFailed(program, exit_code)


def copy_annotations(options: argparse.Namespace) -> Path:
    """The caption files under the names that say their splits.

    Raises:
        ValueError: one of them holds no captions; the text names it.
    """
    folder = options.output / "annotations"
    sources = {}
    for split, source in zip(SPLITS, options.captions, strict=False):
        if not source.exists():
            raise ValueError(f"{printable(source, 300)}: no such file; --captions takes COCO caption files")
        check_regular_file(source)
        sources[folder / f"captions_{split}.json"] = source
        atomic_write(folder / f"captions_{split}.json", read_file(source))
    try:
        read_annotations(str(folder))
    except ValueError as error:
        text = str(error)
        for copy, source in sources.items():
            text = text.replace(printable(copy), printable(source, 300))
        raise ValueError(text) from error
    return folder


def feature_networks(options: argparse.Namespace) -> list[object]:
    """Arguments that say where features come from."""
    words: list[object] = ["--untrained", "--seed", options.seed] if options.untrained else []
    words += ["--grid-backbone", options.grid_backbone] if options.grid_backbone else []
    words += ["--segmentation-model", options.segmentation_model] if options.segmentation_model else []
    words += ["--instance-annotations", *options.instances] if options.instances else []
    words += ["--panoptic-annotations", *options.panoptic] if options.panoptic else []
    return words


def annotated_segmentation(options: argparse.Namespace) -> bool:
    """Whether there is a real source of segmentation features."""
    return any((options.segmentation_model, options.instances, options.panoptic))


def make_features(options: argparse.Namespace, annotations: Path) -> None:
    captions = sorted(annotations.glob("*.json"))
    device = ["--device", "cpu"] if options.cpu else []
    where = ["--output", options.output / "features", *device]
    words = [*options.pictures, *feature_networks(options), "--coco-json", *captions, *where]
    call("extract_features.py", *words)


def segmentation_of(options: argparse.Namespace) -> list[object]:
    folder = options.output / "features" / "segmentations"
    return ["--segmentation", folder] if folder.is_dir() else []


def most_are_there(options: argparse.Namespace, annotations: Path) -> bool:
    """Whether at least half of every split has features: single broken pictures, not the wrong folder."""
    read = read_annotations(str(annotations))
    made = {image["id"] for image in read_json(options.output / "features" / "manifest.json")["images"]}
    kept = {split: sum(row.image_id in made for row in rows) for split, rows in read.splits.items()}
    return all(2 * kept[split] >= len(rows) for split, rows in read.splits.items())


def pack(options: argparse.Namespace, annotations: Path) -> None:
    grids = options.output / "features" / "grid_features.hdf5"
    words = ["--features", grids, *segmentation_of(options), "--annotations", annotations]
    words += ["--skip-missing"] if options.skip_missing or most_are_there(options, annotations) else []
    call("pack_coco.py", *words, "--output", options.output / "packed")


def what_was_left_out(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Images without a caption in the end, each with the reason: of the extraction, else of the packing."""
    manifest = read_json(options.output / "features" / "manifest.json")
    provenance = read_json(options.output / "packed" / "provenance.json")
    reasons: dict[object, tuple[str, str]] = {}
    for problem in manifest["problems"]:
        if problem["kind"] == "left out":
            image_id = problem["image_id"]
            name = "picture" if image_id == "" else f"image {image_id}"  # a file that no image id belongs to
            reasons[image_id if image_id != "" else problem["what"]] = (name, problem["what"])
    for problem in provenance["left_out"]:
        name, what = f"image {problem['image_id']}", f"{problem['source']}: {problem['what']}"
        reasons.setdefault(problem["image_id"], (name, what))
    return list(reasons.values())


def make_vocabulary(options: argparse.Namespace, annotations: Path) -> Path:
    """The words of the training and validation captions; those without a letter or a digit are left out.

    No metric sees a word such as "..", so that self-critical training would append it to captions at will.
    """
    splits = read_annotations(str(annotations)).splits
    captions = [caption for split in SPLITS[:2] for row in splits.get(split, ()) for caption in row.captions]
    tokens = DifnetTokenizer.from_captions(captions, options.min_word_count).get_vocab()
    path = options.output / "vocab.json"
    words = [token for token in tokens if any(map(str.isalnum, token))]
    atomic_write(path, json.dumps(words, ensure_ascii=False, indent=0))
    return path


def train(options: argparse.Namespace, annotations: Path) -> None:
    run, config = options.output / "training", options.output / "config.json"
    atomic_write(config, json.dumps(SMALL_CONFIG, indent=1) + "\n")
    words: list[object] = ["--dataset", options.output / "packed", "--output", run, "--config", config]
    words += ["--vocab", make_vocabulary(options, annotations)]
    words += [word for option in SMALL_TRAINING.items() for word in option]
    words += ["--validation-split", options.choose_by, "--seed", options.seed]
    words += ["--license", options.license] if options.license else []
    words += ["--report-to", "none"] + (["--cpu"] if options.cpu else []) + options.training
    if any((run / name).exists() for name in ("last", "last.previous")):
        words += ["--resume", "last"]
    call("train.py", *words)


def copy_model(options: argparse.Namespace) -> Path:
    """The best checkpoint without the state of its training."""
    model = options.output / "model"
    with atomic_output(model, overwrite=True) as unfinished:
        best = options.output / "training" / "best"
        shutil.copytree(best, unfinished, ignore=shutil.ignore_patterns("training_state"))
    return model


def evaluate_splits(options: argparse.Namespace, model: Path) -> dict[str, dict[str, Any]]:
    """Scores of every split. The card gets those of pictures that the training has not seen."""
    reports = {}
    for split in SPLITS[: len(options.captions)]:
        words = ["--model", model, "--dataset", options.output / "packed", "--dataset-name", options.name]
        words += ["--split", split, "--output", options.output / "results"]
        words += (["--cpu"] if options.cpu else []) + (["--update-card"] if split != "train" else [])
        call("evaluate_captions.py", *words)
        reports[split] = read_json(options.output / "results" / f"scores_{split}.json")
    return reports


def caption_all(options: argparse.Namespace, model: Path) -> dict[int, str]:
    """A caption of every picture that has features, by image id."""
    results = options.output / "captions.json"
    features = ["--features", options.output / "features" / "grid_features.hdf5", *segmentation_of(options)]
    words = [*features, "--model", model, "--original-beam-search", "--json", results]
    words += ["--device", "cpu"] if options.cpu else []
    call("caption.py", *words)
    return {entry["image_id"]: entry["caption"] for entry in read_json(results)}


# The sheet

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>
  body {{ font: 16px/1.4 system-ui, sans-serif; margin: 24px; background: #f6f6f4; color: #1c1c1c }}
  section {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 20px }}
  figure {{ margin: 0; background: #fff; border: 1px solid #ddd; border-radius: 6px; overflow: hidden }}
  img {{ display: block; width: 100%; height: 220px; object-fit: contain; background: #ececea }}
  figcaption {{ padding: 10px 12px; overflow-wrap: anywhere }}
  figcaption p {{ margin: 0 0 6px; font-weight: 600 }}
  details {{ color: #555; font-size: 14px }}
  table {{ border-collapse: collapse; background: #fff }}
  td, th {{ border: 1px solid #ddd; padding: 4px 12px; text-align: right }}
  .warning {{ background: #fff3cd; border: 1px solid #d9b84a; border-radius: 6px; padding: 10px 14px }}
</style>
<h1>{name}</h1>
{warnings}
<table>{table}</table>
{sections}
</html>
"""
HEADINGS = {
    "train": "Pictures that the model has learnt from",
    "validation": "Held-out pictures",
    "test": "Held-out pictures: test",
}


def write_sheet(
    options: argparse.Namespace, captions: dict[int, str], reports: dict[str, dict[str, Any]], path: Path
) -> None:
    """One page: the scores, and every picture with its caption and those that people wrote."""
    pictures = find_pictures(options.pictures)
    warnings = []
    if options.untrained:
        features = "Grid features" if annotated_segmentation(options) else "Grid and segmentation features"
        warnings.append(
            f"{features} come from an untrained, random network: they tell pictures apart, not their content."
        )
    if options.choose_by == "train":
        warnings.append("The checkpoint was chosen by its scores on the pictures that it learnt from.")
    rows = ["<tr><th>split</th><th>images</th>"]
    rows[0] += "".join(f"<th>{title}</th>" for _, title in METRICS.values() if title not in ("METEOR", "SPICE"))
    sections = []
    for split, report in reports.items():
        cells = [split, f"{report['images']:,}", *(f"{score:.3f}" for score in report["scores"].values())]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells))
        figures = []
        packed = load_packed_split(options.output / "packed", split)
        file_names = dict(zip(packed["image_id"], packed["file_name"], strict=True))
        picture_of = match_images(pictures, file_names).paths
        for row in packed.select_columns(["image_id", "captions"]):
            if row["image_id"] not in captions or row["image_id"] not in picture_of:
                continue  # moved away since, or left out by caption.py, which named it
            buffer = io.BytesIO()
            thumbnail(picture_of[row["image_id"]]).save(buffer, "JPEG", quality=85)
            data = base64.b64encode(buffer.getvalue()).decode()
            references = "".join(f"<br>{html.escape(reference)}" for reference in row["captions"])
            figures.append(
                f'<figure><img loading="lazy" src="data:image/jpeg;base64,{data}" alt="{row["image_id"]}">'
                f"<figcaption><p>{html.escape(captions[row['image_id']])}</p>"
                f"<details><summary>what people wrote</summary>{references}</details></figcaption></figure>"
            )
        sections.append(f"<h2>{HEADINGS[split]}</h2>\n<section>\n" + "\n".join(figures) + "\n</section>")
    page = PAGE.format(
        name=html.escape(options.name),
        warnings="\n".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in warnings),
        table="\n".join(rows),
        sections="\n".join(sections),
    )
    atomic_write(path, page)


# The command

DESCRIPTION = """\
Train a captioner on a folder of pictures with captions, from the JPEG files to a sheet of captions.

  python scripts/train_on_pictures.py --pictures pictures/ --captions captions_train.json captions_val.json \\
      --instances instances_train.json instances_val.json --grid-backbone x101 --output mine

Captions are COCO's files: {"images": [{"id", "file_name"}, ..], "annotations": [{"id", "image_id", "caption"}, ..]}.
The steps, each a program of its own, whose command is printed:
  extract_features.py  OUTPUT/features   grid and segmentation features of every picture
  pack_coco.py         OUTPUT/packed     features and captions as one dataset
  train.py             OUTPUT/training   cross-entropy, then self-critical training
                       OUTPUT/model      the best checkpoint, for from_pretrained
  evaluate_captions.py OUTPUT/results    captions and scores of every split
  caption.py           OUTPUT/captions.json and captions.html, the sheet with all pictures

It can be killed at any time: the same command goes on where it was, and one at a time works in OUTPUT. Pictures that
are broken are left out and named, again at the end; with --strict the exit code is 2 then. Network and recipe are for
a few hundred pictures on a CPU; options of train.py after two dashes replace them, for example by a configuration of
your own:

  python scripts/train_on_pictures.py .. --output mine -- --config larger.json --xe-learning-rate 5e-4"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_on_pictures.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what").add_argument
    add("--pictures", nargs="+", required=True, metavar="FOLDER", help="pictures, or folders of them")
    add("--captions", nargs="+", required=True, type=Path, metavar="JSON", help="training, validation[, test]")
    add("--output", type=Path, required=True, metavar="FOLDER", help="where everything goes")
    add("--name", metavar="NAME", help="what card and sheet call the data (default: the folder's name)")
    add(
        "--skip-missing",
        action="store_true",
        help="do without pictures that are missing or cannot be read even where that is more than half of a split",
    )

    add = parser.add_argument_group("features; without segmentation the paper's baseline is trained").add_argument
    add("--grid-backbone", metavar="FOLDER", help="made by `convert_checkpoint.py grid-backbone` of X-101.pth")
    add("--untrained", action="store_true", help="a small random network instead: its features can be told apart only")
    add("--segmentation-model", metavar="NAME", help="a COCO panoptic model of Transformers")
    add("--instances", nargs="+", type=Path, metavar="JSON", help="COCO's instances_*.json of the pictures")
    add("--panoptic", nargs="+", type=Path, metavar="JSON", help="COCO's panoptic_*.json of the pictures")

    add = parser.add_argument_group("training").add_argument
    add(
        "--choose-by",
        choices=["validation", "train"],
        default="validation",
        help="split whose CIDEr-D says which checkpoint is best (default: validation); train shows whether all works: "
        "the pictures are learnt by heart",
    )
    add(
        "--min-word-count",
        type=int,
        default=1,
        metavar="N",
        help="how often the captions must have a word (default 1)",
    )
    add_license_option(parser)
    add("--seed", type=int, default=0, metavar="N", help="default: 0")
    add("--cpu", action="store_true", help="even where there is a GPU")
    add_strict_option(parser)
    add_debug_option(parser)
    add("training", nargs="*", metavar="-- OPTION", help="options of train.py")
    options = parser.parse_args(argv)
    if not 2 <= len(options.captions) <= 3:
        parser.error("--captions takes the files of two or three splits: training, validation and perhaps test")
    if (options.grid_backbone is None) != options.untrained:
        parser.error("give --grid-backbone FOLDER, or --untrained for a check without weights")
    if sum(source is not None for source in (options.segmentation_model, options.instances, options.panoptic)) > 1:
        parser.error("give one of --segmentation-model, --instances and --panoptic")
    options.name = options.name or options.output.resolve().name
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    return run_command(
        "train_on_pictures.py", lambda: run(options), options.debug, "the same command goes on from here"
    )


def run(options: argparse.Namespace) -> int:
    """All steps, in the locked folder; returns the exit code."""
    with naming(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
    with folder_lock(options.output, "train_on_pictures.py"):
        annotations = copy_annotations(options)
        make_features(options, annotations)
        pack(options, annotations)
        train(options, annotations)
        model = copy_model(options)
        reports = evaluate_splits(options, model)
        captions = caption_all(options, model)
        sheet = options.output / "captions.html"
        write_sheet(options, captions, reports, sheet)
        print()
        for split, report in reports.items():
            print(f"{split}: {report['images']:,} images, CIDEr-D {report['scores']['cider_d']:.4f}")
        print(
            f"model in {printable(model, 300)}, captions in {printable(options.output / 'captions.json', 300)}, all "
            f"pictures in {printable(sheet, 300)}"
        )
        left_out = LeftOut("picture")
        for name, reason in what_was_left_out(options):
            left_out.add(name, reason)
        return left_out.report(sum(report["images"] for report in reports.values()), options.strict)
