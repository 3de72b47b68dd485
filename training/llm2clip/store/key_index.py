"""Finding rows by their keys: sorted, in memory or in a file that is mapped, with no list of keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# The keys are sorted in so many parts, of which one is in memory.
BUCKETS = 256
ENTRY = np.dtype([("high", "<i8"), ("low", "<i8"), ("rows", "<i8")])
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


def sorted_columns(parts: Iterable[np.ndarray], folder: Path) -> dict[str, Tensor]:
    """Sort keys on disk.

    Args:
        parts: The keys of consecutive rows, (n, 2) int64 each; one part is in memory at a time.
        folder: An empty folder, into which the result is mapped.

    Returns:
        The columns of a [`KeyIndex`], (n,) int64.
    """
    first = 0
    for keys in parts:
        _scatter(folder, keys, first)
        first += len(keys)
    if not first:
        return {name: torch.empty(0, dtype=torch.int64) for name in COLUMNS}
    for entries in _sorted_buckets(folder):
        for name in COLUMNS:
            with (folder / name).open("ab") as file:
                file.write(entries[name].tobytes())
    # Copy-on-write, since torch warns of what is read-only.
    return {name: torch.from_numpy(np.memmap(folder / name, dtype="<i8", mode="c")) for name in COLUMNS}


def _scatter(folder: Path, keys: np.ndarray, first: int) -> None:
    """Append keys to the files of their buckets."""
    entries = np.empty(len(keys), dtype=ENTRY)
    entries["high"], entries["low"] = keys[:, 0], keys[:, 1]
    entries["rows"] = np.arange(first, first + len(keys))
    entries = entries[np.argsort(entries["high"], kind="stable")]
    buckets, starts = np.unique((entries["high"] >> 56) + BUCKETS // 2, return_index=True)
    for bucket, start, stop in zip(buckets, starts, np.append(starts, len(entries))[1:], strict=True):
        with (folder / str(bucket)).open("ab") as file:
            file.write(entries[start:stop].tobytes())


def _sorted_buckets(folder: Path) -> Iterator[np.ndarray]:
    for bucket in range(BUCKETS):
        path = folder / str(bucket)
        if path.exists():
            entries = np.fromfile(path, dtype=ENTRY)
            yield entries[np.argsort(entries["high"], kind="stable")]
