"""16 bytes for a row, and many of them sorted, by which a run knows which rows an index has."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

SIZE = 16
BINARY = pa.binary(SIZE)
DTYPE = np.dtype(f"S{SIZE}")


def digest(value: bytes) -> bytes:
    """Hash bytes."""
    return hashlib.blake2b(value, digest_size=SIZE).digest()


def row_digests(columns: Sequence[Sequence[Any]]) -> pa.Array:
    """Hash the values of each row."""
    return pa.array([digest(repr(row).encode()) for row in zip(*columns, strict=True)], BINARY)


def digest_array(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Convert a column of digests to `(n,)` bytes."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [np.frombuffer(chunk.buffers()[1], DTYPE)[chunk.offset :][: len(chunk)] for chunk in chunks if len(chunk)]
    return np.concatenate(parts) if parts else np.empty(0, DTYPE)


class KnownDigests:
    """Digests of the rows of an index, sorted, with the number of each row; 25 bytes a row.

    Args:
        digests, numbers: Digests and row numbers, each `(n,)`, of some of the rows at a time.
    """

    def __init__(self, digests: Sequence[np.ndarray], numbers: Sequence[np.ndarray]) -> None:
        joined = np.concatenate(digests) if digests else np.empty(0, DTYPE)
        joined_numbers = np.concatenate(numbers) if numbers else np.empty(0, np.int64)
        order = np.argsort(joined, kind="stable")
        self._digests, self._numbers = joined[order], joined_numbers[order]
        self._seen = np.zeros(len(order), dtype=bool)

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, digests: np.ndarray) -> np.ndarray:
        """Return the row number of each digest, `(n,)` int64, -1 where there is none, and mark it as seen."""
        numbers = np.full(len(digests), -1, dtype=np.int64)
        if not len(self._digests):
            return numbers
        places = np.searchsorted(self._digests, digests).clip(max=len(self._digests) - 1)
        found = self._digests[places] == digests
        numbers[found] = self._numbers[places[found]]
        self._seen[places[found]] = True
        return numbers

    def unseen(self) -> np.ndarray:
        """Return the numbers of the rows whose digest no call of `find` has found."""
        firsts = np.searchsorted(self._digests, self._digests)  # equal digests are seen together
        return np.sort(self._numbers[~self._seen[firsts]])

    def repeated(self) -> np.ndarray:
        """Return the numbers of all rows but one of each digest."""
        return self._numbers[1:][self._digests[1:] == self._digests[:-1]]
