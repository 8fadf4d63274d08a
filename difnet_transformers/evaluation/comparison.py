"""Whether one captioner is better than another: paired bootstrap intervals and permutation tests, in numpy.

Images are resampled, with the captions of all systems together (Koehn, EMNLP 2004). A score is a function of sums over
images, so that a resample is a row of counts and all resamples are a matrix product: BLEU is computed from the summed
n-gram counts, CHAIR-i from summed objects, the others are means. CIDEr-D's document frequencies stay those of all
images. p-values are of approximate randomization (Riezler and Maxwell, 2005): captions of the two systems change
places at random, image by image. The original (mrwu-mac/DIFNet, CVPR 2022) reports scores alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from caption_metrics import BleuCounts, Chair, bleu_counts, bleu_of_counts

_RESAMPLES_AT_ONCE = 250

ScoreOfSums = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ImageStatistics:
    """What scores are computed from.

    Args:
        values: (systems, images, columns), to be summed over images.
        metrics: by name what makes scores (..) of sums (.., columns).
    """

    values: np.ndarray
    metrics: Mapping[str, ScoreOfSums]

    @property
    def images(self) -> int:
        """Number of images."""
        return self.values.shape[1]

    def scores(self) -> dict[str, np.ndarray]:
        """Scores (systems,) of all images by metric."""
        sums = self.values.sum(axis=1)
        return {name: score(sums) for name, score in self.metrics.items()}


@dataclass(frozen=True)
class Estimate:
    """A score of a system and its bootstrap interval."""

    system: str
    metric: str
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """By how much `second` scores above `first`.

    Args:
        low: end of the paired bootstrap interval.
        high: its other end.
        p_value: of the permutation test, two-sided.
        adjusted_p_value: the same after Holm's correction for all pairs of systems.
        within_noise: whether the interval includes 0, as it does where the two are equal, or `adjusted_p_value` is
            above what the interval leaves out. Intervals of few images are too narrow; p-values hold for any number.
    """

    first: str
    second: str
    metric: str
    difference: float
    low: float
    high: float
    p_value: float
    adjusted_p_value: float
    within_noise: bool


@dataclass(frozen=True)
class Comparison:
    """Scores of systems and their differences, with how both were found."""

    systems: list[str]
    images: int
    resamples: int
    confidence: float
    seed: int
    estimates: list[Estimate]
    differences: list[Difference]

    def estimate(self, system: str, metric: str) -> Estimate:
        """The score of a system."""
        return next(each for each in self.estimates if (each.system, each.metric) == (system, metric))


def mean_metric(column: int, images: int) -> ScoreOfSums:
    """The mean over images of a column."""
    return lambda sums: sums[..., column] / images


def ratio_metric(column: int, of: int) -> ScoreOfSums:
    """The sum of a column divided by that of another, NaN where that is 0."""

    def score(sums: np.ndarray) -> np.ndarray:
        whole = sums[..., of]
        return np.divide(sums[..., column], whole, out=np.full(whole.shape, np.nan), where=whole != 0)

    return score


def bleu_metric(first_column: int, n: int) -> ScoreOfSums:
    """BLEU-n of ten columns: 4 of correct n-grams, 4 of all, length, length of the closest reference."""

    def score(sums: np.ndarray) -> np.ndarray:
        columns = np.moveaxis(sums[..., first_column : first_column + 10], -1, 0)
        return bleu_of_counts(BleuCounts(columns[:4], columns[4:8], columns[8], columns[9]))[n - 1]

    return score


def image_statistics(
    captions: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    per_image: Mapping[str, np.ndarray],
    chairs: Sequence[Chair] = (),
) -> ImageStatistics:
    """Statistics of BLEU, of scores that are means, and of CHAIR.

    Args:
        captions: of each system, one for each image.
        references: reference captions of each image.
        per_image: scores (systems, images) by name, whose means are scores of the corpus.
        chairs: what CHAIR found, of each system; empty if it was not asked for.
    """
    counts = [bleu_counts(each, references) for each in captions]
    columns = [np.stack([np.concatenate([*each.correct, *each.guessed]).reshape(8, -1) for each in counts])]
    columns += [np.stack([np.stack([each.length, each.reference_length]) for each in counts])]
    images = len(references)
    metrics = {f"bleu_{n}": bleu_metric(0, n) for n in range(1, 5)}
    width = 10
    for name, scores in per_image.items():
        columns.append(np.asarray(scores, dtype=np.float64)[:, None])
        metrics[name] = mean_metric(width, images)
        width += 1
    if chairs:
        columns += [
            np.stack([np.stack([each.hallucinations > 0, each.hallucinations, each.mentions]) for each in chairs])
        ]
        metrics["chair_s"] = mean_metric(width, images)
        metrics["chair_i"] = ratio_metric(width + 1, width + 2)
    return ImageStatistics(np.concatenate(columns, axis=1).swapaxes(1, 2), metrics)


def bootstrap_scores(statistics: ImageStatistics, resamples: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Scores (resamples, systems) by metric, of images that are drawn with replacement, the same for all systems."""
    return _scores_of(_sums_of_resamples(statistics.values, resamples, seed), statistics.metrics, resamples)


