"""An index that is open for searching."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.index_rows import Found, IndexRows, IndexStore
from llm2clip.search.stores import open_store

# The largest number that databases take.
MOST_FOUND = 2**63 - 1


@dataclass
class ImageIndex:
    """An index that is open for searching. Updates by other processes do not change it; open it again to see them.

    Attributes:
        place: Its folder or URL, or its table and database.
        rows: One row per image: `key`, the columns of the images, and the embedding.
    """

    place: str
    manifest: IndexManifest
    rows: IndexRows

    @classmethod
    def open(cls, place: str | Path, postgres: str | None = None) -> ImageIndex:
        """Open an index.

        Args:
            place: Its folder or URL; in a database, its table.
            postgres: URL of the database.

        Raises:
            ConnectionError: The database or object store cannot be reached.
            FileNotFoundError: There is no complete index.
            ImportError: The library of the object store is not installed.
            ValueError: The index is damaged.
        """
        return cls.of_store(open_store(place, postgres))

    @classmethod
    def of_store(cls, store: IndexStore) -> ImageIndex:
        """Open the index of a store; see [`ImageIndex.open`]."""
        manifest = store.require_manifest()
        return cls(store.place, manifest, store.rows(manifest))

    def __len__(self) -> int:
        return self.manifest.images

    def search(self, queries: np.ndarray, top: int, where: str | None = None) -> Found:
        """Find the images that are nearest to each query; see [`IndexRows.search`].

        Raises:
            ValueError: As there, or `top` is less than 1.
        """
        if top < 1:
            raise ValueError(f"top must be at least 1, not {top}.")
        return self.rows.search(queries, min(top, MOST_FOUND), where)

    def first(self, where: str) -> dict[str, Any] | None:
        """Return a row that fulfils a condition, or None."""
        batches = self.rows.scan(self.rows.columns, where)
        return next((row for batch in batches for row in batch.to_pylist()), None)
