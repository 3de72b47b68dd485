"""Wrong JSON and YAML documents, made of right ones."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, -1.0, 2**63, 10**30, float("nan"), float("inf")),
    *("", " ", "x", "1", "-1", "null", "\x00", "é", "👍", "../..", "/", "a" * 5000, "[1, 2", "{a: b}"),
    *([], [None], [[]], [1, "a"], {}, {"a": 1}, {"": None}, [{}], {"path": {"path": {}}}),
)


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document."""
    yield path
    entries = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in entries:
        yield from places(value, (*path, key))


def changed(document: Any, seed: int) -> Any:
    """Replace or remove one to three values of a document, or add one."""
    generator = random.Random(seed)
    result = copy.deepcopy(document)
    for _ in range(generator.randint(1, 3)):
        path = generator.choice([*places(result)])
        if not path:
            if generator.random() < 0.1:
                return copy.deepcopy(generator.choice(VALUES))
            if isinstance(result, dict):
                result[generator.choice(["x", "", "a.b", "__class__"])] = copy.deepcopy(generator.choice(VALUES))
            continue
        parent = result
        for key in path[:-1]:
            parent = parent[key]
        if generator.random() < 0.25:
            del parent[path[-1]]
        else:
            parent[path[-1]] = copy.deepcopy(generator.choice(VALUES))
    return result


def broken(content: bytes, seed: int) -> bytes:
    """Cut a file, overwrite a part of it, or flip bits."""
    generator = random.Random(seed)
    place = generator.randrange(len(content)) if content else 0
    kind = generator.randrange(4)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes(16) + content[place + 16 :]
    if kind == 2:
        return content[:place] + generator.randbytes(8) + content[place:]
    flipped = bytearray(content)
    for _ in range(min(3, len(flipped))):
        flipped[generator.randrange(len(flipped))] ^= 1 << generator.randrange(8)
    return bytes(flipped)


def variants(document: Any, count: int) -> Iterator[bytes]:
    """Wrong files: documents with other values, and damaged ones."""
    content = json.dumps(document, indent=2).encode()
    for seed in range(count):
        if seed % 2:
            yield broken(content, seed)
        else:
            yield json.dumps(changed(document, seed)).encode()
