"""`difnet demo`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simple_parsing import field

from ..command_line import run_command
from ..files import folder_lock, make_folder
from ..options import debug_option, parse_options, save_options

DESCRIPTION = """\
Everything on a small drawn corpus: draw, pack, train with XE and SCST, evaluate, load, caption, explain, show.

  difnet demo

Takes a few minutes on two cores, needs no GPU, no network and no download, and leaves OUTPUT/demo.html to look at. It
runs the other commands as a user would and prints each. It can be stopped at any time; the same command resumes."""


@dataclass
class DemoOptions:
    """Options of `difnet demo`."""

    output: Path = field(default=Path("demo_output"), metavar="FOLDER", help="where everything goes")
    seed: int = field(default=0, metavar="N", help="of the scenes and of the training")
    debug: bool = debug_option()


def main(argv: Sequence[str] | None = None, prog: str = "demo.py") -> int:
    options = parse_options(DemoOptions, argv, prog=prog, description=DESCRIPTION)

    def run() -> int:
        from ..demo.run import run_demo

        make_folder(options.output)
        with folder_lock(options.output, prog):
            run_demo(options.output, options.seed)
            save_options(options, options.output / "recipe.yaml")
        return 0

    return run_command(prog, run, options.debug, "the same command resumes")


if __name__ == "__main__":
    sys.exit(main())
