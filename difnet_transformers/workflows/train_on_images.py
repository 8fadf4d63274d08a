"""From images with captions to a captioner of one's own: other `difnet` commands, one after another.

The original (mrwu-mac/DIFNet, CVPR 2022) starts from feature files that others made. Nothing happens here that the
printed commands do not do; this module knows their order and their settings for a few hundred images.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processing_difnet import DifnetTokenizer

from ..child_process import run_difnet
from ..command_line import LeftOut
from ..data.captions import read_annotations
from ..data.feature_files import GridFiles
from ..data.image_files import find_images, match_images
from ..data.packed_dataset import load_packed_split
from ..files import atomic_output, atomic_write, check_regular_file, printable, read_file, read_json
from ..model_card import METRICS, check_license
from ..options import option_name
from ..presets import SMALL_NETWORK
from ..reports.pages import SheetImage, Table, html_sheet

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")

# For a few hundred images and the small network, in minutes on a CPU.
TRAINING = {
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


@dataclass(frozen=True)
class FeatureSources:
    """Where the features come from. Of the three sources of segmentation at most one is given.

    Args:
        grid_backbone: as `difnet extract` takes it; `None` for a small random network.
        segmentation_model: a COCO panoptic model of Transformers.
        instances: COCO's instances_*.json of the images.
        panoptic: COCO's panoptic_*.json of the images.
        seed: of the random network.
        backbone_options: further options of `difnet extract` that have a value, by the names of their fields.
    """

    grid_backbone: str | None = None
    segmentation_model: str | None = None
    instances: Sequence[Path] = ()
    panoptic: Sequence[Path] = ()
    seed: int = 0
    backbone_options: Mapping[str, object] = field(default_factory=dict)

    @property
    def has_segmentation(self) -> bool:
        """Whether there is a real source of segmentation features."""
        return bool(self.segmentation_model or self.instances or self.panoptic)

    def arguments(self) -> list[object]:
        """The options of `difnet extract`."""
        words: list[object] = ["--untrained", "--seed", self.seed] if self.grid_backbone is None else []
        words += ["--grid-backbone", self.grid_backbone] if self.grid_backbone is not None else []
        for name, value in self.backbone_options.items():
            words += [option_name(name), value] if value is not None else []
        words += ["--segmentation-model", self.segmentation_model] if self.segmentation_model else []
        words += ["--instance-annotations", *self.instances] if self.instances else []
        words += ["--panoptic-annotations", *self.panoptic] if self.panoptic else []
        return words


def train_on_images(
    images: Sequence[Path],
    captions: Sequence[Path],
    output: Path,
    sources: FeatureSources,
    *,
    name: str | None = None,
    skip_missing: bool = False,
    choose_by: str = "validation",
    min_word_count: int = 1,
    license: str | None = None,
    seed: int = 0,
    cpu: bool = False,
    training_options: Sequence[str] = (),
    strict: bool = False,
) -> int:
    """All steps from images to a captioner, its scores and a page. A step that was done before is resumed or skipped.

    Args:
        images: image files, or folders of them.
        captions: COCO caption files of the training, the validation and perhaps the test split.
        output: folder of everything.
        sources: where the features come from.
        name: what card and page call the data (default: the name of `output`).
        skip_missing: whether images without features are left out even where they are more than half of a split.
        choose_by: split whose CIDEr-D says which checkpoint is best, "validation" or "train".
        min_word_count: how often the captions must have a word.
        license: of the weights, for the card.
        seed: of the training.
        cpu: whether to use the CPU even where there is a GPU.
        training_options: further options of `difnet train`, which replace those given here.
        strict: whether the exit code is 2 where an image was left out.

    Returns:
        The exit code.

    Raises:
        ValueError: an input is wrong, or a step failed; the text says which.
        KeyboardInterrupt: a step was asked to stop.
    """
    check_license(license)
    name = name or output.resolve().name
    annotations = copy_annotations(captions, output / "annotations")
    extract_features(images, annotations, output, sources, cpu)
    pack(annotations, output, skip_missing)
    vocabulary = make_vocabulary(annotations, output / "vocab.json", min_word_count)
    options: list[object] = ["--validation-split", choose_by, "--seed", seed]
    options += ["--license", license] if license else []
    options += ["--report-to", "none", *(["--cpu"] if cpu else []), *training_options]
    train(vocabulary, output, options)
    model = copy_best_checkpoint(output)
    reports = evaluate(model, output, SPLITS[: len(captions)], name, images, cpu)
    results = caption_all(model, output, cpu)
    page = output / "captions.html"
    warnings = []
    if sources.grid_backbone is None:
        features = "Grid features" if sources.has_segmentation else "Grid and segmentation features"
        warnings.append(
            f"{features} come from an untrained, random network: they tell images apart, not their content."
        )
    if choose_by == "train":
        warnings.append("The checkpoint was chosen by its scores on the images that it learnt from.")
    write_page(page, name, warnings, images, output / "packed", results, reports)
    print()
    for split, report in reports.items():
        print(f"{split}: {report['images']:,} images, CIDEr-D {report['scores']['cider_d']:.4f}")
    print(
        f"model in {printable(model, 300)}, captions in {printable(output / 'captions.json', 300)}, all images in "
        f"{printable(page, 300)}"
    )
    left_out = LeftOut("image")
    for image, reason in left_out_images(output):
        left_out.add(image, reason)
    return left_out.report(sum(report["images"] for report in reports.values()), strict)


# The steps


def copy_annotations(captions: Sequence[Path], folder: Path) -> Path:
    """Copies the caption files to names that say their splits; returns `folder`.

    Raises:
        ValueError: one of them holds no captions; the text names it.
    """
    sources = {}
    for split, source in zip(SPLITS, captions, strict=False):
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


def extract_features(
    images: Sequence[Path], annotations: Path, output: Path, sources: FeatureSources, cpu: bool
) -> None:
    """Features of all images, in `output`/features."""
    words: list[object] = [*images, *sources.arguments(), "--coco-json", *sorted(annotations.glob("*.json"))]
    words += ["--output", output / "features", *(["--device", "cpu"] if cpu else [])]
    run_difnet("extract", words)


def pack(annotations: Path, output: Path, skip_missing: bool) -> None:
    """Features and captions as one dataset, in `output`/packed."""
    words: list[object] = [*_feature_arguments(output), "--annotations", annotations]
    cells, channels = _grid_shape(output)
    words += ["--grid-size", math.isqrt(cells)] if cells != 49 else []
    words += ["--grid-feature-size", channels] if channels != 2048 else []
    words += ["--skip-missing"] if skip_missing or most_have_features(annotations, output) else []
    run_difnet("pack", [*words, "--output", output / "packed"])


def _feature_arguments(output: Path) -> list[object]:
    """The options of `difnet pack` and `difnet caption` that name the features."""
    segmentations = output / "features" / "segmentations"
    grids = ["--features", output / "features" / "grid_features.hdf5"]
    return [*grids, *(["--segmentation", segmentations] if segmentations.is_dir() else [])]


def _grid_shape(output: Path) -> tuple[int, int]:
    """Cells of an image's grid, and the channels of a cell."""
    files = GridFiles((str(output / "features" / "grid_features.hdf5"),))
    image_id, path = next(iter(files.index().items()))
    cells, channels = files.read(path, image_id).shape
    return cells, channels


