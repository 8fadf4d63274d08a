"""`DifnetConfig` for the modules beside this one; the class itself is in the top-level file of the same name.

A checkpoint carries the model's code flat in one folder, where `from .configuration_difnet import DifnetConfig` finds
the real file. This shim makes the same import right inside the package.
"""

from configuration_difnet import DifnetConfig

__all__ = ["DifnetConfig"]
