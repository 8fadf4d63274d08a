"""Captions of many images: inputs cut into shards, each captioned and written by itself, on one process or many."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "captioning": ["CaptioningConfig", "ImageCaptioner"],
        "feature_captioner": ["FeatureCaptioner"],
        "features": ["FeatureConfig", "FeatureMaker"],
        "inputs": ["InputConfig", "InputShard", "plan_shards"],
        "outputs": ["OutputFolder", "caption_schema"],
        "ray_engine": ["RayConfig", "process_shards_on_ray"],
        "readers": ["ImageItem", "read_shard"],
        "run": ["process_shard", "process_shards"],
        "stages": ["CaptionFeatures", "CaptionImages", "MakeFeatures"],
    },
)
