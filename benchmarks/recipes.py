"""Which recipe captions held-out images best? One change at a time to the recipe of a packed dataset.

    python benchmarks/recipes.py --dataset flickr8k/packed --vocab flickr8k/vocab.json

The recipe is what `difnet train-on-images` chooses by the number of training images
(`difnet_transformers/presets.py`). Rows of cross-entropy (XE) train from scratch; rows of SCST all start from the
recipe's best XE checkpoint of their seed. Scores are those of the best checkpoint on the validation split, which
chooses the checkpoint and the recipe: a test split is for the recipe that was chosen. Every row is `difnet train`, in
this process; a stopped study resumes with the same command. The table goes to the terminal and to benchmarks/results/.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import header, make_parser, markdown_table, results_path, write_report

from difnet_transformers.cli.main import main as difnet
from difnet_transformers.data.packed_dataset import load_packed_split
from difnet_transformers.files import atomic_write, make_folder, read_json
from difnet_transformers.presets import option_words, preset_for

METRICS = {"cider_d": "CIDEr-D", "bleu_4": "BLEU-4"}
RECIPE = "the recipe"
QUICK: dict[str, object] = {"--max-steps": 2, "--xe-epochs": 1, "--scst-epochs": 1, "--warmup-steps": 0}


class Change(NamedTuple):
    """What a row has otherwise than the recipe.

    Args:
        stage: "xe" or "scst".
        options: of `difnet train`; `None` leaves one of the recipe's out.
        network: fields of `DifnetConfig`.
    """

    stage: str
    options: dict[str, object] = {}
    network: dict[str, object] = {}


CHANGES = {
    RECIPE: Change("xe"),
    "dropout 0.1": Change("xe", network={"dropout": 0.1, "attention_dropout": 0.1}),
    "dropout 0.3": Change("xe", network={"dropout": 0.3, "attention_dropout": 0.3}),
    "no label smoothing": Change("xe", {"--label-smoothing": 0.0}),
    "no weight decay": Change("xe", {"--weight-decay": 0.0}),
    "12 epochs": Change("xe", {"--xe-epochs": 12}),
    "learning rate 1e-3": Change("xe", {"--xe-learning-rate": 1e-3}),
    "grid cells dropped, 0.1": Change("xe", {"--grid-cell-dropout": 0.1}),
    "moving average of weights, 0.999": Change("xe", {"--ema-decay": 0.999}),
    "d_model 256, 4 heads, ffn 1024": Change(
        "xe",
        network={
            "d_model": 256,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 1024,
            "decoder_ffn_dim": 1024,
        },
    ),
    f"SCST: {RECIPE}": Change("scst"),
    "SCST: dropout as in XE": Change("scst", {"--scst-dropout": None}),
    "SCST: dropout as in XE, constant 3e-5": Change(
        "scst",
        {
            "--scst-dropout": None,
            "--scst-schedule": "constant",
            "--scst-warmup-steps": 0,
            "--scst-learning-rate": 3e-5,
        },
    ),
    "SCST: learning rate 5e-5": Change("scst", {"--scst-learning-rate": 5e-5}),
    "SCST: learning rate 2e-4": Change("scst", {"--scst-learning-rate": 2e-4}),
    "SCST: 1 epoch": Change("scst", {"--scst-epochs": 1}),
    "SCST: 5 epochs": Change("scst", {"--scst-epochs": 5}),
    "SCST: CIDEr-D alone": Change("scst", {"--rewards": "cider_d"}),
    "SCST: samples instead of beams": Change("scst", {"--scst-samples": "sample"}),
}
Results = dict[str, dict[int, dict[str, Any]]]


class Study:
    """The runs of one packed dataset in one folder.

    Args:
        folder: of the runs.
        dataset: packed dataset with the splits train and validation.
        vocab: vocab.json.
        quick: whether to take two steps a run.
        cpu: whether to train on the CPU even where there is a GPU.
    """

    def __init__(self, folder: Path, dataset: Path, vocab: Path | None, quick: bool, cpu: bool) -> None:
        self.folder, self.dataset, self.vocab, self.quick, self.cpu = folder, dataset, vocab, quick, cpu
        self.num_images = len(load_packed_split(dataset, "train"))
        self.preset = preset_for(self.num_images)
        self.settings = {
            "dataset": str(dataset.resolve()),
            "vocab": None if vocab is None else str(vocab.resolve()),
            "network": dict(self.preset.network),
            "training": dict(self.preset.training),
            "quick": quick,
        }
        make_folder(folder)
        settings_file = folder / "settings.json"
        if settings_file.exists() and read_json(settings_file) != json.loads(json.dumps(self.settings)):
            sys.exit(f"{folder} holds a study with other settings; delete it, or choose another --output")
        atomic_write(settings_file, json.dumps(self.settings))

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Trains a row with a seed: the validation scores of its best checkpoint, and the minutes.

        An SCST row trains the recipe's XE row first if that is not done.
        """
        change = CHANGES[name]
        folder = self.folder / f"seed_{seed}" / "".join(letter if letter.isalnum() else "_" for letter in name)
        done = folder / "done.json"
        if done.exists():
            return read_json(done)
        start = time.monotonic()
        words: list[object] = ["--dataset", self.dataset, "--output", folder / "run", "--stage", change.stage]
        words += ["--seed", seed, "--report-to", "none", *(["--cpu"] if self.cpu else [])]
        if change.stage == "scst":
            xe = self.run(RECIPE, seed)
            words += ["--model", xe["checkpoint"]]
            start = time.monotonic()
        else:
            make_folder(folder)
            atomic_write(folder / "network.json", json.dumps({**self.preset.network, **change.network}))
            words += ["--config", folder / "network.json"]
            words += ["--vocab", self.vocab] if self.vocab else ["--min-word-count", self.preset.min_word_count]
        training = {**self.preset.training, **change.options, **(QUICK if self.quick else {})}
        words += option_words({option: value for option, value in training.items() if value is not None})
        words += ["--resume", "last"] if (folder / "run" / "last").exists() else []
        arguments = ["train", *map(str, words)]
        print(f"$ difnet {shlex.join(arguments)}", file=sys.stderr)
        if difnet(arguments) != 0:
            sys.exit("difnet train ended with an error; the same command resumes")
        lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
        best = max((line for line in lines if line["event"] == "validation"), key=lambda line: line["cider_d"])
        result = {metric: best[metric] for metric in METRICS}
        result |= {"minutes": (time.monotonic() - start) / 60, "checkpoint": str(folder / "run" / "best")}
        atomic_write(done, json.dumps(result))
        return result


