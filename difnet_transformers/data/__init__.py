"""COCO's files, the packed dataset made of them, and its batches."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "packed_dataset": [
            "CaptionCollator",
            "CaptionPairBatches",
            "CaptionPairs",
            "ImageCaptionBatches",
            "PackedImages",
            "ReferenceBatches",
            "load_packed_split",
        ]
    },
)
