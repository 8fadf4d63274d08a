"""How long `difnet --help` and the help of each command take, in a fresh process each.

    python benchmarks/help_time.py

The claim: at most 0.6 s, because the help imports no torch (tests/test_cli.py looks at the modules). A process that
imports torch and nothing else stands beside it. The exit code is 1 where a median is over the limit.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
from functools import partial

import torch
from common import (
    CPU,
    Row,
    commit,
    hardware,
    make_parser,
    markdown_table,
    measure,
    results_path,
    seconds_range,
    write_report,
)

from difnet_transformers.cli.main import COMMANDS

LIMIT = 0.6  # seconds


def python(*words: str) -> None:
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each row (default: 7)")
    options = parser.parse_args()

    program = ("-m", "difnet_transformers.cli.main")
    rows = [Row("help", "difnet --help", partial(python, *program, "--help"))]
    rows += [Row("help", f"difnet {name} --help", partial(python, *program, name, "--help")) for name in COMMANDS]
    rows += [Row("torch", "import torch", partial(python, "-c", "import torch"))]
    before, after = measure(rows, options.repeats, CPU)
    write_report(
        [
            "# Time of the help",
            "",
            f"`python benchmarks/help_time.py`, {datetime.date.today()}, commit {commit()}",
            "",
            f"- {hardware(CPU)}; Python {sys.version.split()[0]}, PyTorch {torch.__version__}",
            f"- 2048 x 2048 x 2048 fp32 matrix product: {before:.2f} ms before, {after:.2f} ms after",
            f"- median (least to largest) of {options.repeats} processes; the limit is {LIMIT} s",
            "",
            *markdown_table(["process", "seconds"], [[f"`{row.name}`", seconds_range(row)] for row in rows]),
        ],
        results_path("help", "cpu"),
    )
    slow = [row.name for row in rows if row.group == "help" and row.median > LIMIT]
    for name in slow:
        print(f"over {LIMIT} s: {name}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
