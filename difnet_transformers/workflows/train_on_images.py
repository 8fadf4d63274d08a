"""From images with captions to a captioner of one's own: other `difnet` commands, one after another.

The original (mrwu-mac/DIFNet, CVPR 2022) starts from feature files that others made. Nothing happens here that the
printed commands do not do, except that captions in other forms are written as COCO's; this module knows the order of
the commands and their settings (`presets.py`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processing_difnet import DifnetTokenizer

from ..child_process import run_difnet
from ..command_line import LeftOut
from ..data.caption_sources.coco_files import PreparedCaptions, prepare_captions
from ..data.caption_sources.hub import HubDataset, save_hub_dataset
from ..data.caption_sources.image_folders import is_image_folder
from ..data.caption_sources.rows import CaptionSource
from ..data.caption_sources.splits import NO_RULE, SPLITS, SplitRule
from ..data.caption_sources.tables import USUAL_COLUMNS, ColumnNames
from ..data.captions import read_annotations
from ..data.feature_files import GridFiles
from ..data.feature_records import grid_size_of_features
from ..data.grids import grid_shape
from ..data.image_files import find_images, match_images
from ..data.packed_dataset import load_packed_split
from ..files import atomic_output, atomic_write, printable, read_json
from ..model_card import METRICS, check_license
from ..options import option_name
from ..presets import Preset, option_words, preset_for
from ..reports.pages import SheetImage, Table, html_sheet

if TYPE_CHECKING:
    from datasets import Dataset

MOST_LINES = 100  # of entries of captions that are left out; a file has all of them


@dataclass(frozen=True)
class FeatureSources:
    """Where the features come from. Of the three sources of segmentation at most one is given.

    Args:
        grid_backbone: as `difnet extract` takes it; `None` for a small random network.
        segmentation_model: a segmentation model or object detector of Transformers.
        instances: instances_*.json of the images, as COCO's, also with categories of their own.
        panoptic: panoptic_*.json of the images, likewise.
        seed: of the random network.
        options: further options of `difnet extract` for the networks, by the names of their fields; `None` is none.
    """

    grid_backbone: str | None = None
    segmentation_model: str | None = None
    instances: Sequence[Path] = ()
    panoptic: Sequence[Path] = ()
    seed: int = 0
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def has_segmentation(self) -> bool:
        """Whether there is a real source of segmentation features."""
        return bool(self.segmentation_model or self.instances or self.panoptic)

    def arguments(self) -> list[object]:
        """The options of `difnet extract`."""
        words: list[object] = ["--untrained", "--seed", self.seed] if self.grid_backbone is None else []
        words += ["--grid-backbone", self.grid_backbone] if self.grid_backbone is not None else []
        for name, value in self.options.items():
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
    hub_dataset: HubDataset | None = None,
    columns: ColumnNames = USUAL_COLUMNS,
    split_rule: SplitRule = NO_RULE,
    name: str | None = None,
    skip_missing: bool = False,
    choose_by: str = "validation",
    min_word_count: int | None = None,
    license: str | None = None,
    seed: int = 0,
    cpu: bool = False,
    training_options: Sequence[str] = (),
    strict: bool = False,
    captions_only: bool = False,
) -> int:
    """All steps from images to a captioner, its scores and a page. A step that was done before is resumed or skipped.

    Args:
        images: image files, or folders of them; empty where `captions` is an imagefolder.
        captions: as `prepare_captions` takes them; empty where `images` is an imagefolder.
        output: folder of everything.
        sources: where the features come from.
        hub_dataset: images and captions in place of `images` and `captions`.
        columns: the names in a table of captions; by default the usual ones.
        split_rule: says the splits where the captions do not.
        name: what card and page call the data (default: the name of `output`).
        skip_missing: whether images without features, and entries of captions that cannot be used, are left out even
            where they are more than half.
        choose_by: split whose CIDEr-D says which checkpoint is best, "validation" or "train".
        min_word_count: how often the captions must have a word; by default the preset's.
        license: of the weights, for the card.
        seed: of the training.
        cpu: whether to use the CPU even where there is a GPU.
        training_options: further options of `difnet train`, which replace those given here.
        strict: whether the exit code is 2 where an image was left out.
        captions_only: whether to stop when the captions are read and the preset is chosen.

    Returns:
        The exit code.

    Raises:
        ValueError: an input is wrong, or a step failed; the text says which.
        KeyboardInterrupt: a step was asked to stop.
    """
    check_license(license)
    name = name or output.resolve().name
    seconds: dict[str, float] = {}
    with timed(seconds, "captions"):
        images, prepared = read_captions(images, captions, hub_dataset, output, columns, split_rule, skip_missing)
    annotations = prepared.folder
    num_images, _ = prepared.counts.get("train", (0, 0))
    preset = preset_for(num_images)
    print(preset.reason(num_images), flush=True)
    if captions_only:
        print(f"captions in {printable(annotations, 300)}; the same command without --captions-only trains")
        return 2 if strict and prepared.unusable else 0
    with timed(seconds, "extract"):
        extract_features(images, annotations, output, sources, cpu)
    with timed(seconds, "pack"):
        pack(annotations, output, skip_missing)
    vocabulary = make_vocabulary(
        annotations, output / "vocab.json", preset.min_word_count if min_word_count is None else min_word_count
    )
    options: list[object] = ["--validation-split", choose_by, "--seed", seed]
    options += ["--license", license] if license else []
    options += ["--report-to", "none", *(["--cpu"] if cpu else []), *training_options]
    with timed(seconds, "train"):
        train(vocabulary, output, preset, options)
    model = copy_best_checkpoint(output)
    with timed(seconds, "evaluate"):
        reports = evaluate(model, output, [split for split in SPLITS if split in prepared.counts], name, images, cpu)
    with timed(seconds, "caption"):
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
        f"model in {printable(model, 300)}, captions in {printable(output / 'captions.json', 300)}, images in "
        f"{printable(page, 300)}"
    )
    minutes = [f"{step} {taken / 60:.1f}" for step, taken in seconds.items()]
    print(f"minutes: {', '.join(minutes)}, together {sum(seconds.values()) / 60:.1f}")
    print_left_out(prepared, output)
    left_out = LeftOut("image")
    for image, reason in left_out_images(output):
        left_out.add(image, reason)
    exit_code = left_out.report(sum(report["images"] for report in reports.values()), strict)
    return 2 if strict and prepared.unusable else exit_code


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Notes how long a step takes."""
    start = time.monotonic()
    yield
    seconds[step] = time.monotonic() - start


