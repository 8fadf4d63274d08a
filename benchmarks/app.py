"""Captions per second of `difnet app` at full size (10,201 words): clients at once beside one after another.

    python benchmarks/app.py                          # random weights of full size
    python benchmarks/app.py --start demo_output/run/best

Clients send features (49 x 2048 and 133 x 7 x 7, as .npz) to a server in a process of its own, which decodes with five
beams and up to 20 tokens. One client that waits for each answer, and `--clients` that do so at the same time, take
turns in one run; the ratio is that of the medians. The claim: 8 clients at once get at least 3 times the captions per
second; the exit code is 1 where they do not.

The second table is what a user waits for: from starting the command to the first caption, and to the page. The tables
go to the terminal and to benchmarks/results/.
"""

import io
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import numpy as np
from common import (
    CPU,
    Row,
    add_output_option,
    header,
    make_parser,
    markdown_table,
    measure,
    reference_features,
    results_path,
    seconds_range,
    write_report,
)
from runtimes import full_size_captioner

CLAIM = 3.0
POLL_SECONDS = 0.01


def feature_files(number: int) -> list[bytes]:
    """Features of images as `.npz` files."""
    tensors = reference_features(number, CPU)
    files = []
    for index in range(number):
        buffer = io.BytesIO()
        np.savez(buffer, **{name: tensor[index].numpy() for name, tensor in tensors.items()})
        files.append(buffer.getvalue())
    return files


@contextmanager
def server(model: Path, *options: str) -> Iterator[tuple[str, float]]:
    """`difnet app`: its address, and when it was started."""
    started = time.perf_counter()
    words = [sys.executable, "-m", "difnet_transformers.cli.main", "app", "--model", str(model), "--port", "0"]
    process = subprocess.Popen([*words, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
        assert found is not None, "the server ended"
        yield found[0], started
    finally:
        process.terminate()
        process.wait(60)


def send(url: str, files: list[bytes], clients: int) -> list[float]:
    """Captions every file, `clients` at a time; seconds of each request."""

    def worker(own: list[bytes]) -> list[float]:
        seconds = []
        with httpx.Client(timeout=120) as client:
            for content in own:
                begin = time.perf_counter()
                client.post(url, content=content).raise_for_status()
                seconds.append(time.perf_counter() - begin)
        return seconds

    with ThreadPoolExecutor(clients) as pool:
        return [
            each for found in pool.map(worker, [files[start::clients] for start in range(clients)]) for each in found
        ]


def seconds_to_start(model: Path, content: bytes) -> tuple[float, float]:
    """From starting the command to the first caption, and to the page."""
    with server(model) as (url, started), httpx.Client(timeout=60) as client:
        client.post(url, content=content).raise_for_status()
        first_caption = time.perf_counter() - started
        while "gradio" not in client.get(url, headers={"Accept": "text/html"}).text:
            time.sleep(POLL_SECONDS)
        return first_caption, time.perf_counter() - started


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--clients", type=int, default=8, help="at once (default: 8)")
    parser.add_argument("--requests", type=int, default=64, help="of each row (default: 64)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each row (default: 5)")
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="whose start is timed (default: this one's)")
    add_output_option(parser)
    options = parser.parse_args()

    files = feature_files(options.requests)
    with tempfile.TemporaryDirectory() as work:
        model, processor = full_size_captioner()
        model.save_pretrained(work)
        processor.save_pretrained(work)
        del model
        with server(Path(work), "--no-page", "--batch-size", str(options.clients)) as (url, _):
            rows = [
                Row("app", "one after another", partial(send, url, files, 1)),
                Row("app", f"{options.clients} clients at once", partial(send, url, files, options.clients)),
            ]
            matmul = measure(rows, options.repeats, CPU)
        starts = [seconds_to_start(options.start or Path(work), files[0]) for _ in range(options.repeats)]

    ratio = rows[0].median / rows[1].median
    table = [
        [
            row.name,
            f"{options.requests / row.median:.1f}",
            f"{rows[0].median / row.median:.2f}",
            f"{1000 * statistics.median(row.result):.0f}",
            seconds_range(row),
        ]
        for row in rows
    ]
    to_caption, to_page = (statistics.median(each) for each in zip(*starts, strict=True))
    notes = [f"{options.requests} requests a run, {options.repeats} runs of each row in turn; all on the same cores"]
    lines = [
        *header("A server of captions", "app.py", matmul=matmul, notes=notes),
        *markdown_table(["clients", "captions/s", "times", "ms a request, median", "seconds a run"], table),
        "",
        *markdown_table(
            ["from starting `difnet app` to", f"seconds, median of {options.repeats}"],
            [["the first caption of features", f"{to_caption:.2f}"], ["the page", f"{to_page:.2f}"]],
        ),
    ]
    write_report(lines, options.output or results_path("app", "cpu"))
    return 0 if ratio >= CLAIM else 1


if __name__ == "__main__":
    sys.exit(main())
