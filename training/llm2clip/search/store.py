"""The interface of a store of indexes: where the table of an index is, which is derived from stored embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from llm2clip.search.index_manifest import IndexManifest

KEY = "key"
# The digest of the image or caption of a row, by which its embedding is found.
DIGEST = "_digest"
VECTOR = "vector"
# Columns that describe no row, and what LanceDB calls the number of one.
INTERNAL = (DIGEST, VECTOR, "_rowid")
# Columns that conditions rarely name; the others get an index.
UNINDEXED = {"caption", "hash", "mtime_ns", "row", "size", *INTERNAL}
# Stores compare with a query that is rounded to 16 bits; so many more than asked for are compared exactly afterwards.
MORE = 4


class IndexStore(Protocol):
    """The location of an index: a folder, a URL, or a table of a database.

    A run writes a new table beside the one that there is, which searches see until the new one is whole. What the
    table is made of, embeddings and a list of rows, is in a local folder; see [`rows_folder`].

    Attributes:
        location: Its name in messages.
        index_types: Types of vector index that it has: flat, and the one for many images.
        local_folder: The folder of the index, if it is a local one.
    """

    location: str
    index_types: tuple[str, ...]
    local_folder: Path | None

    def require_own(self) -> None:
        """Find out before a long run whether an index can be written there.

        Raises:
            FileExistsError: Something else than an index is there.
            PermissionError: The user may not write.
        """
        ...

    def metadata(self) -> IndexManifest | None:
        """Read the manifest; None if there is no index.

        Raises:
            ValueError: It is damaged.
        """
        ...

    def open(self) -> IndexManifest | None:
        """Open the table for `search` and `keys`; return its manifest, None if there is no index.

        Raises:
            ValueError: The manifest or the table is damaged, or the table is lost.
        """
        ...

    def replace(self, manifest: IndexManifest, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
        """Write a new table, index its rows as the manifest says, and let searches see it, in one step.

        The manifest gets what the store adds to it. What earlier runs have left is deleted, but for the table that was
        there before, which readers may have open.
        """
        ...

    def keys(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Read columns of all rows of the open table, in the order in which they were written."""
        ...

    def search(self, queries: np.ndarray, k: int, where: str | None = None) -> list[pa.Table]:
        """Find the rows of the open table whose embeddings have the largest cosines with each query.

        Args:
            queries: `(n, width)` unit vectors, float32.
            where: A condition that the rows fulfil; see [`parse_where`].

        Returns:
            For each query at most `k` rows with all columns and `VECTOR`, in any order.

        Raises:
            ValueError: `where` is no condition on the columns, the rows are damaged, or an index that cannot be
                searched in place of it has replaced the one that was opened.
        """
        ...
