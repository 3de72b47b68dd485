"""The embeddings of captions by two text encoders, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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

    The number of a row is made of those that it has in both caches.

    The number of a row combines those of both caches, so that it may exceed their numbers of rows.

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
            encoder=" and ".join(manifest.encoder for manifest in manifests),
            identity=identity,
            width=first.width + second.width,
        )
        super().__init__(Path(f"{first.path} and {second.path}"), manifest, first.shards)

    def __reduce__(self) -> tuple[Any, ...]:
        return PairedCache, self.halves

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the numbers of the rows with the given keys, (n,) int64; -1 for a key that one of both lacks."""
        first, second = (half.find(keys) for half in self.halves)
        return np.where((first >= 0) & (second >= 0), first * len(self.halves[1]) + second, -1)

    def rows(self, captions: Sequence[str]) -> np.ndarray:
        first, second = (half.rows(captions) for half in self.halves)  # whose error names the cache that lacks one
        return first * len(self.halves[1]) + second

    def read(self, rows: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """Return rows by their numbers, (n, width); by default in the dtype of the first cache."""
        numbers = np.divmod(rows, len(self.halves[1]))
        parts = [half.read(own, torch.float32) for half, own in zip(self.halves, numbers, strict=True)]
        result = torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1)
        return result.to(dtype or self._dtype)

    def require_unchanged(self, rank: int = 0, world_size: int = 1) -> None:
        for half in self.halves:
            half.require_unchanged(rank, world_size)

    def map(self) -> None:
        for half in self.halves:
            half.map()
