"""Checkpoints of other code, converted to this format and back."""