def most_have_features(annotations: Path, output: Path) -> bool:
    """Whether at least half of every split has features: a few broken images, not the wrong folder."""
    splits = read_annotations(str(annotations)).splits
    extracted = {image["id"] for image in read_json(output / "features" / "manifest.json")["images"]}
    return all(2 * sum(row.image_id in extracted for row in rows) >= len(rows) for rows in splits.values())


def make_vocabulary(annotations: Path, path: Path, min_word_count: int) -> Path:
    """Writes the words of the training and validation captions; those without a letter or a digit are left out.

    No metric sees a word such as "..", so that self-critical training would append it to captions at will.
    """
    splits = read_annotations(str(annotations)).splits
    captions = [caption for split in SPLITS[:2] for row in splits.get(split, ()) for caption in row.captions]
    tokens = DifnetTokenizer.from_captions(captions, min_word_count).get_vocab()
    words = [token for token in tokens if any(map(str.isalnum, token))]
    atomic_write(path, json.dumps(words, ensure_ascii=False, indent=0))
    return path


def train(vocabulary: Path, output: Path, options: Sequence[object]) -> None:
    """Cross-entropy and self-critical training in `output`/training, resumed where it was stopped."""
    run, config = output / "training", output / "config.json"
    atomic_write(config, json.dumps(SMALL_NETWORK, indent=1) + "\n")
    words: list[object] = ["--dataset", output / "packed", "--output", run, "--config", config, "--vocab", vocabulary]
    words += [word for option in TRAINING.items() for word in option]
    words += options
    if any((run / name).exists() for name in ("last", "last.previous")):
        words += ["--resume", "last"]
    run_difnet("train", words)


