"""The old name of `difnet_transformers.data`, for code that imports it from a clone."""

from difnet_transformers.data.batches import *  # noqa: F403
from difnet_transformers.data.packed_dataset import *  # noqa: F403
