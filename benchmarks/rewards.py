"""What do rewards, baselines and regularisers of SCST do to captions? One change at a time, any seeds.

    python benchmarks/rewards.py                                       the demo's corpus, other scenes for each seed
    python benchmarks/rewards.py --dataset flickr8k/packed --model runs/flickr8k/best_xe --seeds 0

All rows of a seed start from the same cross-entropy (XE) checkpoint: `--model`, or one that is trained first as
`difnet demo` or the recipe for the number of training images (`difnet_transformers/presets.py`) says; the options of
SCST come from there too. A row is `difnet train --stage scst` with the options that the last table names. Its best
checkpoint by CIDEr-D on the validation split captions another split: the demo's held-out test scenes, or `--split`. A
row whose reward collapses is marked, and its best checkpoint counts. A stopped study resumes with the same command;
finished rows are not run again. The table goes to the terminal and to benchmarks/results/.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import header, make_parser, markdown_table, results_path, write_report
from demo_study import FEW_SCENES, SHORT_TRAINING

from caption_metrics import score_captions
from difnet_transformers.checkpoints import load_captioner
from difnet_transformers.data import ReferenceBatches, load_packed_split
from difnet_transformers.demo.run import TRAINING, Demo
from difnet_transformers.demo.scenes import SPLIT_SIZES
from difnet_transformers.files import atomic_write, make_folder, read_json
from difnet_transformers.options import parse_options
from difnet_transformers.presets import option_words, preset_for
from difnet_transformers.reports.charts import Chart, Line, to_svg
from difnet_transformers.training import (
    DifnetSelfCriticalTrainer,
    RewardFailed,
    TrainingConfig,
    TrainingFailed,
    TrainingStopped,
)
from difnet_transformers.training.reward_functions import ends_badly, repeated_share
from modeling_difnet import original_beam_search

XE = "XE, where SCST starts"
ROWS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "end token in CIDEr-D": ("--rewards", "cider_d_eos"),
    "CIDEr-D + 0.5 bad endings": ("--rewards", "cider_d", "bad_endings=0.5"),
    "CIDEr-D + repeats": ("--rewards", "cider_d", "repeats"),
    "CIDEr-D + BLEU-4": ("--rewards", "cider_d", "bleu_4"),
    "ROUGE-L": ("--rewards", "rouge_l"),
    "samples, leave-one-out": ("--scst-samples", "sample"),
    "samples, greedy baseline": ("--scst-samples", "sample", "--scst-baseline", "greedy"),
    "samples, group": ("--scst-samples", "sample", "--scst-baseline", "group"),
    "plain + KL 0.05": ("--scst-kl-weight", "0.05"),
    "plain + entropy 0.01": ("--scst-entropy-weight", "0.01"),
    # For who looks further; not among the rows that are run by default.
    "beams, group": ("--scst-baseline", "group"),
    "document frequencies of images": ("--rewards", "cider_d_image"),
    "end token, samples": ("--rewards", "cider_d_eos", "--scst-samples", "sample"),
    "end token + KL 0.05": ("--rewards", "cider_d_eos", "--scst-kl-weight", "0.05"),
    "samples at temperature 0.8": ("--scst-samples", "sample", "--scst-temperature", "0.8"),
}
DEFAULT_ROWS = list(ROWS)[:11]
# What is drawn together, beside the plain row.
CHARTS = {"rewards": DEFAULT_ROWS[1:6], "baselines": DEFAULT_ROWS[6:9], "regularisers": DEFAULT_ROWS[9:11]}
CURVES = {
    "validation": ("CIDEr-D on the validation split", "after an epoch of SCST"),
    "train_bad_endings": ("share of decoded captions that end badly", "epoch of SCST"),
}
METRICS = {
    "cider_d": "CIDEr-D",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "caption_length": "length",
    "bad_endings": "bad endings",
    "unfinished": "unfinished",
    "repeats": "repeats",
    "words": "words",
}
SHARES = ("bad_endings", "unfinished", "repeats")
Results = dict[str, dict[int, dict[str, Any]]]


class Study:
    """The runs of one corpus in one folder.

    Args:
        folder: of the runs.
        dataset: packed dataset with the splits train and validation; `None` for the demo's corpus.
        models: the XE checkpoint of each seed, or one for all; empty to train them.
        vocab: vocab.json of XE checkpoints that are trained.
        split: what is captioned.
        more: further options of SCST in every row, such as "--scst-epochs 5".
        of_both: further options of XE and of SCST.
        quick: whether to take two steps a run.
        cpu: whether to train on the CPU even where there is a GPU.
    """

    def __init__(
        self,
        folder: Path,
        dataset: Path | None,
        models: Sequence[Path] = (),
        vocab: Path | None = None,
        split: str = "test",
        more: Sequence[str] = (),
        quick: bool = False,
        cpu: bool = False,
        of_both: Mapping[str, object] | None = None,
    ) -> None:
        self.folder, self.dataset, self.models, self.vocab = folder, dataset, list(models), vocab
        self.split, self.more, self.quick, self.cpu = split, list(more), quick, cpu
        if dataset is None:
            self.network: dict[str, Any] = {}
            training = TRAINING | SHORT_TRAINING if quick else TRAINING
            self.training = {f"--{name}": value for name, value in training.items()}
            self.num_images = sum((FEW_SCENES if quick else SPLIT_SIZES)[name] for name in ("train", "restval"))
        else:
            self.num_images = len(load_packed_split(dataset, "train"))
            preset = preset_for(self.num_images)
            self.network = dict(preset.network)
            self.training = dict(preset.training)
            if not models and vocab is None:
                self.training["--min-word-count"] = preset.min_word_count
        if quick:
            self.training |= {"--max-steps": 2, "--xe-epochs": 1, "--scst-epochs": 1, "--warmup-steps": 0}
            self.training.pop("--xe-patience", None)
        of_both = of_both or {}
        self.training |= of_both
        names = ("--scst", "--log", "--max-steps", *of_both)
        self.of_scst = {name: value for name, value in self.training.items() if name.startswith(names)}
        settings = {
            "dataset": None if dataset is None else str(dataset.resolve()),
            "models": [str(model.resolve()) for model in models],
            "vocab": None if vocab is None else str(vocab.resolve()),
            "split": split,
            "network": self.network,
            "training": self.training,
            "more": self.more,
            "quick": quick,
        }
        make_folder(folder)
        settings_file = folder / "settings.json"
        if settings_file.exists() and read_json(settings_file) != json.loads(json.dumps(settings)):
            sys.exit(f"{folder} holds a study with other settings; delete it, or choose another --output")
        atomic_write(settings_file, json.dumps(settings))

    def packed(self, seed: int) -> Path:
        """The packed dataset of a seed."""
        if self.dataset is not None:
            return self.dataset
        demo = Demo(self.folder / f"seed_{seed}" / "demo", seed, FEW_SCENES if self.quick else SPLIT_SIZES)
        if not demo.packed.exists():
            demo.draw()
            demo.pack()
        self.network = read_json(demo.output / "network.json")
        return demo.packed

    def start(self, number: int, seed: int) -> Path:
        """The XE checkpoint that the rows of a seed start from, given or trained."""
        if self.models:
            return self.models[min(number, len(self.models) - 1)]
        folder = self.folder / f"seed_{seed}" / "xe"
        if not (folder / "done.json").exists():
            packed = self.packed(seed)
            make_folder(folder)
            atomic_write(folder / "network.json", json.dumps(self.network))
            words = ["--stage", "xe", "--config", str(folder / "network.json")]
            words += ["--vocab", str(self.vocab)] if self.vocab else []
            words += map(str, option_words(self.training))
            self.train(packed, folder / "run", seed, words)
            atomic_write(folder / "done.json", "{}")
        return folder / "run" / "best"

    def train(self, packed: Path, run: Path, seed: int, words: Sequence[str]) -> str | None:
        """`difnet train`, begun or resumed; why it failed, if its reward or loss did."""
        words = ["--dataset", str(packed), "--output", str(run), "--seed", str(seed), *words]
        words += ["--report-to", "none"] if "--report-to" not in words else []
        words += ["--cpu"] if self.cpu else []
        words += ["--resume", "last"] if (run / "last").exists() else []
        print(f"$ difnet train {shlex.join(words)}", file=sys.stderr, flush=True)
        args = parse_options(TrainingConfig, words, prog="difnet train", description="")
        try:
            DifnetSelfCriticalTrainer(args=args).train()
        except TrainingStopped:
            sys.exit("stopped; the same command resumes")
        except RewardFailed:
            raise
        except TrainingFailed as error:
            print(error, file=sys.stderr)
            return str(error)
        return None

    def run(self, name: str, number: int, seed: int) -> dict[str, Any]:
        """Trains a row with a seed, and captions with its best checkpoint: all metrics, and the curve."""
        folder = self.folder / f"seed_{seed}" / "".join(letter if letter.isalnum() else "_" for letter in name)
        done = folder / "done.json"
        if done.exists():
            return read_json(done)
        start, packed = self.start(number, seed), self.packed(seed)
        if name == XE:
            result = self.caption(start, packed)
        else:
            words = ["--stage", "scst", "--model", str(start)]
            words += map(str, option_words(self.of_scst))
            failed = self.train(packed, folder / "run", seed, [*words, *self.more, *ROWS[name]])
            result = self.caption(folder / "run" / "best", packed)
            result |= {"failed": failed, **curve(folder / "run" / "log.jsonl", self.num_images)}
        make_folder(folder)
        atomic_write(done, json.dumps(result))
        return result

    @torch.no_grad()
    def caption(self, checkpoint: Path, packed: Path) -> dict[str, Any]:
        """All metrics of a checkpoint's captions of the split, decoded as the original does."""
        model, processor = load_captioner(checkpoint)
        device = torch.device("cuda" if torch.cuda.is_available() and not self.cpu else "cpu")
        model.to(device)
        tokenizer = processor.tokenizer
        padded = processor.feature_extractor.mask_padded_cells
        batches = ReferenceBatches(load_packed_split(packed, self.split), 50, mask_padded_cells=padded)
        length = min(20, model.config.max_position_embeddings)
        captions: list[str] = []
        decoded: list[str] = []
        references: list[list[str]] = []
        num_finished = 0
        for batch in batches:
            references += batch.pop("references")
            batch.pop("image_ids")
            features = {key: value.to(device) for key, value in batch.items()}
            sequences = model.generate(
                **features, custom_generate=original_beam_search, num_beams=5, max_new_tokens=length
            )  # (B, L)
            captions += processor.post_process_captions(sequences)
            decoded += tokenizer.decode_captions(sequences)  # here repeated words are not collapsed
            num_finished += int((sequences == tokenizer.eos_token_id).any(-1).sum())
        scores = score_captions(captions, references)
        number = len(captions)
        return {
            **{name: scores[name] for name in ("cider_d", "bleu_4", "rouge_l")},
            "caption_length": sum(len(caption.split()) for caption in decoded) / number,
            "bad_endings": sum(map(ends_badly, decoded)) / number,
            "unfinished": 1 - num_finished / number,
            "repeats": statistics.mean(repeated_share(caption.split()) for caption in decoded),
            "words": len({word for caption in decoded for word in caption.split()}),
            "images": number,
        }


