"""The corpus of `difnet demo` alone, which `scripts/demo_corpus.py` draws."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simple_parsing import field

from ..command_line import run_command
from ..files import printable
from ..options import debug_option, parse_options

DESCRIPTION = """\
Draw the demo's corpus alone, in the files that the original implementation reads.

  python scripts/demo_corpus.py --output demo_output/corpus"""


@dataclass
class DemoCorpusOptions:
    """Options of `demo_corpus.py`."""

    output: Path = field(metavar="FOLDER", help="where the files go")
    seed: int = field(default=0, metavar="N", help="which scenes are drawn")
    debug: bool = debug_option()


def main(argv: Sequence[str] | None = None, prog: str = "demo_corpus.py") -> int:
    options = parse_options(DemoCorpusOptions, argv, prog=prog, description=DESCRIPTION)

    def run() -> int:
        from ..demo.corpus import write_corpus
        from ..demo.scenes import make_scenes

        write_corpus(options.output, make_scenes(options.seed))
        print(f"The corpus is in {printable(options.output, 300)}")
        return 0

    return run_command(prog, run, options.debug)


if __name__ == "__main__":
    sys.exit(main())
