"""The page of examples of a split: a few images with their captions, chosen by a rule and not by taste.

The original (mrwu-mac/DIFNet, CVPR 2022) has no such page. Picked examples say little about a captioner, so here the
images are ranked by the CIDEr-D of their captions, and those at equally spaced ranks are shown, from the best to the
worst.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from caption_metrics import score_captions

from ..data.image_files import find_images, match_images
from ..data.packed_dataset import load_packed_split
from ..files import atomic_write, printable, read_json
from ..model_card import METRICS
from .pages import SheetImage, Table, html_sheet


class Example(NamedTuple):
    """An image of the page.

    Args:
        image_id: of the image.
        caption: that the model gave it.
        references: its reference captions.
        cider_d: of the caption.
        rank: among all images by `cider_d`; 1 is the best.
    """

    image_id: int
    caption: str
    references: Sequence[str]
    cider_d: float
    rank: int


def choose_examples(
    captions: Mapping[int, str], references: Mapping[int, Sequence[str]], number: int
) -> list[Example]:
    """The images at equally spaced ranks of their CIDEr-D, the best and the worst among them.

    Equal scores are ranked by image id, so that the choice depends on captions and references alone.

    Args:
        captions: by image id, one or more.
        references: reference captions by image id; document frequencies are those of the images in `captions`.
        number: of examples, at least 2; of fewer images all are taken.

    Returns:
        The examples, from the best to the worst.
    """
    ids = sorted(captions)
    scores = score_captions(
        [captions[image_id] for image_id in ids], [references[image_id] for image_id in ids], per_image=True
    )["per_image"]["cider_d"]
    ranked = sorted(zip(ids, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))
    ranks = np.unique(np.linspace(0, len(ranked) - 1, number).round().astype(int)).tolist()
    return [
        Example(image_id, captions[image_id], references[image_id], cider_d, rank + 1)
        for rank, (image_id, cider_d) in ((rank, ranked[rank]) for rank in ranks)
    ]


def check_examples(page: Path, images: Sequence[Path]) -> None:
    """To be called before the work that the examples are of.

    Raises:
        IsADirectoryError: a folder is in the place of the page.
        ValueError: an image or a folder of images does not exist, or a folder has none.
    """
    if page.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, where a file is to be written", str(page))
    find_images(map(str, images))


def write_examples(
    page: Path, results: Path, dataset: Path, split: str, images: Sequence[Path], number: int = 12
) -> None:
    """Writes the page of examples of what `evaluate_split` has captioned.

    Args:
        page: the HTML file; it holds the images, in a small form.
        results: folder of `captions_SPLIT_results.json` and `scores_SPLIT.json`.
        dataset: the packed dataset.
        split: of the dataset.
        images: image files, or folders of them. An image without a file is a grey square.
        number: of examples, at least 2.

    Raises:
        ValueError: a file cannot be read.
    """
    report = read_json(results / f"scores_{split}.json")
    results_rows = read_json(results / f"captions_{split}_results.json")
    captions = {row["image_id"]: row["caption"] for row in results_rows}
    notes = {row["image_id"]: f", confidence {row['confidence']:.0%}" for row in results_rows if "confidence" in row}
    rows = load_packed_split(dataset, split).select_columns(["image_id", "file_name", "captions"]).to_list()
    examples = choose_examples(captions, {row["image_id"]: row["captions"] for row in rows}, number)
    path_of = match_images(find_images(map(str, images)), {row["image_id"]: row["file_name"] for row in rows}).paths
    total = f"{len(captions):,}"
    shown = [
        SheetImage(
            path_of.get(example.image_id, ""),
            [example.caption],
            f"rank {example.rank:,} of {total}, CIDEr-D {example.cider_d:.2f}{notes.get(example.image_id, '')}, "
            f"image {example.image_id}",
            example.references,
        )
        for example in examples
    ]
    summary = (
        f"{len(examples)} of {total} images. All are ranked by the CIDEr-D of their captions, equal ones by image id; "
        "shown are those at equally spaced ranks, from the best to the worst. In bold what the model says, below it "
        "the reference captions."
    )
    scores = {name: value for name, value in report["scores"].items() if name in METRICS and value is not None}
    table = Table(
        ["split", "images", *(METRICS[name][1] for name in scores)],
        [[split, total, *(f"{value:.3f}" for value in scores.values())]],
    )
    title = f"{report['dataset']}, {split}: examples by rank"
    atomic_write(page, html_sheet({"": shown}, title=title, summary=summary, table=table, open_references=True))
    print(f"{len(examples)} examples in {printable(page, 300)}")
