"""The same program as `difnet train-on-images`."""

import sys

from difnet_transformers.cli.train_on_images import main

if __name__ == "__main__":
    sys.exit(main())
