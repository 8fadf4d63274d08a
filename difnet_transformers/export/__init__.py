"""Exports captioners to ONNX and OpenVINO; `difnet_transformers.runtime` runs what is exported."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "captioner": ["export_captioner"],
        "checks": ["ExportCheck", "check_export"],
    },
)
