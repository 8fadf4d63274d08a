"""COCO's files, the packed dataset made of them, and its batches."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batches": [
            "CaptionCollator",
            "CaptionPairBatches",
            "CaptionPairs",
            "ImageCaptionBatches",
            "ReferenceBatches",
        ],
        "image_references": ["ImageReferences"],
        "packed_dataset": ["PackedImages", "load_packed_split"],
        "streaming": ["StreamedBatches", "StreamedImages", "open_stream"],
    },
)
