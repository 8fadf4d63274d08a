"""The segmentation feature of `modeling_difnet` under its first name."""

from modeling_difnet.segmentation_difnet import *  # noqa: F403
from modeling_difnet.segmentation_difnet import __all__  # noqa: F401
