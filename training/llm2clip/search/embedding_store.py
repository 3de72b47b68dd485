"""Memory-mapped embeddings of an index and of the parts of an unfinished run, looked up by image identity."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from llm2clip.utils.files import atomic_file

EMBEDDING = "embedding"
REASON = "reason"


def embedding_column(embeds: np.ndarray) -> pa.FixedSizeListArray:
    """Convert `(n, width)` float16 or float32 to an Arrow column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(embeds.reshape(-1)), embeds.shape[1])


def write_part(path: Path, columns: pa.Table, embeds: np.ndarray, reasons: Sequence[str | None]) -> None:
    """Write the embeddings of some images to a file, atomically.

    Args:
        columns: Identity columns of the n images.
        embeds: `(n, width)`.
        reasons: Why an image has no embedding, or None if it has one.
    """
    table = columns.append_column(REASON, pa.array(reasons, pa.string()))
    table = table.append_column(EMBEDDING, embedding_column(embeds))
    with atomic_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_part(path: Path) -> pa.Table:
    """Memory-map a part."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


class EmbeddingStore:
    """The embeddings of several tables by image identity, and in `failures` why other images have none.

    Args:
        identity: Columns that identify an image.
    """

    def __init__(self, identity: tuple[str, ...]) -> None:
        self.identity = identity
        self.failures: dict[Hashable, str] = {}
        self._places: dict[Hashable, int] = {}
        self._chunks: list[np.ndarray] = []
        self._starts = [0]

    def add(self, table: pa.Table) -> list[Hashable]:
        """Add a table with the columns of `identity`, `embedding`, and optionally `reason`; return its identities."""
        columns = [table.column(name).to_pylist() for name in self.identity]
        identities: list[Hashable] = list(zip(*columns, strict=True)) if len(columns) > 1 else columns[0]
        reasons = table.column(REASON).to_pylist() if REASON in table.column_names else [None] * len(identities)
        for place, (identity, reason) in enumerate(zip(identities, reasons, strict=True), self._starts[-1]):
            if reason is None:
                self._places[identity] = place
            else:
                self.failures[identity] = reason
        for chunk in table.column(EMBEDDING).chunks:
            self._chunks.append(chunk.flatten().to_numpy(zero_copy_only=True).reshape(len(chunk), -1))
            self._starts.append(self._starts[-1] + len(chunk))
        return identities

    def __contains__(self, identity: Hashable) -> bool:
        return identity in self._places

    def gather(self, identities: Sequence[Hashable]) -> np.ndarray:
        """Look up embeddings: `(n, width)`."""
        places = np.array([self._places[identity] for identity in identities], dtype=np.int64)
        owners = np.searchsorted(self._starts, places, side="right") - 1
        result = np.empty((len(places), self._chunks[0].shape[1]), dtype=self._chunks[0].dtype)
        for owner in np.unique(owners):
            chosen = owners == owner
            result[chosen] = self._chunks[owner][places[chosen] - self._starts[owner]]
        return result
