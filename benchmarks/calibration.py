"""Do confidences tell wrong words from right ones, and are they true frequencies? On the demo, and on photographs.

    make demo
    python benchmarks/calibration.py --demos demo_output
    python benchmarks/calibration.py --demos runs/seed_0/demo .. --checkpoints runs/seed_0/plain/run/best .. \\
        --photographs flickr8k_packed --models T0/best T1/best

Of the demo's scenes it is known which objects and colors they have, so a noun or a color is right or wrong; the five
reference captions of an image give a second truth, the only one that photographs have: a word is right if a caption
has it. Calibrations are fitted to the demo's validation scenes and measured on its test scenes; of photographs they
are fitted to one half of a split and measured on the other. Beside what `difnet calibrate` fits stand the model's own
probability, the same with temperature scaling (Guo et al., 2017; one number, on the log-odds) and with an isotonic
regression.

AUROC is the probability that a right word has a higher confidence than a wrong one, ECE the expected calibration error
in ten bins. Captions are ordered by their confidence or by another number, and the surest half is held against all
of them. `--charts FOLDER` draws risk against coverage, and reliability.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import ROOT, header, make_parser, markdown_table, write_report
from datasets import Dataset
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from difnet_transformers.checkpoints import load_captioner
from difnet_transformers.data import ReferenceBatches, load_packed_split
from difnet_transformers.demo.corpus import word_truth
from difnet_transformers.demo.scenes import make_scenes
from difnet_transformers.evaluation.calibration import (
    JudgedCaptions,
    WordTruth,
    fit_calibration,
    judge_captions,
    metrics_of,
    risk_coverage,
)
from difnet_transformers.files import atomic_write, read_json
from difnet_transformers.reports.charts import Chart, Line, to_svg
from modeling_difnet import DifnetForConditionalGeneration, original_beam_search
from modeling_difnet.confidence_difnet import generate_with_confidences

NUM_BEAMS = 5
COVERAGES = [round(0.05 * number, 2) for number in range(1, 21)]
WORD_METRICS = ("auroc", "expected_calibration_error")
OURS = "difnet calibrate"
ORDERS = {OURS: OURS, "mean log-probability": "mean_log_prob", "score": "score", "agreement": "agreement"}


class Measured(NamedTuple):
    """Confidences of words that were not fitted to.

    Args:
        confidences: by method, (words,) each.
        labels: whether the words are right, (words,).
        is_judged: whether a word can be wrong at all, (words,); with reference captions every word can.
        of_captions: by order of `ORDERS`, (captions,) each.
        is_right: whether all words of a caption are right, (captions,).
        cider_d: (captions,).
    """

    confidences: dict[str, np.ndarray]
    labels: np.ndarray
    is_judged: np.ndarray
    of_captions: dict[str, np.ndarray]
    is_right: np.ndarray
    cider_d: np.ndarray


def log_probs_of(judged: JudgedCaptions) -> np.ndarray:
    return np.array([word.log_prob for caption in judged.captions for word in caption.words])


def log_odds(log_probs: np.ndarray) -> np.ndarray:
    return (log_probs - np.log(np.maximum(-np.expm1(log_probs), 1e-6)))[:, None]


def measure(fitted_to: JudgedCaptions, others: JudgedCaptions, truth: WordTruth | None = None) -> Measured:
    """Fits every method to some captions and applies it to others, which were judged by the same truth."""
    known, asked, labels = log_probs_of(fitted_to), log_probs_of(others), fitted_to.labels()
    temperature = LogisticRegression(fit_intercept=False, C=1e6).fit(log_odds(known), labels)
    isotonic = IsotonicRegression(out_of_bounds="clip").fit(known, labels)
    calibration = fit_calibration(fitted_to, NUM_BEAMS)
    captions = {OURS: others.caption_confidences(calibration)}
    for name in ("mean_log_prob", "score", "agreement"):
        captions[name] = np.array([getattr(each, name) for each in others.captions])
    return Measured(
        {
            "probability": np.exp(asked),
            "temperature scaling": temperature.predict_proba(log_odds(asked))[:, 1],
            "isotonic regression": isotonic.predict(asked),
            OURS: others.confidences(calibration),
        },
        others.labels(),
        np.array([truth is None or word.word in truth.judged for each in others.captions for word in each.words]),
        {order: captions[name] for order, name in ORDERS.items()},
        np.array([all(right) for right in others.is_right]),
        np.array(others.cider_d),
    )


def seconds_of(generate: Callable[[], object]) -> float:
    start = time.process_time()  # which other programs on the machine do not lengthen
    generate()
    return time.process_time() - start


@torch.no_grad()
def cost_of_confidences(model: DifnetForConditionalGeneration, images: Dataset) -> float:
    """Processor time with confidences divided by that of captions alone, 50 images at once: the median of pairs."""
    batch = next(iter(ReferenceBatches(images, 50)))
    features = {name: value.to(model.dtype) for name, value in batch.items() if torch.is_tensor(value)}
    options = {"custom_generate": original_beam_search, "num_beams": NUM_BEAMS, "max_new_tokens": 20}
    words_of = [str(index) for index in range(model.config.vocab_size)]
    both: tuple[Callable[[], object], ...] = (
        lambda: generate_with_confidences(model, words_of, features, options),
        lambda: model.generate(**features, **options),
    )
    for generate in both:
        generate()
    return statistics.median(seconds_of(both[0]) / seconds_of(both[1]) for _ in range(7))


# The two corpora


def measure_demo(demo: Path, checkpoint: Path) -> dict[str, Measured]:
    """The demo's test scenes by kind of truth."""
    settings = read_json(demo / "settings.json")
    content = word_truth(make_scenes(settings["seed"], settings["sizes"]))
    truths = {
        "known objects and colors": WordTruth(
            frozenset(content["judged"]), {int(key): frozenset(words) for key, words in content["true"].items()}
        ),
        "reference captions": None,
    }
    model, processor = load_captioner(checkpoint, torch.float32)
    splits = {split: load_packed_split(demo / "packed", split) for split in ("validation", "test")}
    found = {}
    for name, truth in truths.items():
        judged = [judge_captions(model, processor, images, truth, num_beams=NUM_BEAMS) for images in splits.values()]
        found[name] = measure(*judged, truth)
    return found