def _sums_of_resamples(values: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Sums (part of the resamples, systems, columns) over images drawn with replacement."""
    systems, images, columns = values.shape
    flat = np.ascontiguousarray(values.swapaxes(0, 1)).reshape(images, systems * columns)
    random = np.random.default_rng(seed)
    for first in range(0, resamples, _RESAMPLES_AT_ONCE):
        number = min(_RESAMPLES_AT_ONCE, resamples - first)
        drawn = random.integers(0, images, (number, images), dtype=np.int32)
        drawn += np.arange(number, dtype=np.int32)[:, None] * np.int32(images)
        counts = np.bincount(drawn.ravel(), minlength=number * images).reshape(number, images)
        yield (counts.astype(np.float64) @ flat).reshape(number, systems, columns)


def _scores_of(
    parts: Iterator[np.ndarray], metrics: Mapping[str, ScoreOfSums], resamples: int
) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for sums in parts:
        for name, score in metrics.items():
            found[name].append(score(sums))
    return {name: np.concatenate(scores) for name, scores in found.items()}


def permutation_p_values(
    statistics: ImageStatistics, first: int, second: int, resamples: int, seed: int = 0
) -> dict[str, float]:
    """Two-sided p-values by metric of the hypothesis that two systems are equally good.

    Args:
        statistics: of the systems.
        first: a system.
        second: another.
        resamples: of captions that change places; the smallest p-value is 1 / (resamples + 1).
        seed: of the random numbers.
    """
    one, other = statistics.values[first], statistics.values[second]
    images = statistics.images
    random = np.random.default_rng(seed)
    totals = np.stack([one.sum(axis=0), other.sum(axis=0)])

    def parts() -> Iterator[np.ndarray]:
        for begin in range(0, resamples, _RESAMPLES_AT_ONCE):
            number = min(_RESAMPLES_AT_ONCE, resamples - begin)
            bits = np.frombuffer(random.bytes(number * (-(-images // 8))), dtype=np.uint8).reshape(number, -1)
            swapped = np.unpackbits(bits, axis=1, count=images).astype(np.float64)
            moved = swapped @ (other - one)
            yield np.stack([totals[0] + moved, totals[1] - moved], axis=1)

    drawn = _scores_of(parts(), statistics.metrics, resamples)
    p_values = {}
    for name, score in statistics.metrics.items():
        observed = np.abs(np.diff(score(totals)))[0]
        differences = np.abs(np.diff(drawn[name], axis=1))[:, 0]
        # Equal differences of other sums differ in their last bits.
        extreme = np.count_nonzero(~(differences < observed * (1 - 1e-9) - 1e-12))
        p_values[name] = float((1 + extreme) / (1 + resamples))
    return p_values


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values after Holm's step-down correction (1979) for as many tests, in the order given."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    steps = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values, dtype=np.float64)[order] * factors))
    adjusted = np.empty(len(p_values))
    adjusted[order] = steps
    return adjusted.tolist()


def compare_systems(
    names: Sequence[str],
    statistics: ImageStatistics,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Scores of systems with intervals, and the differences of all pairs with intervals and p-values.

    Args:
        names: of the systems.
        statistics: of all of them on the same images.
        resamples: of the bootstrap, and of the permutation test of each pair.
        confidence: of the intervals, percentiles of the resamples.
        seed: of the random numbers; equal inputs give equal results.
    """
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    observed = statistics.scores()
    drawn = bootstrap_scores(statistics, resamples, seed)
    pairs = list(itertools.combinations(range(len(names)), 2))
    p_values = [permutation_p_values(statistics, *pair, resamples, seed + 1) for pair in pairs]
    estimates, differences = [], []
    for metric, scores in observed.items():
        lows, highs = np.nanpercentile(drawn[metric], tails, axis=0)
        estimates += [
            Estimate(name, metric, float(scores[place]), float(lows[place]), float(highs[place]))
            for place, name in enumerate(names)
        ]
        adjusted = holm([each[metric] for each in p_values])
        for (first, second), p_value, adjusted_p_value in zip(pairs, p_values, adjusted, strict=True):
            low, high = np.nanpercentile(drawn[metric][:, second] - drawn[metric][:, first], tails)
            difference = float(scores[second] - scores[first])
            differences.append(
                Difference(
                    names[first],
                    names[second],
                    metric,
                    difference,
                    float(low),
                    float(high),
                    p_value[metric],
                    adjusted_p_value,
                    bool(low <= 0 <= high or adjusted_p_value > 1 - confidence),
                )
            )
    return Comparison(list(names), statistics.images, resamples, confidence, seed, estimates, differences)


@dataclass(frozen=True)
class Group:
    """Images of one kind, and how two systems compare on them by CIDEr-D.

    Args:
        name: of the kind.
        images: how many.
        wins: of the second system.
        losses: of the second system.
        means: CIDEr-D of each system.
        difference: mean of the second system minus that of the first.
        half_width: of the 95 % interval of the difference, or of one system's mean, from its standard error; NaN for
            a single image.
    """

    name: str
    images: int
    wins: int
    losses: int
    means: list[float]
    difference: float
    half_width: float

    @property
    def ties(self) -> int:
        """Images with equal scores."""
        return self.images - self.wins - self.losses


def make_group(name: str, scores: np.ndarray, members: np.ndarray) -> Group:
    """The group of the images `members` (places or a mask), of scores (2, images), or (1, images) for one system."""
    chosen = scores[:, members]
    differences = chosen[-1] - chosen[0]
    images = chosen.shape[1]
    spread = (differences if len(scores) > 1 else chosen[0]).std(ddof=1) if images > 1 else np.nan
    return Group(
        name,
        images,
        int(np.count_nonzero(differences > 0)),
        int(np.count_nonzero(differences < 0)),
        chosen.mean(axis=1).tolist(),
        float(differences.mean()),
        float(1.96 * spread / np.sqrt(images)),
    )


def groups_by_value(values: np.ndarray, scores: np.ndarray, describe: Callable[[float, float], str]) -> list[Group]:
    """Groups of about a quarter of the images each, by rising value; fewer where many values are equal.

    Args:
        values: (images,) such as the length of the references; NaN for images of no group.
        scores: (2, images), or (1, images) for one system.
        describe: name of a group, from its smallest and largest value.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return []
    edges = np.unique(np.quantile(known, [0.25, 0.5, 0.75], method="inverted_cdf"))
    number = np.searchsorted(edges, values)
    groups = []
    for each in range(len(edges) + 1):
        members = np.isfinite(values) & (number == each)
        if members.any():
            inside = values[members]
            groups.append(make_group(describe(float(inside.min()), float(inside.max())), scores, members))
    return groups
