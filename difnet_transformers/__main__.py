"""`python -m difnet_transformers COMMAND`: `difnet COMMAND` for launchers that start modules (`torchrun -m`)."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
