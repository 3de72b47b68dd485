"""Embeddings that are on disk already, memory-mapped, and found by what their images are known by."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from llm2clip.utils.files import atomic_file

EMBEDDING = "embedding"
REASON = "reason"


def embedding_column(embeds: np.ndarray) -> pa.FixedSizeListArray:
    """`(n, width)` float16 or float32 as an Arrow column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(embeds.reshape(-1)), embeds.shape[1])


def embeddings_of(chunk: pa.FixedSizeListArray) -> np.ndarray:
    """The inverse of [`embedding_column`], without a copy."""
    return chunk.flatten().to_numpy(zero_copy_only=True).reshape(len(chunk), -1)


def write_part(path: Path, columns: pa.Table, embeds: np.ndarray, reasons: Sequence[str | None]) -> None:
    """Write a part: whole, or not at all.

    Args:
        path: The file.
        columns: What the images are known by, n rows.
        embeds: `(n, width)`.
        reasons: Why a row has no embedding, or None where it has one.
    """
    table = columns.append_column(REASON, pa.array(reasons, pa.string()))
    table = table.append_column(EMBEDDING, embedding_column(embeds))
    with atomic_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_part(path: Path) -> pa.Table:
    """A part, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


class EmbeddingStore:
    """The rows of tables with embeddings.

    Args:
        identity: Columns by which an image is known.
    """

    def __init__(self, identity: tuple[str, ...]) -> None:
        self.identity = identity
        self.failures: dict[Hashable, str] = {}
        self._places: dict[Hashable, int] = {}
        self._chunks: list[np.ndarray] = []
        self._ends: list[int] = []

    def add(self, table: pa.Table) -> list[Hashable]:
        """Add a table: the columns of `identity`, `embedding`, and `reason` where it has failures.

        Returns:
            What its rows are known by.
        """
        columns = [table.column(name).to_pylist() for name in self.identity]
        known: list[Hashable] = list(zip(*columns, strict=True)) if len(columns) > 1 else columns[0]
        reasons = table.column(REASON).to_pylist() if REASON in table.column_names else [None] * len(known)
        start = self._ends[-1] if self._ends else 0
        for place, (identity, reason) in enumerate(zip(known, reasons, strict=True), start):
            if reason is None:
                self._places[identity] = place
            else:
                self.failures[identity] = reason
        for chunk in table.column(EMBEDDING).chunks:
            self._chunks.append(embeddings_of(chunk))
            self._ends.append((self._ends[-1] if self._ends else 0) + len(chunk))
        return known

    def __contains__(self, identity: Hashable) -> bool:
        return identity in self._places

    def gather(self, identities: Sequence[Hashable]) -> np.ndarray:
        """The embeddings of some images: `(n, width)`."""
        places = np.array([self._places[identity] for identity in identities], dtype=np.int64)
        owners = np.searchsorted(self._ends, places, side="right")
        result = np.empty((len(places), self._chunks[0].shape[1]), dtype=self._chunks[0].dtype)
        for owner in np.unique(owners):
            chosen = owners == owner
            start = self._ends[owner - 1] if owner else 0
            result[chosen] = self._chunks[owner][places[chosen] - start]
        return result

    def close(self) -> None:
        """Let go of the files; the store is empty then."""
        self._chunks, self._ends, self._places = [], [], {}