def curve(log: Path, num_images: int) -> dict[str, Any]:
    """Of a run of SCST: validation CIDEr-D by epoch, from 0; bad endings of training by epoch; minutes of an epoch.

    Args:
        log: `log.jsonl`.
        num_images: training images.
    """
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if line["event"] == "train"]
    epochs = sorted({line["epoch"] for line in train})
    by_epoch = [[line for line in train if line["epoch"] == epoch] for epoch in epochs]
    return {
        "validation": [line["cider_d"] for line in lines if line["event"] == "validation"],
        **{
            f"train_{name}": [statistics.mean(line[name] for line in each) for each in by_epoch]
            for name in ("reward", "reward_spread", "bad_endings", "unfinished", "caption_length")
        },
        "minutes": num_images / statistics.median(line["images_per_second"] for line in train) / 60,
    }


def shown(name: str, value: float) -> str:
    """A metric as the table has it."""
    if name in SHARES:
        return f"{100 * value:.2f} %"
    return f"{value:.0f}" if name == "words" else f"{value:.2f}" if name == "caption_length" else f"{value:.4f}"


def report(results: Results, study: Study) -> list[str]:
    """The table of all rows, means over the seeds; each seed's CIDEr-D; and the validation curves.

    Args:
        results: metrics by row and seed.
        study: that they are of.
    """
    seeds = list(next(iter(results.values())))
    rows, curves, each_seed = [], [], []
    for name, of_seeds in results.items():
        values = list(of_seeds.values())
        means = [shown(metric, statistics.mean(value[metric] for value in values)) for metric in METRICS]
        minutes = [value["minutes"] for value in values if "minutes" in value]
        failed = sum(value.get("failed") is not None for value in values)
        label = f"{name} (collapsed in {failed} of {len(values)})" if failed else name
        rows.append([label, *means, f"{statistics.mean(minutes):.2f}" if minutes else ""])
        scores = [value["cider_d"] for value in values]
        spread = f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        each_seed.append([name, *(f"{score:.4f}" for score in scores), f"{statistics.mean(scores):.4f}", spread])
        if minutes:
            epochs = min(len(value["validation"]) for value in values)
            means_of_epochs = [
                statistics.mean(value["validation"][epoch] for value in values) for epoch in range(epochs)
            ]
            curves.append(f"- {name}: {', '.join(f'{mean:.3f}' for mean in means_of_epochs)}")
    options = [f"{name} {value}" for name, value in study.of_scst.items()]
    corpus = "the demo's corpus" if study.dataset is None else study.dataset.resolve().name
    number = next(iter(results[next(iter(results))].values()))["images"]
    notes = [
        f"{corpus}: {study.num_images:,} training images; metrics of {number:,} images of the split "
        f"{study.split} for the best checkpoint by CIDEr-D on the validation split, means over the seeds "
        f"{' '.join(map(str, seeds))}",
        f"every row: {' '.join([*options, *study.more])}",
        "bad endings: share of captions that end with a, of, with ..; unfinished: without an end; repeats: share of "
        "words that repeat their neighbour, or end a pair of words that came before; words: distinct words of all "
        "captions",
        "minutes: of an epoch of SCST, on this machine as busy as it was",
    ]
    device = "cpu" if study.cpu or not torch.cuda.is_available() else "cuda"
    command = "rewards.py" if study.dataset is None else f"rewards.py --dataset {study.dataset.name}"
    options_of_rows = [[name, f"`{' '.join(ROWS[name])}`" if ROWS[name] else ""] for name in results if name != XE]
    return [
        *header("Rewards, baselines and regularisers of SCST", command, device=torch.device(device), notes=notes),
        *markdown_table(["row", *METRICS.values(), "minutes"], rows),
        "",
        *markdown_table(
            ["CIDEr-D", *(f"seed {seed}" for seed in seeds), "mean", "standard deviation"],
            each_seed,
        ),
        "",
        "Validation CIDEr-D before SCST and after each epoch, means over the seeds:",
        "",
        *curves,
        "",
        *markdown_table(["row", "options of difnet train"], options_of_rows),
    ]


