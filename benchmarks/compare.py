"""Time of paired bootstrap intervals and permutation tests, against a loop over resamples.

    python benchmarks/compare.py                  # 10,000 resamples of 5,000 images
    python benchmarks/compare.py --images 1000

Two systems with captions of tests/golden. A resample is a row of counts, and all of them a matrix product with the
sums that BLEU, CIDEr-D and the others are computed from; the loop draws images and sums their rows, one resample at a
time (a hundred of them are timed). The table goes to the terminal and to benchmarks/results/.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from common import (
    GOLDEN,
    add_output_option,
    header,
    make_parser,
    markdown_table,
    results_path,
    timed,
    write_report,
)

from caption_metrics import score_captions
from difnet_transformers.evaluation.comparison import ImageStatistics, compare_systems, image_statistics

SECONDS = 10.0  # 10,000 resamples of 5,000 images take less
LOOPED = 100


def made_split(number: int) -> tuple[list[list[str]], list[list[str]]]:
    """Captions of two systems, and references, of `number` images."""
    with gzip.open(GOLDEN / "metrics" / "scores_heldout.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rng = random.Random(0)
    chosen = [rng.choice(rows) for _ in range(number)]
    second = [row["hyp"] if rng.random() < 0.5 else rng.choice(row["refs"]) for row in chosen]
    return [[row["hyp"] for row in chosen], second], [row["refs"] for row in chosen]


def loop(statistics: ImageStatistics, resamples: int) -> None:
    """Differences of both systems, one resample after another."""
    rng = np.random.default_rng(0)
    for _ in range(resamples):
        sums = statistics.values[:, rng.integers(0, statistics.images, statistics.images)].sum(axis=1)
        for score in statistics.metrics.values():
            np.diff(score(sums))


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--resamples", type=int, default=10_000)
    add_output_option(parser)
    arguments = parser.parse_args()
    captions, references = made_split(arguments.images)
    scores, scoring = timed(
        lambda: [score_captions(each, references, per_image=True)["per_image"] for each in captions]
    )
    per_image = {name: np.array([each[name] for each in scores]) for name in ("rouge_l", "cider_d")}
    statistics, counting = timed(lambda: image_statistics(captions, references, per_image))
    _, comparing = timed(lambda: compare_systems(["A", "B"], statistics, resamples=arguments.resamples))
    _, looped = timed(lambda: loop(statistics, LOOPED))
    looped *= arguments.resamples / LOOPED
    rows = [
        ("scores of both systems (BLEU, ROUGE-L, CIDEr-D)", f"{scoring:.2f} s"),
        ("sums of BLEU", f"{counting:.2f} s"),
        (f"{arguments.resamples:,} bootstrap resamples and as many permutations", f"{comparing:.2f} s"),
        (f"the bootstrap alone as a loop, of {LOOPED} resamples", f"{looped:.1f} s"),
    ]
    lines = header(
        f"Comparison of two systems on {arguments.images:,} images",
        f"compare.py --images {arguments.images} --resamples {arguments.resamples}",
        notes=[f"the loop takes {looped / comparing:.0f} times as long"],
    )
    write_report([*lines, *markdown_table(("what", "time"), rows)], arguments.output or results_path("compare", "cpu"))
    limit = SECONDS * arguments.images * arguments.resamples / (5000 * 10_000)
    if comparing > max(limit, 1.0):
        print(f"slower than the limit of {limit:.1f} s", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
