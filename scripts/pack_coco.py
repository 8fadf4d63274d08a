"""The same program as `difnet pack`."""

import sys

from difnet_transformers.cli.pack import main

if __name__ == "__main__":
    sys.exit(main())
