"""`difnet demo`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    from ..demo.run import main

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
