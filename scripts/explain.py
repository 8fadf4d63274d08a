"""The same program as `difnet explain`."""

import sys

from difnet_transformers.cli.explain import main

if __name__ == "__main__":
    sys.exit(main())
