"""The same program as `difnet demo`."""

import sys

from difnet_transformers.cli.demo import main

if __name__ == "__main__":
    sys.exit(main())
