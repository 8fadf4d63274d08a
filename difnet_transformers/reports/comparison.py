"""The page and the JSON file of `difnet compare`, and the same of one system for `difnet evaluate --report`.

Scores with intervals and tests, wins and losses by kinds of images, and the images where two systems differ most. The
original (mrwu-mac/DIFNet, CVPR 2022) has no such page.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caption_metrics import Chair, ExtraMetrics, JavaMissing, check_java, score_captions

from ..data.image_files import find_images
from ..evaluation.comparison import (
    Comparison,
    Difference,
    Estimate,
    Group,
    compare_systems,
    groups_by_value,
    image_statistics,
    make_group,
)
from ..evaluation.extra_scores import json_number
from ..evaluation.systems import SplitReferences, System, common_images
from ..files import atomic_write, printable
from ..model_card import METRICS

LABELS = {name: label for name, (_, label) in METRICS.items()} | {
    "caption_length": "words per caption",
    "novel_captions": "novel captions",
    "chair_s": "CHAIR-s",
    "chair_i": "CHAIR-i",
    "clip_score": "CLIPScore",
    "ref_clip_score": "RefCLIPScore",
}
LOWER_IS_BETTER = {"chair_s", "chair_i"}
FEW_IMAGES = 30
MANY_PAIRS = 3  # of which the page shows each when it is asked to
NEITHER_IS_BETTER = {"caption_length", "novel_captions"}


@dataclass(frozen=True)
class ShownCaption:
    """A caption of a system on the page, with its CIDEr-D and the words of objects that are not in the image."""

    system: str
    caption: str
    cider_d: float
    hallucinated: Sequence[str] = ()


@dataclass(frozen=True)
class ShownImage:
    """An image of the page, with the captions of the systems that are compared, and its references."""

    image_id: str
    captions: Sequence[ShownCaption]
    references: Sequence[str]
    image: Path | None = None


@dataclass(frozen=True)
class GroupTable:
    """Groups of images of one kind, such as by the length of their references."""

    title: str
    note: str
    groups: Sequence[Group]


@dataclass(frozen=True)
class Pair:
    """Two systems in detail; `first` alone on the page of one system, whose `second` is None."""

    first: str
    second: str | None
    total: Group
    tables: Sequence[GroupTable]
    classes: Sequence[tuple[Group, Sequence[float]]]
    images: Mapping[str, Sequence[ShownImage]]
    differences: Sequence[Difference] = ()


@dataclass(frozen=True)
class ComparisonReport:
    """All that page and file say."""

    title: str
    split: str
    comparison: Comparison
    descriptions: Sequence[tuple[str, Sequence[float]]]
    pairs: Sequence[Pair]
    warnings: Sequence[str]
    images: Sequence[str]
    cider_d: np.ndarray


def compare(
    systems: Sequence[System],
    split: SplitReferences,
    *,
    metrics: ExtraMetrics | None = None,
    with_spice: bool = False,
    paths: Mapping[str, Path] | None = None,
    examples: int = 6,
    resamples: int = 10_000,
    seed: int = 0,
) -> ComparisonReport:
    """Compares systems on the images that all of them have captions of.

    Args:
        systems: one or more.
        split: the references.
        metrics: further metrics.
        with_spice: whether SPICE and SPIDEr are compared too.
        paths: image files by image id, for the page.
        examples: images on the page for each side of a pair.
        resamples: of bootstrap and permutation test.
        seed: of their random numbers.

    Raises:
        ValueError: systems and references do not go together, or Java is missing.
    """
    images, warnings = common_images(systems, split)
    references = [split.references[image] for image in images]
    captions = [[system.captions[image] for image in images] for system in systems]
    try:
        check_java(False, with_spice)
    except JavaMissing as error:
        raise ValueError(str(error)) from error
    scores = [
        score_captions(each, references, with_spice=with_spice, per_image=True)["per_image"] for each in captions
    ]
    found = [(metrics or ExtraMetrics()).score(images, each, references) for each in captions]
    names = [name for name in scores[0] if not name.startswith("bleu")]
    per_image = {name: np.array([each[name] for each in scores]) for name in names}
    for name in found[0].per_image:
        if name in LABELS and not name.startswith("chair"):
            per_image[name] = np.stack([each.per_image[name] for each in found])
    chairs = [each.chair for each in found if each.chair is not None]
    statistics = image_statistics(captions, references, per_image, chairs)
    comparison = compare_systems([system.name for system in systems], statistics, resamples=resamples, seed=seed)
    described = [
        (label, [each.corpus[name] for each in found])
        for name, label in (
            ("vocabulary_size", "different words"),
            ("distinct_1", "distinct-1"),
            ("distinct_2", "distinct-2"),
            ("object_recall", "recall of objects, mean of classes"),
        )
        if name in found[0].corpus
    ]
    data = _Data(images, references, captions, per_image["cider_d"], chairs, systems, metrics, paths or {})
    places = list(itertools.combinations(range(len(systems)), 2)) or [(0, 0)]
    pairs = [_pair(data, comparison, first, second, examples) for first, second in places]
    names = [system.name for system in systems]
    title = f"{names[0]}: evaluation" if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} compared"
    return ComparisonReport(
        title,
        split.name,
        comparison,
        described,
        pairs,
        [*warnings, *caption_warnings(systems, captions), *noise_warnings(comparison)],
        images,
        per_image["cider_d"],
    )


def caption_warnings(systems: Sequence[System], captions: Sequence[Sequence[str]]) -> list[str]:
    """Warnings about systems without words, and about too few images."""
    warnings = []
    for system, each in zip(systems, captions, strict=True):
        if empty := sum(not any(map(str.isalnum, caption)) for caption in each):
            warnings.append(f"{empty:,} of {len(each):,} captions of {system.name} have no words.")
    if len(captions[0]) < FEW_IMAGES:
        warnings.append(
            f"So few images ({len(captions[0])}) say little: intervals of fewer than {FEW_IMAGES} are too narrow."
        )
    return warnings


def _is_noise(difference: Difference) -> bool:
    """Whether there is a difference that means nothing."""
    return difference.within_noise and difference.difference != 0


def noise_warnings(comparison: Comparison) -> list[str]:
    """A warning for each pair of systems with differences within noise."""
    warnings = []
    pairs = list(dict.fromkeys((each.first, each.second) for each in comparison.differences))
    if len(pairs) > MANY_PAIRS:
        noise = [each for each in comparison.differences if each.metric == "cider_d" and _is_noise(each)]
        said = "; ".join(f"{each.second} against {each.first} ({each.difference:+.3f})" for each in noise)
        return [f"Within noise in CIDEr-D, {len(noise)} of {len(pairs)} pairs: {said}."] if noise else []
    for first, second in pairs:
        noise = [
            each for each in comparison.differences if (each.first, each.second) == (first, second) and _is_noise(each)
        ]
        if noise:
            said = ", ".join(f"{LABELS[each.metric]} ({each.difference:+.3f})" for each in noise)
            warnings.append(
                f"Within noise: {second} against {first} in {said}. The {100 * comparison.confidence:.0f} % intervals "
                f"of these differences include 0, or p is above {1 - comparison.confidence:.2f}: on these images "
                "neither is shown to be better."
            )
    return warnings


@dataclass(frozen=True)
class _Data:
    images: Sequence[str]
    references: Sequence[Sequence[str]]
    captions: Sequence[Sequence[str]]
    cider_d: np.ndarray
    chairs: Sequence[Chair]
    systems: Sequence[System]
    metrics: ExtraMetrics | None
    paths: Mapping[str, Path]


def _pair(data: _Data, comparison: Comparison, first: int, second: int, examples: int) -> Pair:
    scores = data.cider_d[[first, second]] if first != second else data.cider_d[[first]]
    places = dict.fromkeys((first, second))
    one, other = data.systems[first].name, data.systems[second].name
    differences = scores[-1] - scores[0]
    order = np.argsort(-differences if first != second else -scores[0], kind="stable")
    best = [place for place in order[:examples] if first == second or differences[place] > 0]
    rest = order[::-1][: min(examples, len(order) - len(best))]
    worst = [place for place in rest if first == second or differences[place] < 0]
    titles = (
        ("Best captions", "Worst captions") if first == second else (f"{other} is far better", f"{one} is far better")
    )
    return Pair(
        one,
        None if first == second else other,
        make_group("all images", scores, np.arange(len(data.images))),
        _tables(data, scores, first, second),
        _classes(data, scores, list(places)),
        {
            title: [_shown(data, place, list(places)) for place in chosen]
            for title, chosen in zip(titles, (best, worst), strict=True)
            if len(chosen)
        },
        [each for each in comparison.differences if (each.first, each.second) == (one, other)],
    )


def _tables(data: _Data, scores: np.ndarray, first: int, second: int) -> list[GroupTable]:
    lengths = np.array([np.mean([len(caption.split()) for caption in group]) for group in data.references])
    tables = [
        GroupTable(
            "By length of the reference captions",
            "Mean words of an image's references; about a quarter of the images each.",
            groups_by_value(lengths, scores, lambda low, high: f"{low:.1f} to {high:.1f} words"),
        )
    ]
    words = [np.array([len(caption.split()) for caption in each]) for each in data.captions]
    if first == second:
        table = groups_by_value(words[first].astype(np.float64), scores, lambda low, high: _range(low, high, "words"))
        tables.append(GroupTable("By length of the caption", "", table))
    else:
        one, other = data.systems[first].name, data.systems[second].name
        longer = words[second] - words[first]
        kinds = {f"{other} is shorter": longer < 0, "equally long": longer == 0, f"{other} is longer": longer > 0}
        table = [make_group(name, scores, members) for name, members in kinds.items() if members.any()]
        tables.append(GroupTable("By length of the captions", f"Words of {other} against {one}.", table))
    for place in dict.fromkeys((first, second)):
        system = data.systems[place]
        confidence = np.array([system.confidence.get(image, np.nan) for image in data.images])
        if np.isfinite(confidence).any():
            groups = groups_by_value(confidence, scores, lambda low, high: f"{_number(low)} to {_number(high)}")
            # Log-probabilities stand in where a file has no confidences.
            is_log = bool(np.nanmax(confidence) <= 0)
            note = "Mean log-probability of a caption's tokens." if is_log else "As its results file states it."
            tables.append(GroupTable(f"By confidence of {system.name}", note, groups))
    return tables


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _range(low: float, high: float, unit: str) -> str:
    return f"{low:.0f} {unit}" if low == high else f"{low:.0f} to {high:.0f} {unit}"


def _classes(data: _Data, scores: np.ndarray, places: Sequence[int]) -> list[tuple[Group, list[float]]]:
    """Groups by annotated class with each system's recall of it, the most frequent class first."""
    if not data.chairs or data.metrics is None or data.metrics.objects is None:
        return []
    members: dict[str, list[int]] = {}
    for position, image in enumerate(data.images):
        for name in {data.metrics.words.class_of(each) or each for each in data.metrics.objects[image]}:
            members.setdefault(name, []).append(position)
    ordered = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        (
            make_group(name, scores, np.array(positions)),
            [data.chairs[place].classes[name].recall for place in places],
        )
        for name, positions in ordered
    ]


