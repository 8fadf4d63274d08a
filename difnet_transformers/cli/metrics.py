"""`difnet metrics`: the program of `caption_metrics`, which imports nothing of this package."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None, prog: str = "difnet metrics") -> int:
    from caption_metrics.__main__ import main

    return main(argv, prog=prog)


if __name__ == "__main__":
    sys.exit(main())
