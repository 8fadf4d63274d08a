"""Do two flows gain on one on real photographs? Cross-validation over images with captions and annotated instances.

    python benchmarks/two_flows.py --images images/ --captions captions.json --instances instances.json \
        --grid-backbone efficientnet_lite:make

The paper's comparison of DIFNet and its baseline on COCO, for as few images as a laptop trains on in minutes. The
images of all files are shuffled and cut into folds, once for each seed. A captioner learns from all folds but two, one
of the two says which of its checkpoints is best, and the other is captioned. So every image is captioned once for each
seed, by a network that has not seen it, and the scores are of all images together. Both forms, DIFNet and the paper's
baseline (`--no-segmentation`), see the same images, captions, seeds and settings.

Everything is done by `difnet extract`, `difnet pack`, `difnet train` and `difnet evaluate`, in one process. A stopped
study resumes with the same command.
"""

from __future__ import annotations

import json
import math
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import header, make_parser, markdown_table, results_path, write_report

from caption_metrics import score_captions
from difnet_transformers.cli.main import main as difnet
from difnet_transformers.data.feature_files import GridFiles
from difnet_transformers.files import atomic_write, read_json
from difnet_transformers.presets import SMALL_NETWORK

FORMS = {"one flow": ("--no-segmentation",), "two flows": ()}
METRICS = {"cider_d": "CIDEr-D", "bleu_4": "BLEU-4"}
TRAINING: dict[str, object] = {
    "stage": "xe",
    "xe-batches": "images",
    "xe-batch-size": 4,
    "xe-learning-rate": 5e-4,
    "xe-schedule": "constant",
    "warmup-steps": 50,
    "xe-epochs": 35,
    "xe-patience": 35,
    "dropout": 0.3,
    "min-word-count": 2,
    "log-every": 100,
    "report-to": "none",
}
# Of every seed and form: "images", "seconds", "scores" and "cider_d_of_images".
Results = dict[int, dict[str, dict[str, Any]]]
QUICK = {"xe-batch-size": 2, "xe-epochs": 1, "min-word-count": 1}


def run_difnet(command: str, *words: object) -> None:
    """Runs `difnet COMMAND` in this process; what is imported once serves all folds."""
    arguments = [command, *map(str, words)]
    print(f"$ difnet {shlex.join(arguments)}", file=sys.stderr)
    if difnet(arguments) != 0:
        sys.exit(f"difnet {command} ended with an error; the same command resumes")


def sizes_of(grids: Path) -> list[object]:
    """The options of `difnet pack` that say how large the grids of a feature file are."""
    files = GridFiles((str(grids),))
    image_id, path = next(iter(files.index().items()))
    cells, channels = files.read(path, image_id).shape
    return ["--grid-size", math.isqrt(cells), "--grid-feature-size", channels]


