"""The embeddings of captions by two text encoders, side by side."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llm2clip.store.store import EmbeddingCache
from modeling_llm2clip.identity_llm2clip import pair_fingerprint


class PairedCache(EmbeddingCache):
    """The rows of the captions that two caches have, each of unit length, side by side (paper, table 8).

    A row has the number that it has in the first cache.

    Args:
        first, second: The caches of both text encoders of a model, in its order.
    """

    def __init__(self, first: EmbeddingCache, second: EmbeddingCache) -> None:
        self.halves = first, second
        manifests = first.manifest, second.manifest
        identity = {**first.manifest.identity, "normalize": True}
        for name in ("fingerprint", "tokenizer_fingerprint"):
            identity[name] = pair_fingerprint(manifest.identity[name] for manifest in manifests)
        manifest = replace(
            first.manifest,
            encoder=" and ".join(one.encoder for one in manifests),
            identity=identity,
            width=first.width + second.width,
        )
        super().__init__(Path(f"{first.path} and {second.path}"), manifest, first.shards)

    def __reduce__(self) -> tuple[Any, ...]:
        return PairedCache, self.halves

    @cached_property
    def _second_rows(self) -> np.ndarray:
        """The row in the second cache of each row of the first; -1 if it has none."""
        keys = [np.empty((0, 2), np.int64), *(shard.keys() for shard in self.shards)]
        return self.halves[1].find(np.concatenate(keys))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the numbers of the rows with the given keys, (n,) int64; -1 for a key that one of both lacks."""
        rows = self.halves[0].find(keys)
        return np.where((rows >= 0) & (self._second_rows[rows] >= 0), rows, -1)

    def rows(self, captions: Any) -> np.ndarray:
        for half in self.halves:  # whose error names the cache that lacks a caption
            half.rows(captions)
        return self.halves[0].rows(captions)

    def read(self, rows: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """Return rows by their numbers, (n, width); by default in the dtype of the first cache."""
        first, second = self.halves
        own = np.where(rows < 0, -1, self._second_rows[rows])
        parts = first.read(rows, torch.float32), second.read(own, torch.float32)
        result = torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1)
        return result.to(dtype or first._dtype)

    def require_unchanged(self, rank: int = 0, world_size: int = 1) -> None:
        for half in self.halves:
            half.require_unchanged(rank, world_size)

    def map(self) -> None:
        for half in self.halves:
            half.map()
        assert len(self._second_rows) == len(self)