def _shown(data: _Data, position: int, places: Sequence[int]) -> ShownImage:
    image = data.images[position]
    captions = [
        ShownCaption(
            data.systems[place].name,
            data.captions[place][position],
            float(data.cider_d[place, position]),
            data.chairs[place].hallucinated[position] if data.chairs else (),
        )
        for place in places
    ]
    return ShownImage(image, captions, data.references[position], data.paths.get(image))


# The page


@dataclass(frozen=True)
class MetricRow:
    """A row of the table of scores."""

    label: str
    note: str
    estimates: Sequence[Estimate]


@dataclass(frozen=True)
class DifferenceRow:
    """A row of the table of differences.

    Args:
        low, high, middle: places in percent of a bar whose middle is 0.
        verdict: what the difference means.
        better: the system that is better, "first" or "second", or nothing where none is.
    """

    label: str
    note: str
    difference: Difference
    low: float
    high: float
    middle: float
    verdict: str
    better: str


def metric_rows(comparison: Comparison) -> list[MetricRow]:
    """Scores of all systems by metric."""
    return [
        MetricRow(
            LABELS[metric], metric_note(metric), [comparison.estimate(name, metric) for name in comparison.systems]
        )
        for metric in dict.fromkeys(each.metric for each in comparison.estimates)
    ]


