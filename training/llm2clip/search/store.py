"""The interface of a store of indexes, and what the stores share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from llm2clip.search.index_manifest import IndexManifest

KEY = "key"
# 16 bytes that differ as soon as anything but the embedding of a row differs.
ID = "_id"
VECTOR = "vector"
# Why a row has no embedding. Only rows of an unfinished run have one; `commit` deletes them.
REASON = "_reason"
# Number of a row, by which a store finds it; it may change with a commit.
NUMBER = "_rowid"
INTERNAL = (ID, VECTOR, REASON, NUMBER, "_generation")
# Columns that conditions rarely name; the others get an index.
UNINDEXED = {"caption", "hash", "mtime_ns", "row", "size", *INTERNAL}
# Stores compare with a query that is rounded to 16 bits; so many more than asked for are compared exactly afterwards.
MORE = 4

Base = Literal["nothing", "commit", "unfinished"]


class IndexStore(Protocol):
    """The location of an index: a folder, or a table of a database.

    Six methods do the work: a run upserts and deletes rows, of which searches see nothing until `commit`; the next run
    after a killed one continues with the rows that are stored. Three more are there because two runs must not write at
    once (`lock`), because a run says what it adds to (`begin`), and because a row that moved keeps its embedding
    (`vectors`).

    Attributes:
        location: Its name in messages.
        index_types: Types of vector index that it has: flat, the one for many images, and others.
    """

    location: str
    index_types: tuple[str, ...]

    def lock(self) -> AbstractContextManager[None]:
        """Keep other runs out. At the end, delete what a run has begun if that has no rows and there is no index.

        Raises:
            FileExistsError: Something else than an index is there.
            ValueError: Another run is writing.
        """
        ...

    def metadata(self, unfinished: bool = False) -> IndexManifest | None:
        """Read the manifest of the last commit, and open it for `search` and `keys`; None if there is none.

        Args:
            unfinished: Read instead the one that the last run began with, if it has not committed.

        Raises:
            ValueError: The index is damaged.
        """
        ...

    def begin(self, manifest: IndexManifest, schema: pa.Schema, base: Base) -> None:
        """Begin to write, on top of the last commit, of the rows of the unfinished run, or of nothing.

        The rows of an unfinished run on which it is not built are dropped. The last commit stays until `commit`.
        """
        ...

    def keys(self, columns: Sequence[str] | None, written: bool = False) -> Iterator[pa.RecordBatch]:
        """Read rows of the last commit: `columns`, and the numbers of the rows as `NUMBER`.

        Args:
            columns: None for all that describe a row: those that are not `INTERNAL`.
            written: Read instead the rows that this run writes, from what it adds to on.
        """
        ...

    def vectors(self, numbers: np.ndarray) -> pa.Table:
        """Read `VECTOR` and `REASON` of the rows with these numbers that this run writes, in their order."""
        ...

    def upsert(self, rows: pa.Table) -> None:
        """Add rows with all columns of the schema, in one step that happens or does not."""
        ...

    def delete(self, numbers: np.ndarray) -> None:
        """Delete the rows with these numbers."""
        ...

    def commit(self, manifest: IndexManifest, failures: list[dict[str, Any]]) -> None:
        """Index the rows as the manifest says, and let searches see them, in one step; does nothing without a change.

        Rows with a `REASON` are deleted before. The manifest gets what the store adds to it.
        """
        ...

    def search(self, queries: np.ndarray, k: int, where: str | None = None) -> list[pa.Table]:
        """Find the rows of the last commit whose embeddings have the largest cosines with each query.

        Args:
            queries: `(n, width)` unit vectors, float32.
            where: A condition that the rows fulfil; see [`parse_where`].

        Returns:
            For each query at most `k` rows with all columns and `VECTOR`, in any order.

        Raises:
            ValueError: `where` is no condition on the columns, or the stored rows are damaged.
        """
        ...


def rows_in_order(rows: pa.Table, numbers: np.ndarray) -> pa.Table:
    """Return the rows with these `numbers`, in their order and as often as they are there, without `NUMBER`."""
    have = rows[NUMBER].to_numpy()
    order = np.argsort(have)
    return rows.take(pa.array(order[np.searchsorted(have, numbers, sorter=order)])).drop_columns([NUMBER])


def is_changed(
    manifest: IndexManifest, failures: list[dict[str, Any]], committed: IndexManifest | None, listed: Any
) -> bool:
    """Return whether a manifest and a list of failures differ from those of the last commit."""
    return committed is None or committed.content() != manifest.content() or listed != failures