class Study:
    """The folds of all seeds in one folder.

    Args:
        folder: of features and runs.
        captions: COCO caption files; the splits they name are not used.
        grid_backbone: as `difnet extract` takes it; `None` for a random network.
        num_folds: at least 3.
        training: options of `difnet train`.

    Raises:
        SystemExit: the folder holds a study with other settings.
    """

    def __init__(
        self,
        folder: Path,
        captions: Sequence[Path],
        grid_backbone: str | None,
        num_folds: int,
        training: dict[str, object],
    ) -> None:
        self.folder, self.grid_backbone, self.num_folds, self.training = folder, grid_backbone, num_folds, training
        files = [read_json(path) for path in captions]
        self.images = {image["id"]: image for file in files for image in file["images"]}
        self.annotations = [annotation for file in files for annotation in file["annotations"]]
        settings = {
            "images": sorted(self.images),
            "grid_backbone": grid_backbone,
            "num_folds": num_folds,
            "network": SMALL_NETWORK,
            "training": training,
        }
        settings_file = folder / "settings.json"
        if settings_file.exists() and read_json(settings_file) != settings:
            sys.exit(f"{folder} holds a study with other settings; delete it, or choose another --output")
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(settings_file, json.dumps(settings))
        atomic_write(folder / "network.json", json.dumps(SMALL_NETWORK))

    def extract(self, images: Sequence[Path], instances: Sequence[Path]) -> None:
        """Grid features, and the instances as class shares, of all images."""
        if (self.folder / "features").exists():
            return
        network = ["--untrained"] if self.grid_backbone is None else ["--grid-backbone", self.grid_backbone]
        words: list[object] = [*images, *network, "--instance-annotations", *instances, "--coco-json", *instances]
        run_difnet("extract", *words, "--device", "cpu", "--output", self.folder / "features")

    def folds(self, seed: int) -> list[list[int]]:
        """The image ids of each fold."""
        ids = sorted(self.images)
        random.Random(seed).shuffle(ids)
        return [ids[fold :: self.num_folds] for fold in range(self.num_folds)]

    def pack(self, seed: int, fold: int) -> Path:
        """The dataset in which `fold` is the test split, and the next fold the validation split."""
        folder = self.folder / f"seed_{seed}" / f"fold_{fold}"
        if (folder / "packed").exists():
            return folder
        folds = self.folds(seed)
        test, validation = folds[fold], folds[(fold + 1) % self.num_folds]
        splits = {"test": test, "validation": validation, "train": set(self.images) - {*test, *validation}}
        for split, ids in splits.items():
            content = {
                "images": [image for image_id, image in self.images.items() if image_id in ids],
                "annotations": [annotation for annotation in self.annotations if annotation["image_id"] in ids],
            }
            path = folder / "annotations" / f"captions_{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(content))
        features = self.folder / "features"
        grids = features / "grid_features.hdf5"
        words: list[object] = ["--features", grids, "--segmentation", features / "segmentations", *sizes_of(grids)]
        run_difnet("pack", *words, "--annotations", folder / "annotations", "--output", folder / "packed")
        return folder

    def caption(self, folder: Path, form: str, seed: int) -> dict[str, Any]:
        """Trains a form of the network on a fold: the captions of its test split by image id, and the seconds."""
        run = folder / form.replace(" ", "_")
        done = run / "done.json"
        if not done.exists():
            start = time.monotonic()
            resumed = ["--resume", "last"] if (run / "last").exists() else []
            options = [word for name, value in self.training.items() for word in (f"--{name}", value)]
            words = ["--dataset", folder / "packed", "--output", run, "--config", self.folder / "network.json"]
            run_difnet("train", *words, "--seed", seed, "--cpu", *options, *FORMS[form], *resumed)
            words = ["--model", run / "best", "--dataset", folder / "packed", "--output", run / "results"]
            run_difnet("evaluate", *words, "--cpu")
            seconds = time.monotonic() - start
            captions = {
                row["image_id"]: row["caption"] for row in read_json(run / "results/captions_test_results.json")
            }
            atomic_write(done, json.dumps({"captions": captions, "seconds": seconds}))
        return read_json(done)

    def run(self, seeds: Sequence[int]) -> Results:
        """Scores and seconds by seed and form."""
        references: dict[int, list[str]] = {}
        for annotation in self.annotations:
            references.setdefault(annotation["image_id"], []).append(annotation["caption"])
        results: Results = {}
        for seed in seeds:
            results[seed] = {}
            folders = [self.pack(seed, fold) for fold in range(self.num_folds)]
            for form in FORMS:
                runs = [self.caption(folder, form, seed) for folder in folders]
                captions = {int(image_id): text for run in runs for image_id, text in run["captions"].items()}
                scores = score_captions(
                    [captions[image_id] for image_id in sorted(captions)],
                    [references[image_id] for image_id in sorted(captions)],
                    per_image=True,
                )
                results[seed][form] = {
                    "images": len(captions),
                    "seconds": sum(run["seconds"] for run in runs),
                    "scores": {metric: scores[metric] for metric in METRICS},
                    "cider_d_of_images": scores["per_image"]["cider_d"],
                }
        return results


