"""Captions from exported graphs, by ONNX Runtime or OpenVINO and NumPy: nothing here imports torch or transformers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "beam_search": ["BeamSearchOutput"],
        "manifest": ["is_exported"],
        "model": ["DifnetRuntimeModel"],
    },
)
