"""Draws the corpus of `difnet demo` alone."""

import sys

from difnet_transformers.cli.demo_corpus import main

if __name__ == "__main__":
    sys.exit(main())
