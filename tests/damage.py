"""Damage to files and documents, for tests that it is found."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def flip(path: Path, place: int | None = None, bit: int = 0) -> Iterator[None]:
    """Flip a bit of a byte of a file, by default the lowest one in the middle; at the end it is as it was."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2 if place is None else place] ^= 1 << bit
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(content)


# What lengths, offsets and counts in a file are replaced by.
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
KINDS = ("flip", "flip", "cut", "zero", "insert", "double", "drop", "number", "splice", "other")


def mutated(content: bytes, generator: random.Random, other: bytes = b"", kind: str | None = None) -> bytes:
    """Damage the content of a file: flips, a cut, zeros, a number, or a part that is inserted, doubled or missing.

    Args:
        other: Another file, which may replace this one or a part of it.
        kind: One of `KINDS`; drawn by default.
    """
    size = len(content)
    place = generator.randrange(size + 1)
    length = min(size - place, 1 << generator.randrange(12))
    head, part, tail = content[:place], content[place : place + length], content[place + length :]
    kind = kind or generator.choice(KINDS)
    if kind == "flip" and size:
        flipped = bytearray(content)
        for _ in range(1 << generator.randrange(4)):
            flipped[generator.randrange(size)] ^= 1 << generator.randrange(8)
        return bytes(flipped)
    if kind == "number":
        width = generator.choice((1, 2, 4, 8))
        number = generator.choice(NUMBERS) % 256**width
        return head + number.to_bytes(width, generator.choice(("little", "big"))) + content[place + width :]
    start = generator.randrange(len(other) + 1)
    return {
        "cut": head,
        "zero": head + bytes(length) + tail,
        "insert": head + generator.randbytes(1 << generator.randrange(7)) + part + tail,
        "double": head + part + part + tail,
        "drop": head + tail,
        "other": other,
    }.get(kind, head + other[start : start + 2 * length] + tail)


# What a field of a document may have in the place of its value.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, -1.0, 2**63, 10**30, float("nan"), float("inf")),
    *("", " ", "x", "1", "-1", "1e-4", "null", "\x00", "é", "👍", "../..", "/", "a" * 5000, "[1, 2", "{a: b}"),
    *([], [None], [[]], [1, "a"], {}, {"a": 1}, {"": None}, [{}], {"path": {"path": {}}}),
)


def _places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document."""
    yield path
    entries: Any = ()
    if isinstance(document, dict | list):
        entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in entries:
        yield from _places(value, (*path, key))


def changed(document: Any, generator: random.Random) -> Any:
    """Replace or remove one to three values of a JSON document, or add one."""
    result = copy.deepcopy(document)
    for _ in range(generator.randint(1, 3)):
        value = copy.deepcopy(generator.choice(VALUES))
        path = generator.choice([*_places(result)])
        if not path:
            if generator.random() < 0.1:
                return value
            if isinstance(result, dict):
                result[generator.choice(["x", "", "a.b", "__class__"])] = value
            continue
        parent = result
        for key in path[:-1]:
            parent = parent[key]
        if generator.random() < 0.25:
            del parent[path[-1]]
        else:
            parent[path[-1]] = value
    return result