# The steps


def read_captions(
    images: Sequence[Path],
    captions: Sequence[Path],
    hub_dataset: HubDataset | None,
    output: Path,
    columns: ColumnNames,
    split_rule: SplitRule,
    skip_missing: bool,
) -> tuple[Sequence[Path], PreparedCaptions]:
    """Writes the captions as COCO files in `output`/annotations, and the images of a Hub dataset in `output`/images.

    Args:
        images, captions, hub_dataset, output, columns, split_rule, skip_missing: of `train_on_images`.

    Returns:
        The places of the images, and the captions.
    """
    saved: CaptionSource | None = None
    if hub_dataset is not None:
        saved = save_hub_dataset(hub_dataset, columns, output / "images", skip_missing)
        images = captions = [output / "images"]
        columns = USUAL_COLUMNS
    elif not captions:
        if len(images) != 1 or not is_image_folder(images[0]):
            raise ValueError(
                f"{printable(images[0], 300)}: no metadata.csv or metadata.jsonl in this folder says the captions; "
                "give --captions"
            )
        captions = images
    elif not images:
        if len(captions) != 1 or not is_image_folder(captions[0]):
            raise ValueError(f"{printable(captions[0], 300)}: not a folder of images with captions; give --images")
        images = captions
    prepared = prepare_captions(captions, output / "annotations", columns, split_rule, skip_missing)
    if saved is not None:
        prepared.unusable[:0], prepared.notes[:0] = saved.unusable, saved.notes
        prepared.num_entries = saved.num_entries
    for split, (num_images, num_captions) in prepared.counts.items():
        print(f"{split}: {num_images:,} images, {num_captions:,} captions")
    print_left_out(prepared, output)
    return images, prepared


def print_left_out(prepared: PreparedCaptions, output: Path) -> None:
    """Names the entries of the captions that are left out; where they are many, a file has all of them."""
    for note in prepared.notes:
        print(note)
    for entry in prepared.unusable[:MOST_LINES]:
        print(f"left out: {entry}")
    if len(prepared.unusable) > MOST_LINES:
        path = output / "captions_left_out.txt"
        atomic_write(path, "".join(f"{entry}\n" for entry in prepared.unusable))
        print(f"left out: {len(prepared.unusable) - MOST_LINES:,} more; see {printable(path, 300)}")
    if prepared.unusable:
        print(
            f"{len(prepared.unusable):,} of {prepared.num_entries:,} entries of the captions left out (listed above)"
        )


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
    grid_size = grid_size_of_features(read_json(output / "features" / "manifest.json"), cells)
    words += ["--grid-size", "x".join(map(str, grid_shape(grid_size)))] if grid_size != 7 else []
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


def train(vocabulary: Path, output: Path, preset: Preset, options: Sequence[object]) -> None:
    """Cross-entropy and self-critical training in `output`/training, resumed where it was stopped."""
    run, config = output / "training", output / "config.json"
    atomic_write(config, json.dumps(dict(preset.network), indent=1) + "\n")
    words: list[object] = ["--dataset", output / "packed", "--output", run, "--config", config, "--vocab", vocabulary]
    words += option_words(preset.training)
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

PAGE_IMAGES = 500
"""Images of a split that the page shows: each is about 15 KB of it."""

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
    """One page: the scores, and the images with their captions and the reference captions.

    Of a split with more than `PAGE_IMAGES` images, so many at equal distances are shown.

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
    sections = {}
    for split in reports:
        rows = sheet_images(load_packed_split(packed, split), files, captions)
        shown = equally_spaced(rows, PAGE_IMAGES)
        part = f" ({len(shown):,} of {len(rows):,}, equally spaced)" if len(shown) < len(rows) else ""
        sections[HEADINGS[split] + part] = shown
    page = html_sheet(sections, title=name, warnings=warnings, table=score_table(reports))
    atomic_write(path, page)


def equally_spaced(rows: Sequence[SheetImage], number: int) -> list[SheetImage]:
    """`number` of the rows at equal distances, the first and the last among them; all of fewer rows."""
    if len(rows) <= number:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (number - 1))] for place in range(number)]


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
