"""Speed of the captioning metrics, and memory of the document frequencies.

    python benchmarks/metrics.py                 # everything; beside Java if pycocoevalcap is installed
    python benchmarks/metrics.py --captions annotations/captions_train2014.json

Without --captions the corpus is synthetic: pairs of captions of tests/golden are cut at a word and joined, which gives
nearly as many distinct n-grams as the COCO captions have (2.3 million). The table goes to the terminal and to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import itertools
import json
import os
import random
import resource
import statistics
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import (
    GOLDEN,
    add_output_option,
    call_times,
    header,
    make_parser,
    markdown_table,
    median_seconds,
    results_path,
    timed,
    write_report,
)

from caption_metrics import CiderD, CiderReward, PTBTokenizer, bleu, rouge_l
from caption_metrics.captions import tokenized

LIMITS = {"batch": 2.0, "table": 150.0, "ratio": 5.0}


def golden(name: str) -> list[dict]:
    with gzip.open(GOLDEN / "metrics" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def corpus(path: Path | None, number: int) -> list[list[str]]:
    """About `number` captions, five or so for each image."""
    if path is not None:
        images: dict[int, list[str]] = {}
        for row in json.loads(path.read_text("utf-8"))["annotations"]:
            images.setdefault(row["image_id"], []).append(row["caption"])
        return list(images.values())
    captions = [caption.split() for row in golden("scst_corpus") for caption in row["captions"]]
    rng = random.Random(0)
    joined = []
    for _ in range(number):
        one, other = rng.choice(captions), rng.choice(captions)
        joined.append(" ".join(one[: rng.randint(1, len(one))] + other[rng.randint(0, len(other)) :]))
    return [joined[first : first + 5] for first in range(0, number, 5)]


def resident_megabytes() -> float:
    """Resident memory of the process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def reward_rows(images: list[list[str]]) -> list[tuple[str, str]]:
    before = resident_megabytes()
    reward, built = timed(lambda: CiderReward.from_captions(images))
    table = reward.frequencies
    words = sum(map(sys.getsizeof, table.words)) + sys.getsizeof(table.word_numbers) + sys.getsizeof(table.words)
    size = (table.nbytes + words) / 1e6
    rows = [
        ("captions in the table", f"{table.documents:,}"),
        ("n-grams in the table", f"{sum(map(len, table.counts)):,}"),
        ("table built in", f"{built:.1f} s"),
        ("memory of the table", f"{size:.0f} MB (at most {LIMITS['table']:.0f})"),
        ("resident memory after building", f"{resident_megabytes() - before:.0f} MB more"),
    ]
    batches = [(row["hyps"], [row["refs"][i // 5] for i in range(50)]) for row in golden("scst_batches")]
    for batch in batches:
        reward.reward(*batch)
    memory = resident_megabytes()
    cycle = itertools.cycle(batches)
    times = [1e3 * seconds for seconds in call_times(lambda: reward.reward(*next(cycle)), 1000)]
    rows += [
        ("SCST batch, median of 1,000", f"{statistics.median(times):.2f} ms (at most {LIMITS['batch']:.0f})"),
        (
            "SCST batch, first 100 / last 100",
            f"{statistics.median(times[:100]):.2f} / {statistics.median(times[-100:]):.2f} ms",
        ),
        ("memory grown over 1,000 batches", f"{resident_megabytes() - memory:.1f} MB"),
    ]
    fresh = CiderReward(table, cached_captions=0)
    cycle = itertools.cycle(batches)
    uncached = 1e3 * median_seconds(lambda: fresh.reward(*next(cycle)))
    rows.append(("SCST batch, references not cached", f"{uncached:.2f} ms"))
    return rows


def evaluation_rows(images: list[list[str]], number: int) -> list[tuple[str, str]]:
    """Time of BLEU, ROUGE-L and CIDEr-D for `number` images, tokenizing included; of pycocoevalcap in the same run."""
    images = [captions for captions in images if len(captions) > 4][:number]
    hypotheses = [captions[0] for captions in images[1:] + images[:1]]
    # A hypothesis of another image with a few words of its own: matches as a captioner's has.
    hypotheses = [f"{hypothesis} {captions[1]}"[:60] for hypothesis, captions in zip(hypotheses, images, strict=True)]
    flat = [caption for captions in images for caption in captions]

    def scores() -> tuple[list[float], float, float]:
        given = tokenized(hypotheses, images)
        return [score.corpus for score in bleu(*given)], rouge_l(*given).corpus, CiderD().score(*given).corpus

    tokenizer = PTBTokenizer()
    tokenizing = statistics.median(call_times(lambda: tokenizer.tokenize_batch(flat), 3))
    here = statistics.median(call_times(scores, 3))
    rows = [
        ("tokenizer", f"{len(flat) / tokenizing:,.0f} captions/s"),
        (f"evaluation of {len(images):,} images", f"{here:.2f} s"),
    ]
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer as JavaTokenizer
    except ImportError:
        return [*rows, ("pycocoevalcap", "not installed")]

    def java_scores() -> list[list[float] | float]:
        given = {i: [{"caption": caption} for caption in captions] for i, captions in enumerate(images)}
        found = {i: [{"caption": caption}] for i, caption in enumerate(hypotheses)}
        given, found = JavaTokenizer().tokenize(given), JavaTokenizer().tokenize(found)
        with contextlib.redirect_stdout(io.StringIO()):
            return [metric.compute_score(given, found)[0] for metric in (Bleu(4), Rouge(), Cider())]

    java = statistics.median(call_times(java_scores, 3))
    largest = max(
        abs(a - b)
        for found, expected in zip(scores(), java_scores(), strict=True)
        for a, b in zip(*(s if isinstance(s, list) else [s] for s in (found, expected)), strict=True)
    )
    return [
        *rows,
        ("the same with pycocoevalcap", f"{java:.2f} s"),
        ("ratio", f"{java / here:.1f} times as fast (at least {LIMITS['ratio']:.0f})"),
        ("largest difference of a corpus score", f"{largest:.1e}"),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--captions", type=Path, help="a COCO annotation file as the corpus")
    parser.add_argument(
        "--number", type=int, default=567_000, help="captions of the synthetic corpus (default: 567,000)"
    )
    parser.add_argument("--images", type=int, default=5_000, help="images of the evaluation (default: 5,000)")
    add_output_option(parser)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # the table's folder, before --output
    options = parser.parse_args(argv)
    output = options.output
    if output is None:
        output = results_path("metrics") if options.results is None else options.results / results_path("metrics").name
    images = corpus(options.captions, options.number)
    rows = evaluation_rows(images, options.images) + reward_rows(images)
    source = "synthetic, from the golden captions" if options.captions is None else options.captions.name
    lines = [
        *header("Captioning metrics", "metrics.py", notes=[f"one core; corpus: {source}"]),
        *markdown_table(["what", "measured"], rows),
    ]
    write_report(lines, output)


if __name__ == "__main__":
    main()
