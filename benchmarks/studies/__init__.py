"""Experiments on the bundled data whose results the documents state."""
