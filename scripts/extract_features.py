"""The same program as `difnet extract`."""

import sys

from difnet_transformers.cli.extract import main

if __name__ == "__main__":
    sys.exit(main())
