"""The same program as `difnet train`."""

import sys

from difnet_transformers.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
