"""The toolkit around the model: files, data, training and the programs. The model itself is in `modeling_difnet`."""

__version__ = "0.2.0"
