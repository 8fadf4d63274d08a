"""From images to features: image files, sources of segmentations, extraction."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"extract": ["extract_features", "pack_features"], "images": ["thumbnail"]}
)
