"""Does SCST gain on cross-entropy, and do two flows gain on one? Three seeds on the demo's corpus.

    python benchmarks/demo_study.py [--seeds 0 1 2] [--output FOLDER]

For each seed other scenes are drawn, and DIFNet and the paper's baseline (`--no-segmentation`) are trained on them
from scratch as `difnet demo` does, XE and then SCST. The table has CIDEr-D of the held-out test scenes for the best XE
checkpoint and for the best of all, both chosen on the validation scenes; it goes to the terminal and to
benchmarks/results/. It says where an expectation does not hold. A run takes two minutes; a stopped study resumes.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from common import header, make_parser, markdown_table, results_path, write_report

from difnet_transformers.demo.run import TRAINING, Demo
from difnet_transformers.demo.scenes import SPLIT_SIZES

FEW_SCENES = {"train": 30, "restval": 4, "validation": 4, "test": 5}
SHORT_TRAINING = {"warmup-steps": 10, "xe-epochs": 30, "xe-patience": 30, "scst-epochs": 1, "min-word-count": 1}
FORMS = {"two flows": ("run", ()), "baseline": ("run_baseline", ("--no-segmentation",))}


def study(folder: Path, seeds: list[int], quick: bool = False) -> dict[int, dict[str, dict[str, float]]]:
    """CIDEr-D by seed, form of the network and checkpoint.

    Args:
        folder: of the corpora and runs.
        seeds: one demo each.
        quick: whether to take few scenes and steps, which shows that everything works and no more.
    """
    sizes, training = (FEW_SCENES, TRAINING | SHORT_TRAINING) if quick else (SPLIT_SIZES, TRAINING)
    results: dict[int, dict[str, dict[str, float]]] = {}
    for seed in seeds:
        demo = Demo(folder / f"seed_{seed}", seed, sizes, training)
        demo.draw()
        demo.pack()
        results[seed] = {}
        for form, (run, options) in FORMS.items():
            demo.train(run, *options)
            evaluated = demo.evaluate(run)
            results[seed][form] = {name: result["scores"]["cider_d"] for name, result in evaluated.items()}
    return results


def report(results: dict[int, dict[str, dict[str, float]]], num_scenes: int) -> list[str]:
    """The table of what `study` returns, and in how many seeds each expectation holds."""
    columns = [(form, name) for form in FORMS for name in ("best_xe", "best")]
    scores = [[result[form][name] for form, name in columns] for result in results.values()]
    means = [statistics.mean(column) for column in zip(*scores, strict=True)]
    cells = [
        [label, *(f"{score:.3f}" for score in row)]
        for label, row in zip([*results, "mean"], [*scores, means], strict=True)
    ]
    notes = [
        f"CIDEr-D (0 to 10) of {num_scenes} held-out drawn scenes; every seed has its own scenes, weights and order",
        "numbers of drawn scenes cannot be compared with COCO's",
    ]
    lines = [
        *header(
            "The demo's corpus: XE and SCST, two flows and one",
            f"demo_study.py --seeds {' '.join(map(str, results))}",
            notes=notes,
        ),
        *markdown_table(["seed", "two flows, XE", "two flows, SCST", "baseline, XE", "baseline, SCST"], cells),
        "",
    ]
    expectations = {
        "SCST above the best XE checkpoint, two flows": (("two flows", "best"), ("two flows", "best_xe")),
        "SCST above the best XE checkpoint, baseline": (("baseline", "best"), ("baseline", "best_xe")),
        "two flows above the baseline, after XE": (("two flows", "best_xe"), ("baseline", "best_xe")),
        "two flows above the baseline, after SCST": (("two flows", "best"), ("baseline", "best")),
    }
    for text, ((form, name), (other_form, other_name)) in expectations.items():
        gains = [result[form][name] - result[other_form][other_name] for result in results.values()]
        holds = sum(gain > 0 for gain in gains)
        listed = ", ".join(f"{gain:+.3f}" for gain in gains)
        lines.append(f"- {text}: in {holds} of {len(gains)} seeds ({listed})")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--output", type=Path, default=Path(tempfile.gettempdir()) / "difnet_demo_study", help="for corpora and runs"
    )
    parser.add_argument(
        "--table", type=Path, help="where the table goes (default: a dated file in benchmarks/results/)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few scenes and steps: whether it runs, not what it finds"
    )
    options = parser.parse_args(argv)
    results = study(options.output, options.seeds, options.quick)
    num_scenes = (FEW_SCENES if options.quick else SPLIT_SIZES)["test"]
    write_report(report(results, num_scenes), options.table or results_path("demo_study", "cpu"))


if __name__ == "__main__":
    main()