def measure_photographs(packed: Path, split: str, checkpoint: Path) -> tuple[Measured, float]:
    """One half of a split, after fitting to the other, and the cost of confidences."""
    images = load_packed_split(packed, split)
    model, processor = load_captioner(checkpoint, torch.float32)
    judged = judge_captions(model, processor, images, num_beams=NUM_BEAMS)
    order = np.random.default_rng(0).permutation(len(images))
    half = len(order) // 2
    cost = cost_of_confidences(model, images)
    return measure(judged.rows(order[:half].tolist()), judged.rows(order[half:].tolist())), cost


# Tables and charts


def spread(values: Sequence[float]) -> str:
    """Mean and range over models."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def word_rows(measured: Sequence[Measured]) -> Iterable[list[str]]:
    """A line for each method: AUROC and ECE of all words, and of those that can be wrong."""
    for method in measured[0].confidences:
        cells = [method]
        for masks in ([np.ones_like(each.is_judged) for each in measured], [each.is_judged for each in measured]):
            metrics = [
                metrics_of(each.confidences[method][mask], each.labels[mask], each.of_captions[OURS], each.cider_d)
                for each, mask in zip(measured, masks, strict=True)
            ]
            cells += [spread([float(each[name] or 0) for each in metrics]) for name in WORD_METRICS]
        yield cells if not all(each.is_judged.all() for each in measured) else cells[:3]


def word_table(measured: Sequence[Measured]) -> list[str]:
    rows = list(word_rows(measured))
    columns = ["confidence of a word", "AUROC", "ECE", "AUROC, nouns and colors", "ECE, nouns and colors"]
    return markdown_table(columns[: len(rows[0])], rows)


def caption_rows(measured: Sequence[Measured], with_truth: bool) -> Iterable[list[str]]:
    """A line for each order of captions: the surest half beside all."""
    for order in ORDERS:
        cells = [order]
        if with_truth:
            risks = [1.0 - each.is_right for each in measured]
            halves = [
                risk_coverage(each.of_captions[order], risk, (0.5,))[0]
                for each, risk in zip(measured, risks, strict=True)
            ]
            cells += [spread([risk.mean() for risk in risks]), spread(halves)]
        cells.append(spread([each.cider_d.mean() for each in measured]))
        cells.append(spread([risk_coverage(each.of_captions[order], each.cider_d, (0.5,))[0] for each in measured]))
        yield cells


def coverage_chart(
    title: str, y_label: str, measured: Sequence[Measured], score: Callable[[Measured], np.ndarray]
) -> Chart:
    """Mean over models of a score of the captions that are kept, by the order in which captions are kept."""
    lines = []
    for order in ORDERS:
        curves = [risk_coverage(each.of_captions[order], score(each), COVERAGES) for each in measured]
        lines.append(Line(order, COVERAGES, np.mean(curves, axis=0).tolist()))
    return Chart(title, "share of the captions that are kept, the surest first", y_label, lines)


def reliability_chart(title: str, measured: Sequence[Measured]) -> Chart:
    """How often words are right, by their confidence in ten bins; of all models together."""
    labels = np.concatenate([each.labels for each in measured])
    lines = [Line("as it should be", [0, 1], [0, 1], "#8a8f98")]
    for method in ("probability", "temperature scaling", OURS):
        confidences = np.concatenate([each.confidences[method] for each in measured])
        bins = np.minimum((confidences * 10).astype(int), 9)
        filled = [each for each in np.unique(bins) if (bins == each).sum() >= 20]  # means of a few words are noise
        x = [float(confidences[bins == each].mean()) for each in filled]
        lines.append(Line(method, x, [float(labels[bins == each].mean()) for each in filled]))
    return Chart(title, "confidence of the word", "share of the words that are right", lines)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--demos", type=Path, nargs="+", default=[ROOT / "demo_output"], help="folders of difnet demo")
    parser.add_argument("--checkpoints", type=Path, nargs="+", help="of the demos (default: run/best of each)")
    parser.add_argument("--photographs", type=Path, help="packed dataset of photographs")
    parser.add_argument("--split", default="validation", help="of --photographs")
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="checkpoints that caption --photographs")
    parser.add_argument("--charts", type=Path, help="folder of the charts")
    parser.add_argument("--output", type=Path, help="write the table there, too")
    options = parser.parse_args(argv)
    checkpoints = options.checkpoints or [demo / "run" / "best" for demo in options.demos]
    if len(checkpoints) != len(options.demos) or bool(options.models) != (options.photographs is not None):
        parser.error("--checkpoints needs one for each of --demos, and --models and --photographs go together")

    demos = [measure_demo(demo, checkpoint) for demo, checkpoint in zip(options.demos, checkpoints, strict=True)]
    words = " ".join(sys.argv[1:] if argv is None else argv)
    lines = header("Confidences of words and captions", f"calibration.py {words}")
    charts = {}
    for truth in demos[0]:
        measured = [demo[truth] for demo in demos]
        number = sum(len(each.labels) for each in measured)
        wrong = 1 - sum(each.labels.sum() for each in measured) / number
        lines += ["", f"## The demo's test scenes: {truth}", ""]
        lines += [f"{len(measured)} models, {number:,} words, {wrong:.1%} of them wrong.", ""]
        lines += word_table(measured)
        lines += ["", "Captions with a wrong word, and CIDEr-D, of all captions and of the surest half:", ""]
        columns = ["order of captions", "wrong, all", "wrong, half", "CIDEr-D, all", "CIDEr-D, half"]
        lines += markdown_table(columns, caption_rows(measured, with_truth=True))
    known = [demo["known objects and colors"] for demo in demos]
    charts["risk_coverage"] = coverage_chart(
        "Captions with a wrong word", "share of the kept captions", known, lambda each: 1.0 - each.is_right
    )
    charts["calibration"] = reliability_chart("Are words as often right as they should be?", known)
    if options.photographs is not None:
        found = [measure_photographs(options.photographs, options.split, model) for model in options.models]
        measured = [each for each, _ in found]
        number = sum(len(each.labels) for each in measured)
        wrong = 1 - sum(each.labels.sum() for each in measured) / number
        lines += ["", f"## Photographs, half of {options.split}: reference captions", ""]
        lines += [f"{len(measured)} models, {number:,} words, {wrong:.1%} of them wrong.", ""]
        lines += word_table(measured)
        lines += ["", "CIDEr-D of all captions and of the surest half:", ""]
        lines += markdown_table(
            ["order of captions", "CIDEr-D, all", "CIDEr-D, half"], caption_rows(measured, with_truth=False)
        )
        cost = spread([each for _, each in found])
        lines += [
            "",
            f"Captions with confidences take {cost} times the processor time of captions alone (50 images, 5 beams).",
        ]
        charts["risk_coverage_photographs"] = coverage_chart(
            "CIDEr-D of photographs' captions", "CIDEr-D of the kept captions", measured, lambda each: each.cider_d
        )
    for name, chart in charts.items() if options.charts is not None else ():
        atomic_write(options.charts / f"{name}.svg", to_svg(chart))
    write_report(lines, options.output)


if __name__ == "__main__":
    main()
