"""Wrong JSON and YAML documents, made of right ones."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from tests.damage import mutated

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


def variants(document: Any, count: int) -> Iterator[bytes]:
    """Wrong files: documents with other values, and damaged ones."""
    content = json.dumps(document, indent=2).encode()
    for seed in range(count):
        if seed % 2:
            yield mutated(content, random.Random(seed))
        else:
            yield json.dumps(changed(document, seed)).encode()
