"""Reading a cache of embeddings: memory-mapped rows, found by their keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch

from llm2clip.embedding.cache_files import (
    CacheDamagedError,
    CacheIncompleteError,
    Shard,
    StoreManifest,
    open_shard,
    require_unchanged,
    shard_name,
)
from llm2clip.utils.files import MappedFile

ManifestT = TypeVar("ManifestT", bound=StoreManifest)

SCAN_ROWS = 4096
# Integers by the bytes of a stored value.
INTEGERS = {2: torch.int16, 4: torch.int32}
# The bits of the exponent of a stored value, which are all set where it is not finite.
EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}


class KeyIndex:
    """Finds the rows of distinct keys, (n, 2) int64, by binary search: 20 bytes per key, no Python objects."""

    def __init__(self, keys: np.ndarray) -> None:
        order = np.argsort(keys[:, 0], kind="stable")
        self._order = order.astype(np.uint32) if len(order) < 2**32 else order
        self._high = keys[order, 0]
        self._low = keys[order, 1]

    @classmethod
    def of_sorted(cls, high: np.ndarray, low: np.ndarray, rows: np.ndarray) -> KeyIndex:
        """Return the index of keys that are sorted by their first halves, which may be mapped into memory.

        Args:
            high, low: (n,) int64, the halves of the keys; those that repeat are found at their first place.
            rows: (n,), what [`KeyIndex.find`] returns.
        """
        index = cls.__new__(cls)
        index._high, index._low, index._order = high, low, rows
        return index

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
            rows[pending[hit]] = self._order[position[pending[hit]]]
            pending = pending[~hit]
            position[pending] += 1
        return rows

    def find_one(self, high: int, low: int) -> int:
        """Return the row of a key, given by its halves, or -1; for one key, several times faster than `find`."""
        position = int(self._high.searchsorted(high))
        while position < len(self) and self._high[position] == high:
            if self._low[position] == low:
                return int(self._order[position])
            position += 1
        return -1


class KeyedRows(Generic[ManifestT]):
    """The rows of a complete cache, which are in one order over all its shards."""

    def __init__(self, path: Path, manifest: ManifestT, shards: list[Shard]) -> None:
        self.path = path
        self.manifest = manifest
        self._shards = [shard.embeddings() for shard in shards]
        self._files = [MappedFile(shard.path) for shard in shards]
        self._dtype: torch.dtype = getattr(torch, manifest.dtype)
        self._integer = INTEGERS[self._dtype.itemsize]
        self._exponent = EXPONENTS[manifest.dtype]
        self._bits = [shard.view(self._integer).numpy() for shard in self._shards]
        self._index = KeyIndex(np.concatenate([np.empty((0, 2), np.int64), *(shard.keys() for shard in shards)]))
        self._starts = np.cumsum([0, *manifest.shards])

    @staticmethod
    def open_shards(folder: Path, manifest: StoreManifest) -> list[Shard]:
        """Open the shards of a complete cache.

        Raises:
            CacheIncompleteError: It was not built to the end.
            CacheDamagedError: A shard is missing or truncated.
        """
        if manifest.status != "complete":
            raise CacheIncompleteError(
                f"The {manifest.NAME} {folder} is incomplete: its build of {manifest.num_rows} {manifest.UNIT}s was "
                f"interrupted. {manifest.REMEDY.capitalize()}; it continues where it stopped."
            )
        return [open_shard(folder, manifest, number) for number in range(len(manifest.shards))]

    def __len__(self) -> int:
        return len(self._index)

    def shard_path(self, number: int) -> Path:
        """Return the path of a shard, for messages."""
        return self.path / shard_name(number)

    @property
    def hidden_size(self) -> int:
        """Width of a row."""
        return self.manifest.hidden_size

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the numbers of the rows with the given keys, (n,) int64; -1 for an unknown key."""
        return self._index.find(keys)

    def find_one(self, high: int, low: int) -> int:
        """Return the number of the row with a key, given by its halves; -1 for an unknown key."""
        return self._index.find_one(high, low)

    def read(self, rows: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return rows by their numbers, (n, hidden); by default in the dtype of the cache.

        Raises:
            CacheDamagedError: A row is not finite, or its shard has been cut short.
        """
        # As integers, because numpy has no bfloat16; numpy copies single rows faster than torch.
        if len(self._bits) == 1:
            self._require_whole(0)
            bits = self._bits[0][rows]
        else:
            bits = torch.empty((len(rows), self.hidden_size), dtype=self._integer).numpy()
            numbers = np.searchsorted(self._starts, rows, side="right") - 1
            for number in np.unique(numbers):
                self._require_whole(number)
                places = np.flatnonzero(numbers == number)
                bits[places] = self._bits[number][rows[places] - self._starts[number]]
        result = torch.from_numpy(bits).view(self._dtype)
        if bits.size and (bits & self._exponent).max() == self._exponent:
            self._check_rows(result, rows)
        return result if dtype is None else result.to(dtype)

    def check_finite(self, rank: int = 0, world_size: int = 1) -> None:
        """Read every row once and check that it is finite; several processes share the shards.

        Raises:
            CacheDamagedError: A row is not finite, or its shard has been cut short.
        """
        for number in range(rank, len(self._shards), world_size):
            shard = self._shards[number]
            for start in range(0, len(shard), SCAN_ROWS):
                self._require_whole(number)
                first = int(self._starts[number]) + start
                self._check_rows(shard[start : start + SCAN_ROWS], range(first, first + SCAN_ROWS))

    def check_shards(self, rank: int = 0, world_size: int = 1) -> None:
        """Check that every row is finite and every shard the file that was written; processes share the shards.

        Raises:
            CacheDamagedError: A row is not finite, or a shard does not have the checksum of the manifest.
        """
        self.check_finite(rank, world_size)
        for number in range(rank, len(self._shards), world_size):
            require_unchanged(self.path, self.manifest, number)

    def _require_whole(self, number: int) -> None:
        if self._files[number].is_cut():
            raise CacheDamagedError(
                f"The shard {self.shard_path(number)} was cut short while it was open; delete the file and "
                f"{self.manifest.REMEDY}, which only computes what is missing."
            )

    def _check_rows(self, embeddings: torch.Tensor, rows: Sequence[int] | np.ndarray) -> None:
        """Raise an error that names the shard of the first of `rows` whose values are not finite."""
        bad = (~torch.isfinite(embeddings).all(dim=1)).nonzero()
        if len(bad):
            row = int(rows[int(bad[0])])
            number = int(np.searchsorted(self._starts, row, side="right")) - 1
            raise CacheDamagedError(
                f"Row {row - self._starts[number]} of the shard {self.shard_path(number)} is not finite; "
                f"delete the file and {self.manifest.REMEDY}, which only computes what is missing."
            )
