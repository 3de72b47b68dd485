"""Damage to files, for tests that it is found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def flip(path: Path, place: int | None = None) -> Iterator[None]:
    """Flip the lowest bit of a byte of a file, by default in the middle; at the end it is as it was."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(content)
