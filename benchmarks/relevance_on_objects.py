"""Whether a word's relevance falls on the object that it names, on the demo's scenes, where the objects are known.

    make demo
    python benchmarks/relevance_on_objects.py --demo demo_output

The trained model captions the demo's test scenes. For every word that names one of a scene's drawn objects: is the
most relevant cell one that the object covers ("hit"), how much of the positive relevance is on its cells ("share"),
and is the relevance of an average cell of the object larger than that of the other object and of the background
("largest")? Chance is a random cell, even relevance, and one of the things that are there. Every method of `relevance`
is tried, for both flows together and for each alone; "+-" is the 95% interval over words.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import ROOT, make_parser, markdown_table, write_report
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

from difnet_transformers.data import PackedImages, load_packed_split
from difnet_transformers.demo.rendering import DrawnObject, drawn_objects
from difnet_transformers.demo.scenes import make_scenes
from modeling_difnet import relevance

FLOWS = ("both", "grid", "segmentation")
METHODS = ("original", "conservative", "gradient_x_input", "attention_rollout")


def named_objects(words: list[str], objects: list[DrawnObject]) -> Iterator[tuple[int, int]]:
    """Positions of words that name exactly one of the objects, and which."""
    for position, word in enumerate(words):
        named = [index for index, each in enumerate(objects) if word in each.nouns]
        if len(named) == 1:
            yield position, named[0]


def scores_of_word(cells: np.ndarray, objects: list[DrawnObject], named: int) -> dict[str, tuple[float, float]]:
    """How well the relevance of a word falls on the object that it names.

    Args:
        cells: (49,), relevance for the word.
        objects: of the scene.
        named: index of the object that the word names.

    Returns:
        "hit", "share" and "largest", each as found and by chance.
    """
    masks = [each.cells().ravel() for each in objects]
    background = ~np.logical_or.reduce(masks)
    own = masks[named]
    positive = cells.clip(min=0)
    places = [mask for index, mask in enumerate(masks) if index != named] + [background]
    places = [mask & ~own for mask in places if (mask & ~own).any()]
    largest = all(cells[own].mean() > cells[mask].mean() for mask in places)
    return {
        "hit": (float(own[cells.argmax()]), own.mean()),
        "share": (positive[own].sum() / max(positive.sum(), 1e-30), own.mean()),
        "largest": (float(largest), 1 / (1 + len(places))),
    }


def score_split(demo: Path, split: str, batch_size: int) -> tuple[dict[tuple[str, str], list], int]:
    """Scores of all words that name an object.

    Args:
        demo: output folder of `difnet demo`.
        split: of its packed dataset.
        batch_size: images at a time.

    Returns:
        By method and flow a list of what `scores_of_word` returns; the number of scenes.
    """
    settings = json.loads((demo / "settings.json").read_text(encoding="utf-8"))
    scenes = {scene.image_id: scene for scene in make_scenes(settings["seed"], settings["sizes"])}
    checkpoint = demo / "run" / "best"
    model, processor = AutoModel.from_pretrained(checkpoint).eval(), AutoProcessor.from_pretrained(checkpoint)
    dataset = load_packed_split(demo / "packed", split)
    images = PackedImages(dataset, torch.float32)

    scores: dict[tuple[str, str], list] = {}
    rows = np.arange(len(dataset))
    for batch in tqdm(np.split(rows, range(batch_size, len(rows), batch_size)), unit=" batches"):
        sequences = model.generate(**images.read(batch))
        is_empty = (sequences[:, 1] == model.config.eos_token_id).numpy()  # nothing to explain
        batch, sequences = batch[~is_empty], sequences[~is_empty]
        if not len(batch):
            continue
        features = images.read(batch)
        objects = [drawn_objects(scenes[image_id]) for image_id in dataset.select(batch)["image_id"]]
        for method in METHODS:
            output = relevance(
                model, **features, sequences=sequences, method=method, targets="caption", allow_unknown_words=True
            )
            words = [processor.tokenizer.convert_ids_to_tokens(ids) for ids in output.target_ids]
            named = [
                (row, position, index)
                for row in range(len(batch))
                for position, index in named_objects(words[row], objects[row])
            ]
            for flow, cells in zip(FLOWS, (output.cells(), output.grid, output.segmentation), strict=True):
                assert cells is not None, "the demo's model reads both flows"
                scores.setdefault((method, flow), []).extend(
                    scores_of_word(cells[row, position].numpy(), objects[row], index) for row, position, index in named
                )
    return scores, len(dataset)


def table_cells(scores: dict[tuple[str, str], list]) -> Iterator[list[str]]:
    """A line for each method and flow."""
    for (method, flow), of_words in scores.items():
        columns = [method, flow]
        for kind in ("hit", "share", "largest"):
            values, chances = np.array([found[kind] for found in of_words]).T
            interval = 1.96 * values.std() / len(values) ** 0.5
            columns += [f"{values.mean():.2f} +-{interval:.2f}", f"{chances.mean():.2f}"]
        yield columns


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo_output", help="default: demo_output/")
    parser.add_argument("--split", default="test")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the table there, too")
    options = parser.parse_args(argv)
    scores, num_scenes = score_split(options.demo, options.split, options.batch_size)
    num_words = len(next(iter(scores.values()), []))
    if not num_words:
        parser.exit(1, f"no caption of the {options.split} scenes names an object\n")
    lines = [
        f"{num_words} words that name a drawn object, in captions of {num_scenes} {options.split} scenes",
        "",
        *markdown_table(
            ["method", "flow", "hit", "chance", "share", "chance", "largest", "chance"], table_cells(scores)
        ),
    ]
    write_report(lines, options.output)


if __name__ == "__main__":
    main()
