"""The original's checkpoints (`.pth`) and vocabulary (`vocab.pkl`) to checkpoint folders, and back.

This module has the public names of the conversion, and is the same program as `difnet convert`.
"""

import sys

from difnet_transformers.cli.convert import grid_backbone_main, main
from difnet_transformers.conversion import (
    MODES,
    SPECIAL_TOKENS,
    convert,
    convert_back,
    convert_grid_backbone,
    convert_state_dict,
    key_pairs,
    linear_and_norm_pairs,
    original_config,
    original_mode,
    to_original_state_dict,
    unused_keys,
)
from difnet_transformers.grid_feats_vqa import convert_detectron2_state_dict
from difnet_transformers.original_files import load_original_checkpoint, read_vocabulary
from difnet_transformers.state_dicts import Conversion, key_report
from modeling_difnet.generation_difnet import default_generation_config

__all__ = [
    "MODES",
    "SPECIAL_TOKENS",
    "Conversion",
    "convert",
    "convert_back",
    "convert_detectron2_state_dict",
    "convert_grid_backbone",
    "convert_state_dict",
    "default_generation_config",
    "grid_backbone_main",
    "key_pairs",
    "key_report",
    "linear_and_norm_pairs",
    "load_original_checkpoint",
    "main",
    "original_config",
    "original_mode",
    "read_vocabulary",
    "to_original_state_dict",
    "unused_keys",
]

if __name__ == "__main__":
    sys.exit(main())
