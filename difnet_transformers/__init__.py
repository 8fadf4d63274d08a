"""The toolkit around the model: files, data, training and the programs. The model itself is in `modeling_difnet`."""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"runtime": ["DifnetRuntimeModel"]})
