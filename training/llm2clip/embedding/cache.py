"""Reading an embedding cache: memory-mapped embeddings, found by the text of the caption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2clip.data.records import caption_keys
from llm2clip.embedding.cache_files import (
    TWO_RULES,
    CacheDamagedError,
    CacheIncompleteError,
    CacheManifest,
    CacheMismatchError,
    MissingCaptionError,
    open_shard,
    shard_name,
)
from modeling_llm2clip.identity_llm2clip import is_earlier_rule

SCAN_ROWS = 4096


class KeyIndex:
    """Finds the rows of distinct keys, (n, 2) int64, by binary search: 20 bytes per key, no Python objects."""

    def __init__(self, keys: np.ndarray) -> None:
        order = np.argsort(keys[:, 0], kind="stable")
        self._order = order.astype(np.uint32) if len(order) < 2**32 else order
        self._high = keys[order, 0]
        self._low = keys[order, 1]

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


class EmbeddingCache:
    """A complete embedding cache, opened for reading by [`EmbeddingCache.open`]."""

    def __init__(self, path: Path, manifest: CacheManifest, shards: list[torch.Tensor], index: KeyIndex) -> None:
        self.path = path
        self.manifest = manifest
        self._shards = shards
        self._bits = [shard.view(torch.int16).numpy() for shard in shards]
        self._index = index
        self._starts = np.cumsum([0, *manifest.shards])

    @classmethod
    def open(
        cls,
        path: str | Path,
        fingerprint: str | None = None,
        verify: bool = True,
        tokenizer_fingerprint: str | None = None,
    ) -> EmbeddingCache:
        """Open a cache.

        Args:
            path: The folder.
            fingerprint: Identity of the text encoder that must have made the cache. None accepts any.
            verify: Read every embedding once, see `check_finite`. Turn it off for large caches: rows are also checked
                when they are looked up.
            tokenizer_fingerprint: Identity of the tokenizer that must have made the cache. None accepts any.

        Raises:
            FileNotFoundError: There is no cache.
            CacheMismatchError: Another encoder or tokenizer made it.
            CacheIncompleteError: It was not built to the end.
            CacheDamagedError: A shard is missing, truncated or contains a row that is not finite.
            CacheError: It has another format version.
        """
        folder = Path(path)
        manifest = CacheManifest.read(folder)
        _refuse_other_encoder(folder, manifest, fingerprint, tokenizer_fingerprint)
        if manifest.status != "complete":
            raise CacheIncompleteError(
                f"The embedding cache {folder} is incomplete: its build of {manifest.num_captions} captions was "
                "interrupted. Run the same `llm2clip embed` again; it continues where it stopped."
            )
        shards = [open_shard(folder, manifest, number) for number in range(len(manifest.shards))]
        index = KeyIndex(np.concatenate([np.empty((0, 2), np.int64), *(shard.keys() for shard in shards)]))
        cache = cls(folder, manifest, [shard.embeddings() for shard in shards], index)
        if verify:
            cache.check_finite()
        return cache

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself: their content is not sent.
        return type(self).open, (self.path, self.manifest.fingerprint, False)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def hidden_size(self) -> int:
        """Width of an embedding."""
        return self.manifest.hidden_size

    def contains(self, captions: Sequence[str]) -> np.ndarray:
        """Tell which captions have an embedding, (n,) bool."""
        return self._index.find(caption_keys(captions)) >= 0

    def lookup(self, captions: Sequence[str], dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
        """Return the embeddings of captions, found by their exact text.

        Args:
            captions: n captions, which may repeat.
            dtype: Dtype of the result; None keeps the dtype of the cache, which is fastest.

        Returns:
            (n, hidden).

        Raises:
            MissingCaptionError: A caption has no embedding.
            CacheDamagedError: A row is not finite.
        """
        rows = self._index.find(caption_keys(captions))
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            shown = ", ".join(repr(captions[i][:80]) for i in missing[:3])
            raise MissingCaptionError(
                f"The embedding cache {self.path} ({len(self)} captions) lacks {len(missing)} of {len(captions)} "
                f"captions, such as {shown}. Run `llm2clip embed` on the source of these captions."
            )
        # As integers, because numpy has no bfloat16; numpy copies single rows faster than torch.
        bits = np.empty((len(rows), self.hidden_size), dtype=np.int16)
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            bits[places] = self._bits[number][rows[places] - self._starts[number]]
        result = torch.from_numpy(bits).view(getattr(torch, self.manifest.dtype))
        # A single value that is not finite makes the sum not finite; only then is it located.
        if not torch.isfinite(result.sum(dtype=torch.float32)):
            self._check_rows(result, rows)
        return result if dtype is None else result.to(dtype)

    def check_finite(self, rank: int = 0, world_size: int = 1) -> None:
        """Read every embedding once and check that it is finite; several processes share the shards.

        Raises:
            CacheDamagedError: A row is not finite.
        """
        for number in range(rank, len(self._shards), world_size):
            shard = self._shards[number]
            for start in range(0, len(shard), SCAN_ROWS):
                first = int(self._starts[number]) + start
                self._check_rows(shard[start : start + SCAN_ROWS], range(first, first + SCAN_ROWS))

    def _check_rows(self, embeddings: torch.Tensor, rows: Sequence[int] | np.ndarray) -> None:
        """Raise an error that names the shard of the first of `rows` whose embedding is not finite."""
        bad = (~torch.isfinite(embeddings).all(dim=1)).nonzero()
        if len(bad):
            row = int(rows[int(bad[0])])
            number = int(np.searchsorted(self._starts, row, side="right")) - 1
            raise CacheDamagedError(
                f"Row {row - self._starts[number]} of the shard {self.path / shard_name(number)} is not finite; "
                "delete the file and run `llm2clip embed` again, which only computes what is missing."
            )


def _refuse_other_encoder(
    folder: Path, manifest: CacheManifest, fingerprint: str | None, tokenizer_fingerprint: str | None
) -> None:
    advice = "Use that {}, or embed the captions with this one into another folder (`llm2clip embed`)."
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        earlier = TWO_RULES if is_earlier_rule(manifest.fingerprint) != is_earlier_rule(fingerprint) else ""
        raise CacheMismatchError(
            f"The embedding cache {folder} was made by {manifest.text_model_name} with fingerprint "
            f"{manifest.fingerprint}, but the text encoder in use has fingerprint {fingerprint}.{earlier} "
            + advice.format("encoder")
        )
    known = manifest.tokenizer_fingerprint
    if known is not None and tokenizer_fingerprint is not None and known != tokenizer_fingerprint:
        raise CacheMismatchError(
            f"The embedding cache {folder} was made with the tokenizer {known} of {manifest.text_model_name}, but the "
            f"tokenizer in use is {tokenizer_fingerprint}: other vocabulary, merges, normaliser, added tokens or "
            f"prompt. {advice.format('tokenizer')}"
        )
