"""The toolkit around the model: files, data, training and the programs. The model itself is in `modeling_difnet`."""
