"""The embeddings of rows that searches ask for again and again, in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from llm2clip.search.top_k import top_k

ValueT = TypeVar("ValueT")

# Reading the rows of a condition costs as much as about so many searches without them.
QUERIES_BEFORE = 8
# Comparing more rows takes longer than looking through cells.
MAX_ROWS = 30_000
# Of all conditions together.
MAX_BYTES = 128 * 2**20
# Conditions that something is remembered of: a server may get another one with every query.
MAX_CONDITIONS = 1000


@dataclass
class HeldRows:
    """Holds the rows that fulfil the conditions of many searches; the condition used longest ago goes first.

    Args:
        read: Reads the rows that fulfil a condition: numbers `(n,)` and embeddings `(n, width)`.
    """

    read: Callable[[str], tuple[np.ndarray, np.ndarray]]
    _asked: dict[str, int] = field(default_factory=dict)
    _held: dict[str, tuple[np.ndarray, torch.Tensor]] = field(default_factory=dict)

    def search(self, queries: np.ndarray, top: int, where: str, matches: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Compare queries with all rows that fulfil a condition.

        Args:
            queries: `(q, width)`.
            matches: Number of these rows.

        Returns:
            Scores and row numbers, both `(q, min(top, matches))`, best first; None if these rows are too many, or if
            reading them does not pay yet.
        """
        if matches > MAX_ROWS or matches * queries.shape[1] * torch.float32.itemsize > MAX_BYTES:
            return None
        held = self._held.pop(where, None)
        if held is None:
            remember(self._asked, where, self._asked.pop(where, 0) + len(queries))
            if self._asked[where] <= QUERIES_BEFORE:
                return None
            del self._asked[where]
            held = _unit(*self.read(where))
        remember(self._held, where, held)
        while sum(embeds.nbytes for _, embeds in self._held.values()) > MAX_BYTES:
            del self._held[next(iter(self._held))]
        numbers, embeds = held
        scores, places = top_k(torch.from_numpy(np.asarray(queries, dtype=np.float32)), embeds, top)
        return scores.numpy(), numbers[places.numpy()]


def remember(values: dict[str, ValueT], where: str, value: ValueT) -> None:
    """Add the value of a condition; of too many, the one that was added first is forgotten."""
    values[where] = value
    while len(values) > MAX_CONDITIONS:
        del values[next(iter(values))]


def _unit(numbers: np.ndarray, embeds: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """Scale embeddings to unit length again, which rounding to 16 bits has changed."""
    return numbers, torch.nn.functional.normalize(torch.from_numpy(embeds).float(), dim=1)
