"""Damage to files, for tests that it is found."""

from __future__ import annotations

import random
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


# What lengths, offsets and counts in a file are replaced by.
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)


def mutated(content: bytes, generator: random.Random, other: bytes = b"") -> bytes:
    """Damage the content of a file: flips, a cut, zeros, a number, or a part that is inserted, doubled or missing.

    Args:
        other: Another file, of which a part may replace one of this.
    """
    size = len(content)
    place = generator.randrange(size + 1)
    length = min(size - place, 1 << generator.randrange(12))
    head, part, tail = content[:place], content[place : place + length], content[place + length :]
    kind = generator.choice(("flip", "flip", "cut", "zero", "insert", "double", "drop", "number", "splice"))
    if kind == "flip" and size:
        flipped = bytearray(content)
        for _ in range(1 << generator.randrange(4)):
            flipped[generator.randrange(size)] ^= 1 << generator.randrange(8)
        return bytes(flipped)
    if kind == "cut":
        return head
    if kind == "zero":
        return head + bytes(length) + tail
    if kind == "insert":
        return head + generator.randbytes(1 << generator.randrange(7)) + part + tail
    if kind == "double":
        return head + part + part + tail
    if kind == "drop":
        return head + tail
    if kind == "number":
        width = generator.choice((1, 2, 4, 8))
        number = generator.choice(NUMBERS) % 256**width
        return head + number.to_bytes(width, generator.choice(("little", "big"))) + content[place + width :]
    start = generator.randrange(len(other) + 1)
    return head + other[start : start + 2 * length] + tail
