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

from difnet_transformers.data.packed_dataset import PackedImages, load_packed_split
from difnet_transformers.demo.corpus import DrawnObject, make_scenes, objects_of
from modeling_difnet import relevance

METHODS = ("original", "conservative", "gradient_x_input", "attention_rollout")


def named_objects(words: list[str], objects: list[DrawnObject]) -> Iterator[tuple[int, int]]:
    """Positions of words that name exactly one of the objects, and which."""
    for position, word in enumerate(words):
        named = [index for index, thing in enumerate(objects) if word in thing.words]
        if len(named) == 1:
            yield position, named[0]


def score(cells: np.ndarray, objects: list[DrawnObject], named: int) -> dict[str, tuple[float, float]]:
    """What was found and what chance would find, for one word's cells (49,)."""
    masks = [thing.cells().ravel() for thing in objects]
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


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo_output", help="default: demo_output/")
    parser.add_argument("--split", default="test")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the table there, too")
    options = parser.parse_args(argv)

    settings = json.loads((options.demo / "settings.json").read_text())
    scenes = {scene.image_id: scene for scene in make_scenes(settings["seed"], settings["sizes"])}
    folder = options.demo / "run" / "best"
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    dataset = load_packed_split(options.demo / "packed", options.split)
    images = PackedImages(dataset, torch.float32)

    found: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    rows = np.arange(len(dataset))
    for some in tqdm(np.split(rows, range(options.batch_size, len(rows), options.batch_size)), unit=" batches"):
        features = images.read(some)
        sequences = model.generate(**features)
        objects = [objects_of(scenes[image_id]) for image_id in dataset.select(some)["image_id"]]
        for method in METHODS:
            output = relevance(
                model, **features, sequences=sequences, method=method, targets="caption", allow_unknown_words=True
            )
            flows = {"both": output.cells(), "grid": output.grid, "segmentation": output.segmentation}
            for row, things in enumerate(objects):
                words = processor.tokenizer.convert_ids_to_tokens(output.target_ids[row])
                for position, named in named_objects(words, things):
                    for flow, cells in flows.items():
                        for kind, pair in score(cells[row, position].numpy(), things, named).items():
                            found.setdefault((method, flow), {}).setdefault(kind, []).append(pair)

    number = len(next(iter(found.values()))["hit"])
    cells = []
    for (method, flow), kinds in found.items():
        columns = [method, flow]
        for kind in ("hit", "share", "largest"):
            values, chances = np.array(kinds[kind]).T
            interval = 1.96 * values.std() / len(values) ** 0.5
            columns += [f"{values.mean():.2f} +-{interval:.2f}", f"{chances.mean():.2f}"]
        cells.append(columns)
    lines = [
        f"{number} words that name a drawn object, in captions of {len(dataset)} {options.split} scenes",
        "",
        *markdown_table(["method", "flow", "hit", "chance", "share", "chance", "largest", "chance"], cells),
    ]
    write_report(lines, options.output)


if __name__ == "__main__":
    main()
