"""Draws the corpus of `difnet demo` alone."""

import sys

from difnet_transformers.demo.corpus import main

if __name__ == "__main__":
    sys.exit(main())
