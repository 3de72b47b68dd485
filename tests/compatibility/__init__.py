"""One folder, every transformers version: `make compat` prints the matrix."""
