"""Captions from the usual sources, written as COCO caption files, which everything else reads.

The original (mrwu-mac/DIFNet, CVPR 2022) reads COCO's files and four files of ids alone. Each reader here is a
function that returns a `CaptionSource`; `read_source` chooses among them, `splits.py` says which image is in which
split, and `coco_files.py` writes the result.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "coco_files": ["PreparedCaptions", "prepare_captions"],
        "hub": ["HubDataset", "save_hub_dataset"],
        "image_folders": ["is_image_folder", "read_image_folder"],
        "rows": ["CaptionedImage", "CaptionSource", "UnusableEntry"],
        "sources": ["read_source"],
        "splits": ["SplitRule", "assign_splits"],
        "tables": ["ColumnNames", "read_json_lines", "read_json_list", "read_table"],
        "token_files": ["read_token_file"],
    },
)
