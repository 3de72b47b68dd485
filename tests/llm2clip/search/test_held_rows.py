"""Searches under a condition that is asked for again compare all rows that fulfil it, in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llm2clip.search import held_rows
from llm2clip.search.held_rows import HeldRows


def unit(count: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, 16), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Rows:
    """Rows under conditions, and which were read."""

    def __init__(self) -> None:
        self.embeds = {"a": unit(30, 0).astype(np.float16), "b": unit(20, 1).astype(np.float16)}
        self.read: list[str] = []

    def __call__(self, where: str) -> tuple[np.ndarray, np.ndarray]:
        self.read.append(where)
        return 100 + np.arange(len(self.embeds[where])), self.embeds[where]


def test_rows_are_read_when_that_pays_and_searched_exactly() -> None:
    rows = Rows()
    held, queries = HeldRows(rows), unit(3, 2)
    assert held.search(queries, 4, "a", 30) is None
    assert held.search(queries, 4, "a", 30) is None
    assert held.search(queries, 4, "b", 20) is None
    assert rows.read == []
    found: Any = held.search(queries, 4, "a", 30)
    assert rows.read == ["a"]
    embeds = rows.embeds["a"].astype(np.float64)
    cosines = queries @ (embeds / np.linalg.norm(embeds, axis=1, keepdims=True)).T
    best = np.argsort(-cosines, axis=1)[:, :4]
    np.testing.assert_array_equal(found[1], 100 + best)
    np.testing.assert_allclose(found[0], np.take_along_axis(cosines, best, axis=1), atol=1e-6)
    again: Any = held.search(queries[:1], 50, "a", 30)
    assert again[1].shape == (1, 30)
    assert rows.read == ["a"]


def test_memory_is_bounded_and_the_condition_used_longest_ago_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_rows, "MAX_BYTES", 30 * 16 * 4)
    rows = Rows()
    held, queries = HeldRows(rows), unit(9, 2)
    assert held.search(queries, 4, "a", 31) is None
    for where, count in (("a", 30), ("b", 20), ("b", 20), ("a", 30)):
        assert held.search(queries, 4, where, count) is not None
    assert rows.read == ["a", "b", "a"]
    monkeypatch.setattr(held_rows, "MAX_ROWS", 29)
    assert held.search(queries, 4, "a", 30) is None


def test_conditions_that_do_not_come_again_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_rows, "MAX_CONDITIONS", 3)
    once = HeldRows(Rows())
    for number in range(10):
        assert once.search(unit(1, 2), 4, f"condition {number}", 30) is None
    assert list(once._asked) == ["condition 7", "condition 8", "condition 9"]
    often = HeldRows(lambda where: (np.arange(1), unit(1, 0)))
    for number in range(10):
        assert often.search(unit(9, 2), 4, f"condition {number}", 1) is not None
    assert list(often._held) == ["condition 7", "condition 8", "condition 9"]
