"""The original's checkpoints (`.pth`) and vocabulary (`vocab.pkl`) to checkpoint folders, and back.

The work is done in `difnet_transformers.conversion`; this module has its public names, and is the same program as
`difnet convert`.
"""

import sys

from difnet_transformers.conversion import *  # noqa: F403
from difnet_transformers.conversion import main

if __name__ == "__main__":
    sys.exit(main())
