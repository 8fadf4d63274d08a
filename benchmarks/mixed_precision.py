"""What does bfloat16 do to a training? The same recipe in float32 and under bf16 autocast, both stages, any seeds.

    python benchmarks/mixed_precision.py                                         the demo's corpus
    python benchmarks/mixed_precision.py --dataset flickr8k/packed --vocab flickr8k/vocab.json --seeds 0

Each run is `difnet train` from the first step of cross-entropy (XE) to the last of self-critical training (SCST), with
the options of `difnet demo`, or of the recipe for the number of training images (`difnet_transformers/presets.py`).
Only `--mixed-precision` differs. Both checkpoints of a run, chosen by CIDEr-D on the validation split, caption another
split of the demo, or `--split`, in float32. A stopped study resumes with the same command. The table goes to the
terminal and to benchmarks/results/.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from common import header, make_parser, markdown_table, results_path, write_report
from rewards import XE, Study

from difnet_transformers.files import atomic_write, make_folder
from difnet_transformers.reports.charts import Chart, Line, to_svg

PRECISIONS = {"float32": "no", "bfloat16": "bf16"}
STAGES = {"XE": XE, "SCST": "plain"}
METRICS = {"cider_d": "CIDEr-D", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L", "bad_endings": "bad endings"}
Runs = dict[int, dict[str, dict[str, Any]]]
"""By seed and precision: the metrics of both stages' checkpoints, and the curve."""


def curve_of(log: Path) -> list[float]:
    """Validation CIDEr-D after each epoch.

    Args:
        log: `log.jsonl` of a run.
    """
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [line["cider_d"] for line in lines if line["event"] == "validation"]


def captions_per_second(log: Path) -> float:
    """Median of the images per second that a run's log has, as busy as the machine was."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return statistics.median(line["images_per_second"] for line in lines if line["event"] == "train")


def run(study: Study, number: int, seed: int) -> dict[str, Any]:
    """Trains both stages with a seed; what `Runs` has of it."""
    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate keeps a process's first precision
    found: dict[str, Any] = {stage: study.run(row, number, seed) for stage, row in STAGES.items()}
    logs = [study.folder / f"seed_{seed}" / name / "run" / "log.jsonl" for name in ("xe", STAGES["SCST"])]
    # SCST validates once before its first step: that is the end of XE.
    found["curve"] = curve_of(logs[0]) + curve_of(logs[1])[1:]
    found["xe_epochs"] = len(curve_of(logs[0]))
    found["images_per_second"] = [captions_per_second(log) for log in logs]
    return found


def report(runs: Runs, study: Study) -> list[str]:
    """The tables of what `run` returns.

    Args:
        runs: by seed and precision.
        study: any of the two.
    """
    rows, differences, speed = [], [], []
    for stage in STAGES:
        for precision in PRECISIONS:
            of_seeds = [found[precision][stage] for found in runs.values()]
            scores = [result["cider_d"] for result in of_seeds]
            means = [statistics.mean(result[name] for result in of_seeds) for name in METRICS]
            spread = f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
            shown = [f"{mean:.4f}" for mean in means[:-1]] + [f"{100 * means[-1]:.2f} %"]
            rows.append([stage, precision, *(f"{score:.4f}" for score in scores), *shown, spread])
        gains = [found["bfloat16"][stage]["cider_d"] - found["float32"][stage]["cider_d"] for found in runs.values()]
        text = f"{stage}: bfloat16 - float32 in CIDEr-D {', '.join(f'{gain:+.4f}' for gain in gains)}"
        if len(gains) > 1:
            error = statistics.stdev(gains) / len(gains) ** 0.5
            text += f"; mean {statistics.mean(gains):+.4f}, standard error {error:.4f}"
        differences.append(f"- {text}")
    for precision in PRECISIONS:
        xe, scst = (
            statistics.mean(found[precision]["images_per_second"][i] for found in runs.values()) for i in (0, 1)
        )
        speed.append(f"- {precision}: {xe:.1f} and {scst:.1f}")
    corpus = "the demo's corpus" if study.dataset is None else study.dataset.resolve().name
    number = next(iter(runs.values()))["float32"]["XE"]["images"]
    notes = [
        f"{corpus}: {study.num_images:,} training images; metrics of {number:,} images of the split {study.split}",
        "float32 is `--mixed-precision no`, bfloat16 `--mixed-precision bf16`; the captions are decoded in float32",
    ]
    device = torch.device("cpu" if study.cpu or not torch.cuda.is_available() else "cuda")
    command = "mixed_precision.py" if study.dataset is None else f"mixed_precision.py --dataset {study.dataset.name}"
    columns = ["checkpoint of", "trained in", *(f"CIDEr-D, seed {seed}" for seed in runs)]
    columns += [f"{label}, mean" for label in METRICS.values()] + ["standard deviation of CIDEr-D"]
    return [
        *header("What bfloat16 does to a training", command, device=device, notes=notes),
        *markdown_table(columns, rows),
        "",
        *differences,
        "",
        "Images per second in XE and SCST, on this machine as busy as it was:",
        "",
        *speed,
    ]


def write_chart(runs: Runs, path: Path) -> None:
    """Validation CIDEr-D by epoch, means over the seeds.

    Args:
        runs: by seed and precision.
        path: of the SVG file.
    """
    lines = []
    for precision in PRECISIONS:
        curves = [found[precision]["curve"] for found in runs.values()]
        points = [statistics.mean(values) for values in zip(*curves, strict=False)]
        lines.append(Line(precision, range(1, len(points) + 1), points))
    make_folder(path.parent)
    label = "CIDEr-D on the validation split"
    atomic_write(path, to_svg(Chart("XE and then SCST, in two precisions", "epoch", label, lines)))


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", type=Path, help="packed dataset (default: the demo's corpus)")
    parser.add_argument("--vocab", type=Path, help="vocab.json (default: made from the captions)")
    parser.add_argument("--split", help="what is captioned (default: test for the demo, validation for --dataset)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "difnet_precision", help="runs")
    parser.add_argument("--table", type=Path, help="default: a dated file in benchmarks/results/")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the curves, as an SVG file")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="two steps a run: whether it runs, not what it finds")
    options = parser.parse_args(argv)
    split = options.split or ("test" if options.dataset is None else "validation")
    studies = {
        precision: Study(
            options.output / precision,
            options.dataset,
            vocab=options.vocab,
            split=split,
            quick=options.quick,
            cpu=options.cpu,
            of_both={"--mixed-precision": word},
        )
        for precision, word in PRECISIONS.items()
    }
    device = "cpu" if options.cpu or not torch.cuda.is_available() else "cuda"
    corpus = [] if options.dataset is None else [options.dataset.parent.name]
    table = options.table or results_path("mixed_precision", device, *corpus)
    runs: Runs = {}
    for number, seed in enumerate(options.seeds):
        runs[seed] = {precision: run(study, number, seed) for precision, study in studies.items()}
        write_report(report(runs, studies["float32"]), table)
    if options.chart is not None:
        write_chart(runs, options.chart)


if __name__ == "__main__":
    main()
