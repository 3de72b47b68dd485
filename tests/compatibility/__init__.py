"""Compatibility of saved folders with transformers versions; `make compat` prints the matrix."""
