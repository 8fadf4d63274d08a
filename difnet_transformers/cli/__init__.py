"""One file for each command of `difnet`."""
