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

from llm2clip.files.atomic import digest_json
from llm2clip.store.store import EmbeddingCache
from modeling_llm2clip.modeling_llm2clip_utils import absolute_path

# By what the embeddings of an encoder are known as those of a model.
KNOWN_BY = ("fingerprint", "tokenizer_fingerprint", "prompt_prefix")


class PairedCache(EmbeddingCache):
    """The rows of the captions that two caches have, each of unit length, side by side (paper, table 8).

    The number of a row is made of those that it has in both caches.

    Args:
        first, second: The caches, in the order of the rows of a model.
    """

    def __init__(self, first: EmbeddingCache, second: EmbeddingCache) -> None:
        self.caches = first, second
        identities = [dict(cache.manifest.identity) for cache in self.caches]
        digest = digest_json([[identity[name] for name in KNOWN_BY] for identity in identities])
        known_by = {"fingerprint": digest, "tokenizer_fingerprint": None, "prompt_prefix": ""}
        manifest = replace(
            first.manifest,
            encoder=" and ".join(cache.manifest.encoder for cache in self.caches),
            identity={**identities[0], **known_by, "normalize": True, "caches": identities},
            width=first.width + second.width,
        )
        super().__init__(Path(f"{first.path} and {second.path}"), manifest, first.shards)

    @classmethod
    def of_folders(cls, folders: Sequence[str | Path], verify: bool = True) -> PairedCache:
        """Open two caches; see [`EmbeddingCache.open`].

        Raises:
            ValueError: There are not two folders.
        """
        if len(folders) != 2:
            raise ValueError(f"{len(folders)} embedding caches are given, {', '.join(map(str, folders))}; give two.")
        first, second = (EmbeddingCache.open(folder, verify=verify) for folder in folders)
        return cls(first, second)

    @property
    def encoders(self) -> list[dict[str, Any]]:
        """Name and width of both encoders, as `LLM2CLIPTextConfig(encoders=...)` of a model of such rows has them."""
        return [{"name": absolute_path(cache.manifest.encoder), "width": cache.width} for cache in self.caches]

    def __reduce__(self) -> tuple[Any, ...]:
        return PairedCache, self.caches

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the numbers of the rows with the given keys, (n,) int64; -1 for a key that one of both lacks."""
        first, second = (cache.find(keys) for cache in self.caches)
        return np.where((first >= 0) & (second >= 0), first * len(self.caches[1]) + second, -1)

    def rows(self, captions: Sequence[str]) -> np.ndarray:
        first, second = (cache.rows(captions) for cache in self.caches)  # whose error names the cache that lacks one
        return first * len(self.caches[1]) + second

    def read(self, rows: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """Return rows by their numbers, (n, width); by default in the dtype of the first cache."""
        numbers = np.divmod(rows, len(self.caches[1]))
        parts = [cache.read(own, torch.float32) for cache, own in zip(self.caches, numbers, strict=True)]
        result = torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1)
        return result.to(dtype or self._dtype)

    def require_unchanged(self, rank: int = 0, world_size: int = 1) -> None:
        for cache in self.caches:
            cache.require_unchanged(rank, world_size)

    def map(self) -> None:
        for cache in self.caches:
            cache.map()
