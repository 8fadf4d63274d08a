"""How long `difnet --help` and the help of each command take, in a fresh process each.

    python benchmarks/help_time.py

The claim: at most 0.6 s, because the help imports no torch (tests/test_cli.py looks at the modules). A process that
imports torch and nothing else stands beside it. The exit code is 1 where a median is over the limit.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from common import (
    CPU,
    Row,
    add_output_option,
    header,
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
    add_output_option(parser)
    options = parser.parse_args()

    program = ("-m", "difnet_transformers.cli.main")
    rows = [Row("help", "difnet --help", partial(python, *program, "--help"))]
    rows += [Row("help", f"difnet {name} --help", partial(python, *program, name, "--help")) for name in COMMANDS]
    rows += [Row("torch", "import torch", partial(python, "-c", "import torch"))]
    matmul = measure(rows, options.repeats, CPU)
    note = f"median (least to largest) of {options.repeats} processes; the limit is {LIMIT} s"
    lines = [
        *header("Time of the help", "help_time.py", matmul=matmul, notes=[note]),
        *markdown_table(["process", "seconds"], [[f"`{row.name}`", seconds_range(row)] for row in rows]),
    ]
    write_report(lines, options.output or results_path("help", "cpu"))
    slow = [row.name for row in rows if row.group == "help" and row.median > LIMIT]
    for name in slow:
        print(f"over {LIMIT} s: {name}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