def metric_note(metric: str) -> str:
    """What a reader must know of a metric's direction."""
    if metric in LOWER_IS_BETTER:
        return "lower is better"
    return "neither is better" if metric in NEITHER_IS_BETTER else ""


def difference_row(difference: Difference) -> DifferenceRow:
    """A difference with its bar and what it means."""
    reach = max(abs(difference.low), abs(difference.high), abs(difference.difference)) * 1.1 or 1.0
    if not math.isfinite(reach):
        reach = 1.0
    low, high, middle = (50 + 50 * value / reach for value in (difference.low, difference.high, difference.difference))
    better = ""
    if difference.within_noise or math.isnan(difference.low):
        verdict = "within noise"
    elif difference.metric in NEITHER_IS_BETTER:
        verdict = "differs"
    else:
        second_wins = (difference.difference > 0) != (difference.metric in LOWER_IS_BETTER)
        better = "second" if second_wins else "first"
        verdict = f"{getattr(difference, better)} is better"
    return DifferenceRow(
        LABELS[difference.metric], metric_note(difference.metric), difference, low, high, middle, verdict, better
    )


def check_page(page: Path, images: Sequence[Path] = ()) -> None:
    """To be called before the work that a page is of.

    Args:
        page: to be written.
        images: image files, or folders of them, for it.

    Raises:
        IsADirectoryError: a folder is in the place of the page.
        ImportError: a package is missing that makes pages.
        ValueError: an image or a folder of images does not exist, or a folder has none.
    """
    from . import pages  # noqa: F401

    if page.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, where a file is to be written", str(page))
    if images:
        find_images(map(str, images))


