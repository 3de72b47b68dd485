"""Finding rows by their keys, which are sorted, in memory or in a file that is mapped."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

COLUMNS = ("high", "low", "rows")


class KeyIndex:
    """Finds the rows of keys by binary search.

    Args:
        high, low: (n,) int64, the halves of the keys, sorted by the first; those that repeat are found at their first
            row.
        rows: (n,), what [`KeyIndex.find`] returns.
    """

    def __init__(self, high: np.ndarray, low: np.ndarray, rows: np.ndarray) -> None:
        self._high, self._low, self._rows = high, low, rows

    @classmethod
    def of(cls, keys: np.ndarray) -> KeyIndex:
        """Return the index of keys, (n, 2) int64, in memory: 20 bytes a key."""
        order = np.argsort(keys[:, 0], kind="stable")
        rows = order.astype(np.uint32) if len(order) < 2**32 else order
        return cls(keys[order, 0], keys[order, 1], rows)

    def columns(self) -> dict[str, Tensor]:
        """Return what an index is made of, (n,) int64 each."""
        columns = zip(COLUMNS, (self._high, self._low, self._rows), strict=True)
        return {name: torch.from_numpy(column.astype(np.int64)) for name, column in columns}

    def __len__(self) -> int:
        return len(self._high)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the row of each key, (m,) int64; -1 for an unknown key."""
        rows = np.full(len(keys), -1, dtype=np.int64)
        position = np.searchsorted(self._high, keys[:, 0])
        pending = np.arange(len(keys))
        while len(pending):  # more than one round only if first halves collide
            pending = pending[position[pending] < len(self)]
            pending = pending[self._high[position[pending]] == keys[pending, 0]]
            hit = self._low[position[pending]] == keys[pending, 1]
            rows[pending[hit]] = self._rows[position[pending[hit]]]
            pending = pending[~hit]
            position[pending] += 1
        return rows

    def find_one(self, high: int, low: int) -> int:
        """Return the row of a key, given by its halves, or -1; for one key, several times faster than `find`."""
        position = int(self._high.searchsorted(high))
        while position < len(self) and self._high[position] == high:
            if self._low[position] == low:
                return int(self._rows[position])
            position += 1
        return -1