def write_charts(results: Results, folder: Path) -> None:
    """Curves by epoch, means over the seeds: `rewards_validation.svg` and so on, each beside the plain row.

    Args:
        results: metrics by row and seed.
        folder: for the files.
    """
    make_folder(folder)
    for group, names in CHARTS.items():
        for metric, (label, x_label) in CURVES.items():
            lines = []
            for name in ["plain", *names]:
                of_seeds = [value[metric] for value in results.get(name, {}).values()]
                points = [statistics.mean(values) for values in zip(*of_seeds, strict=False)]
                first = 0 if metric == "validation" else 1
                lines.append(Line(name, range(first, first + len(points)), points))
            if any(line.y for line in lines[1:]):
                chart = Chart(f"SCST with other {group}", x_label, label, lines)
                atomic_write(folder / f"{group}_{metric.removeprefix('train_')}.svg", to_svg(chart))


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", type=Path, help="packed dataset (default: the demo's corpus)")
    parser.add_argument(
        "--model", type=Path, nargs="+", default=[], help="XE checkpoint to start from, one or one a seed"
    )
    parser.add_argument("--vocab", type=Path, help="vocab.json, where XE is trained (default: made from the captions)")
    parser.add_argument("--split", help="what is captioned (default: test for the demo, validation for --dataset)")
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=DEFAULT_ROWS, help="default: the first eleven"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--more", nargs="+", default=[], metavar="NAME=VALUE", help="options of SCST in every row")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "difnet_rewards", help="runs")
    parser.add_argument("--table", type=Path, help="default: a dated file in benchmarks/results/")
    parser.add_argument("--charts", type=Path, metavar="FOLDER", help="draw curves by epoch, as SVG files")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="two steps a run: whether it runs, not what it finds")
    options = parser.parse_args(argv)
    more = [word for each in options.more for word in (f"--{each.partition('=')[0]}", each.partition("=")[2])]
    study = Study(
        options.output,
        options.dataset,
        options.model,
        options.vocab,
        options.split or ("test" if options.dataset is None else "validation"),
        more,
        options.quick,
        options.cpu,
    )
    results: Results = {name: {} for name in (XE, *options.rows)}
    device = "cpu" if options.cpu or not torch.cuda.is_available() else "cuda"
    table = options.table or results_path(
        "rewards", device, *([] if options.dataset is None else [options.dataset.parent.name])
    )
    # Seed by seed: a study that is stopped early has whole seeds.
    for number, seed in enumerate(options.seeds):
        for name in results:
            results[name][seed] = study.run(name, number, seed)
        write_report(report(results, study), table)
    if options.charts is not None:
        write_charts(results, options.charts)


if __name__ == "__main__":
    main()
