"""What an index stores, and what a database must be able to do to store it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from llm2clip.search.index_manifest import IndexManifest

KEY = "key"
# 16 bytes that differ as soon as anything but the embedding of a row differs.
ID = "_id"
VECTOR = "vector"
# Why a row has no embedding. Only rows of an unfinished run have one.
REASON = "_reason"
# Number of a row, by which a database finds it; it may change when the index is published.
NUMBER = "_rowid"
INTERNAL = (ID, VECTOR, REASON)

Found = list[list[tuple[float, dict[str, Any]]]]


class IndexRows(Protocol):
    """The rows of one version of an index. What other processes write does not change them."""

    @property
    def columns(self) -> list[str]:
        """Columns that describe a row: all but `INTERNAL`."""
        ...

    def count(self, where: str | None = None) -> int:
        """Count the rows that fulfil a condition in SQL; ValueError if it is none."""
        ...

    def scan(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        """Read all rows in batches: `columns`, and their numbers as `NUMBER`."""
        ...

    def take(self, numbers: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Read the rows with these numbers, in their order."""
        ...

    def search(self, queries: np.ndarray, top: int, where: str | None = None) -> Found:
        """Find the rows whose embeddings have the largest cosines with each query.

        Args:
            queries: `(n, width)` unit vectors, float32.
            where: Condition in SQL that the rows fulfil.

        Returns:
            For each query, pairs of cosine and row without the columns `INTERNAL`, best first.

        Raises:
            ValueError: `where` is no condition on the columns, or the stored rows are damaged.
        """
        ...


class UnfinishedRows(IndexRows, Protocol):
    """The rows that a run writes. Searches see none of them until they are published."""

    @property
    def is_published(self) -> bool:
        """Whether these are the rows of the complete index: nothing has been written since."""
        ...

    def append(self, rows: pa.Table) -> None:
        """Add rows with all columns of the schema, in one step that happens or does not."""
        ...

    def delete(self, numbers: np.ndarray) -> None:
        """Delete the rows with these numbers."""
        ...

    def publish(self, manifest: IndexManifest, failures: list[dict[str, Any]]) -> None:
        """Index the rows as the manifest says, and let all later searches see them, in one step.

        Rows with a `REASON` are deleted before. The manifest gets what the store adds to it.
        """
        ...


class IndexStore(Protocol):
    """The place of an index: a folder, or a database.

    Attributes:
        place: Its name in messages.
        index_types: Types of vector index that it has: flat, the one for many images, and others.
    """

    place: str
    index_types: tuple[str, ...]

    def require_own(self) -> None:
        """Raise FileExistsError if something else than an index is there."""
        ...

    def lock(self) -> AbstractContextManager[None]:
        """Keep other runs out; ValueError if one is writing."""
        ...

    def manifest(self) -> IndexManifest | None:
        """Read the manifest of the complete index, or return None if there is none; ValueError if it is damaged."""
        ...

    def require_manifest(self) -> IndexManifest:
        """Read the manifest of the complete index; FileNotFoundError, with what to do, if there is none."""
        ...

    def rows(self, manifest: IndexManifest) -> IndexRows:
        """Open the rows of the complete index; ValueError if they are damaged."""
        ...

    def unfinished(self) -> tuple[IndexManifest, UnfinishedRows] | None:
        """Open what the last run wrote, complete or not, with the manifest it began with; None if there is none."""
        ...

    def create(self, manifest: IndexManifest, schema: pa.Schema) -> UnfinishedRows:
        """Begin an empty index. An existing one stays until this one is published."""
        ...

    def revert(self) -> UnfinishedRows:
        """Drop what was written since the complete index was published, and open the rows of that one for a run."""
        ...

    def failures(self) -> list[dict[str, Any]] | None:
        """Read keys and reasons of what the complete index lacks; None if that list is damaged."""
        ...

    def remove_empty(self) -> None:
        """Delete what a run has begun if that has no rows and there is no complete index."""
        ...
