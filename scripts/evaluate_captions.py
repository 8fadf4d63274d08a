"""The same program as `difnet evaluate`."""

import sys

from difnet_transformers.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
