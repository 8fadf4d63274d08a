"""The same program as `difnet caption`."""

import sys

from difnet_transformers.cli.caption import main

if __name__ == "__main__":
    sys.exit(main())