def report(results: Results, study: Study) -> list[str]:
    """The table of all rows: each seed's CIDEr-D, and the means.

    Args:
        results: scores by row and seed.
        study: that they are of.
    """
    seeds = list(next(iter(results.values())))
    rows = []
    for name, scores in results.items():
        means = {metric: statistics.mean(score[metric] for score in scores.values()) for metric in METRICS}
        minutes = statistics.mean(score["minutes"] for score in scores.values())
        cells = [f"{scores[seed]['cider_d']:.4f}" for seed in seeds]
        rows.append([name, *cells, *(f"{mean:.4f}" for mean in means.values()), f"{minutes:.1f}"])
    options: dict[str, Any] = {**study.preset.network, **study.preset.training}
    device = "cpu" if study.cpu or not torch.cuda.is_available() else "cuda"
    notes = [
        f"{study.num_images:,} training images; scores of the best checkpoint on the validation split",
        f"the recipe: {' '.join(map(str, option_words(options)))}",
        "rows of SCST start from the recipe's best XE checkpoint; minutes are those of the stage, on this machine as "
        "busy as it was",
    ]
    columns = [f"CIDEr-D, seed {seed}" for seed in seeds] + [f"{name}, mean" for name in METRICS.values()]
    return [
        *header("Recipes", "recipes.py", device=torch.device(device), notes=notes),
        *markdown_table(["row", *columns, "minutes"], rows),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", type=Path, required=True, help="packed dataset, such as flickr8k/packed")
    parser.add_argument("--vocab", type=Path, help="vocab.json (default: made from the captions)")
    parser.add_argument("--rows", nargs="+", choices=list(CHANGES), default=list(CHANGES), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "difnet_recipes", help="runs")
    parser.add_argument("--table", type=Path, help="default: a dated file in benchmarks/results/")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="two steps a run: whether it runs, not what it finds")
    options = parser.parse_args(argv)
    study = Study(options.output, options.dataset, options.vocab, options.quick, options.cpu)
    results: Results = {}
    for name in options.rows:
        results[name] = {seed: study.run(name, seed) for seed in options.seeds}
    device = "cpu" if options.cpu or not torch.cuda.is_available() else "cuda"
    write_report(report(results, study), options.table or results_path("recipes", device))


if __name__ == "__main__":
    main()