def copy_best_checkpoint(output: Path) -> Path:
    """The best checkpoint without the state of its training, in `output`/model."""
    model = output / "model"
    with atomic_output(model, overwrite=True) as unfinished:
        best = output / "training" / "best"
        shutil.copytree(best, unfinished, ignore=shutil.ignore_patterns("training_state"))
    return model


def evaluate(
    model: Path, output: Path, splits: Sequence[str], name: str, images: Sequence[Path], cpu: bool
) -> dict[str, dict[str, Any]]:
    """The score reports of the splits. Those that training has not seen get into the card, and a page of examples."""
    reports = {}
    for split in splits:
        words: list[object] = ["--model", model, "--dataset", output / "packed", "--dataset-name", name]
        words += ["--split", split, "--output", output / "results"]
        words += ["--cpu"] if cpu else []
        if split != "train":
            page = output / "results" / f"examples_{split}.html"
            words += ["--update-card", "--page", page, "--images", *images]
        run_difnet("evaluate", words)
        reports[split] = read_json(output / "results" / f"scores_{split}.json")
    return reports


def caption_all(model: Path, output: Path, cpu: bool) -> dict[int, str]:
    """A caption of every image that has features, by image id."""
    results = output / "captions.json"
    words = [*_feature_arguments(output), "--model", model, "--original-beam-search", "--json", results]
    run_difnet("caption", [*words, *(["--device", "cpu"] if cpu else [])])
    return {entry["image_id"]: entry["caption"] for entry in read_json(results)}


def left_out_images(output: Path) -> list[tuple[str, str]]:
    """Images without a caption in the end, each with the reason: that of the extraction, or else of the packing."""
    manifest = read_json(output / "features" / "manifest.json")
    provenance = read_json(output / "packed" / "provenance.json")
    reasons: dict[object, tuple[str, str]] = {}
    for problem in manifest["problems"]:
        if problem["kind"] == "left out":
            image_id = problem["image_id"]
            name = "image file" if image_id == "" else f"image {image_id}"  # a file that no image id belongs to
            reasons[image_id if image_id != "" else problem["what"]] = (name, problem["what"])
    for problem in provenance["left_out"]:
        name, what = f"image {problem['image_id']}", f"{problem['source']}: {problem['what']}"
        reasons.setdefault(problem["image_id"], (name, what))
    return list(reasons.values())


# The page

HEADINGS = {
    "train": "Images that the model has learnt from",
    "validation": "Held-out images",
    "test": "Held-out images: test",
}


def write_page(
    path: Path,
    name: str,
    warnings: Sequence[str],
    images: Sequence[Path],
    packed: Path,
    captions: Mapping[int, str],
    reports: Mapping[str, dict[str, Any]],
) -> None:
    """One page: the scores, and every image with its caption and the reference captions.

    Args:
        path: of the page.
        name: of the data.
        warnings: above the scores.
        images: image files, or folders of them.
        packed: the packed dataset.
        captions: by image id.
        reports: of `evaluate`.
    """
    files = find_images(map(str, images))
    sections = {HEADINGS[split]: sheet_images(load_packed_split(packed, split), files, captions) for split in reports}
    page = html_sheet(sections, title=name, warnings=warnings, table=score_table(reports))
    atomic_write(path, page)


def score_table(reports: Mapping[str, dict[str, Any]]) -> Table:
    """The scores of each split."""
    metrics = list(dict.fromkeys(metric for report in reports.values() for metric in report["scores"]))
    return Table(
        ["split", "images", *(METRICS[metric][1] for metric in metrics)],
        [
            [split, f"{report['images']:,}", *(f"{report['scores'][metric]:.3f}" for metric in metrics)]
            for split, report in reports.items()
        ],
    )


def sheet_images(rows: Dataset, files: Sequence[Path], captions: Mapping[int, str]) -> list[SheetImage]:
    """The images of a split that have a file and a caption."""
    path_of = match_images(files, dict(zip(rows["image_id"], rows["file_name"], strict=True))).paths
    return [
        SheetImage(path_of[row["image_id"]], [captions[row["image_id"]]], references=row["captions"])
        for row in rows.select_columns(["image_id", "captions"])
        # Others were moved since, or left out by `difnet caption`, which named them.
        if row["image_id"] in captions and row["image_id"] in path_of
    ]