def report(results: Results, study: Study) -> list[str]:
    """The table of what `Study.run` returns, and whether two flows gain."""
    columns = {f"{name}, {form}": (form, metric) for metric, name in METRICS.items() for form in FORMS}
    table = [
        [*(result[form]["scores"][metric] for form, metric in columns.values())]
        + [result[form]["seconds"] / 60 for form in FORMS]
        for result in results.values()
    ]
    rows = dict(zip(map(str, results), table, strict=True))
    rows["mean"] = [statistics.mean(column) for column in zip(*table, strict=True)]
    if len(table) > 1:
        rows["standard deviation"] = [statistics.stdev(column) for column in zip(*table, strict=True)]
    num_images = next(iter(results.values()))["two flows"]["images"]
    notes = [
        f"{num_images} photographs in {study.num_folds} folds: {study.num_folds - 2} to learn from, one to choose the "
        "checkpoint, one held out; every photograph is held out once for each seed, and scores are of all together",
        f"grid features: {study.grid_backbone or 'of a random network'}; second flow: annotated instances of COCO",
        f"settings: {' '.join(f'--{name} {value}' for name, value in study.training.items())}",
        "minutes: of training and captioning all folds",
    ]
    lines = [
        *header("One flow and two on photographs", f"two_flows.py --seeds {' '.join(map(str, results))}", notes=notes),
        *markdown_table(
            ["seed", *columns, *(f"minutes, {form}" for form in FORMS)],
            [
                [
                    name,
                    *(f"{value:.3f}" for value in values[: len(columns)]),
                    *(f"{value:.1f}" for value in values[len(columns) :]),
                ]
                for name, values in rows.items()
            ],
        ),
        "",
    ]
    for metric, name in METRICS.items():
        gains = [
            result["two flows"]["scores"][metric] - result["one flow"]["scores"][metric] for result in results.values()
        ]
        lines.append(
            f"- two flows above one, {name}: in {sum(gain > 0 for gain in gains)} of {len(gains)} seeds "
            f"({', '.join(f'{gain:+.3f}' for gain in gains)})"
        )
    mean, error = gain_of_images(results)
    lines.append(
        f"- gain in CIDEr-D of a photograph, the mean over seeds: {mean:+.3f}, standard error over photographs "
        f"{error:.3f}: {verdict(mean, error)}"
    )
    return lines


def gain_of_images(results: Results) -> tuple[float, float]:
    """How much the CIDEr-D of an image is higher with two flows: the mean over images, and its standard error."""
    scores = {form: np.array([result[form]["cider_d_of_images"] for result in results.values()]) for form in FORMS}
    gains = (scores["two flows"] - scores["one flow"]).mean(0)  # (images,)
    return gains.mean().item(), (gains.std(ddof=1) / math.sqrt(len(gains))).item()


def verdict(mean: float, error: float) -> str:
    """What a gain and its standard error say, and no more: photographs of a fold share a network."""
    if abs(mean) <= 2 * error:
        return "within two standard errors, no difference that so few photographs show"
    return f"{'two flows' if mean > 0 else 'one flow'} ahead by more than two standard errors"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="images, or folders of them")
    parser.add_argument("--captions", type=Path, nargs="+", required=True, help="COCO's captions_*.json of the images")
    parser.add_argument(
        "--instances", type=Path, nargs="+", required=True, help="COCO's instances_*.json of the images"
    )
    parser.add_argument(
        "--grid-backbone", metavar="NAME", help="as difnet extract takes it (default: a random network)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--folds", type=int, default=5, help="at least 3 (default: 5)")
    parser.add_argument(
        "--output", type=Path, default=Path(tempfile.gettempdir()) / "difnet_two_flows", help="for features and runs"
    )
    parser.add_argument(
        "--table", type=Path, help="where the table goes (default: a dated file in benchmarks/results/)"
    )
    parser.add_argument("--quick", action="store_true", help="one epoch: whether it runs, not what it finds")
    options = parser.parse_args(argv)
    if options.folds < 3:
        parser.error("--folds must be at least 3: to learn from, to choose the checkpoint, to hold out")
    training = TRAINING | (QUICK if options.quick else {})
    study = Study(options.output, options.captions, options.grid_backbone, options.folds, training)
    study.extract(options.images, options.instances)
    lines = report(study.run(options.seeds), study)
    write_report(lines, options.table or results_path("two_flows", "cpu"))


if __name__ == "__main__":
    main()