def comparison_page(report: ComparisonReport) -> str:
    """The page: one HTML file that needs no network."""
    from .pages import render

    return render(
        "comparison.html.j2",
        title=report.title,
        warnings=report.warnings,
        report=report,
        comparison=report.comparison,
        rows=metric_rows(report.comparison),
        pairs=[(pair, [difference_row(each) for each in pair.differences]) for pair in report.pairs],
        many_pairs=MANY_PAIRS,
        isnan=math.isnan,
    )


def comparison_json(report: ComparisonReport) -> dict[str, Any]:
    """What the page says, for programs; `per_image` is CIDEr-D by image id and system."""
    comparison = report.comparison
    return _with_null(
        {
            "systems": comparison.systems,
            "split": report.split,
            "images": comparison.images,
            "resamples": comparison.resamples,
            "confidence": comparison.confidence,
            "seed": comparison.seed,
            "correction": "Holm, over the pairs of systems" if len(report.pairs) > 1 else None,
            "warnings": list(report.warnings),
            "scores": [asdict(each) for each in comparison.estimates],
            "differences": [asdict(each) for each in comparison.differences],
            "descriptions": {name: list(values) for name, values in report.descriptions},
            "pairs": [
                {
                    "first": pair.first,
                    "second": pair.second,
                    "all": _group(pair.total),
                    "groups": {table.title: [_group(each) for each in table.groups] for table in pair.tables},
                    "classes": [_group(group) | {"recall": list(recalls)} for group, recalls in pair.classes],
                    "examples": {title: [each.image_id for each in shown] for title, shown in pair.images.items()},
                }
                for pair in report.pairs
            ],
            "per_image": {
                image: dict(zip(comparison.systems, map(float, report.cider_d[:, place]), strict=True))
                for place, image in enumerate(report.images)
            },
        }
    )


def _group(group: Group) -> dict[str, Any]:
    return asdict(group) | {"ties": group.ties}


def _with_null(value: Any) -> Any:
    """Nested values with None for NaN."""
    if isinstance(value, dict):
        return {key: _with_null(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_null(each) for each in value]
    return json_number(value) if isinstance(value, float) else value


def write_comparison(report: ComparisonReport, page: Path, data: Path) -> None:
    """Writes page and file, and prints scores, differences and warnings."""
    atomic_write(page, comparison_page(report))
    atomic_write(data, json.dumps(comparison_json(report), indent=1, ensure_ascii=False) + "\n")
    print(f"{report.comparison.images:,} images; {100 * report.comparison.confidence:.0f} % intervals")
    if len(report.comparison.systems) > 1:
        print(f"{'':<18} {'  '.join(f'{printable(name, 23):<23}' for name in report.comparison.systems)}".rstrip())
    for row in metric_rows(report.comparison):
        said = "  ".join(f"{each.score:.4f} [{each.low:.4f}, {each.high:.4f}]" for each in row.estimates)
        print(f"{row.label:<18} {said}")
    for pair in report.pairs:
        for each in pair.differences:
            if len(report.pairs) > MANY_PAIRS and each.metric != "cider_d":
                continue
            print(
                f"{printable(pair.second, 40)} - {printable(pair.first, 40)}: {LABELS[each.metric]} "
                f"{each.difference:+.4f} [{each.low:+.4f}, {each.high:+.4f}], p = {each.adjusted_p_value:.4f}"
                f"{', within noise' if each.within_noise else ''}"
            )
    for warning in report.warnings:
        print(f"warning: {printable(warning, 1000)}", file=sys.stderr)
    print(f"page in {printable(page, 300)}, data in {printable(data, 300)}")
