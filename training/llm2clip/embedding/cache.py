"""Reading an embedding cache: memory-mapped embeddings, found by the text of the caption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2clip.data.records import caption_key, caption_keys
from llm2clip.embedding.cache_files import CacheManifest, CacheMismatchError, MissingCaptionError
from llm2clip.embedding.keyed_rows import KeyedRows


class CaptionEmbeddings(KeyedRows[CacheManifest]):
    """Stored embeddings of captions, found by the exact text."""

    def contains(self, captions: Sequence[str]) -> np.ndarray:
        """Tell which captions have an embedding, (n,) bool."""
        return self.find(caption_keys(captions)) >= 0

    def rows(self, captions: Sequence[str]) -> np.ndarray:
        """Return the numbers of the rows of captions, found by their exact text, (n,) int64.

        Raises:
            MissingCaptionError: A caption has no embedding.
        """
        if len(captions) == 1:  # several times faster
            rows = np.array([self.find_one(*caption_key(captions[0]))])
        else:
            rows = self.find(caption_keys(captions))
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            shown = ", ".join(repr(captions[i][:80]) for i in missing[:3])
            raise MissingCaptionError(
                f"The {self.manifest.NAME} {self.path} ({len(self)} captions) lacks {len(missing)} of {len(captions)} "
                f"captions, such as {shown}. Run `llm2clip embed` on the source of these captions."
            )
        return rows

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
        return self.read(self.rows(captions), dtype)


class EmbeddingCache(CaptionEmbeddings):
    """A complete embedding cache, opened for reading by [`EmbeddingCache.open`]."""

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
            verify: Read every shard once, see `check_shards`. Turn it off for large caches: rows are also checked
                when they are looked up.
            tokenizer_fingerprint: Identity of the tokenizer that must have made the cache. None accepts any.

        Raises:
            FileNotFoundError: There is no cache.
            CacheMismatchError: Another encoder or tokenizer made it.
            CacheIncompleteError: It was not built to the end.
            CacheDamagedError: A shard is missing, truncated or changed, or contains a row that is not finite.
            CacheError: It has another format version.
        """
        folder = Path(path)
        manifest = CacheManifest.read(folder)
        refuse_other_encoder(folder, manifest, fingerprint, tokenizer_fingerprint)
        cache = cls(folder, manifest, cls.open_shards(folder, manifest))
        if verify:
            cache.check_shards()
        return cache

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself: their content is not sent.
        return type(self).open, (self.path, self.manifest.fingerprint, False)


def refuse_other_encoder(
    folder: Path, manifest: CacheManifest, fingerprint: str | None, tokenizer_fingerprint: str | None
) -> None:
    """Raise a `CacheMismatchError` if another encoder or tokenizer made the embeddings; None accepts any."""
    advice = "Use that {}, or embed the captions with this one into another folder (`llm2clip embed`)."
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise CacheMismatchError(
            f"The embedding cache {folder} was made by {manifest.text_model_name} with fingerprint "
            f"{manifest.fingerprint}, but the text encoder in use has fingerprint {fingerprint}. "
            + advice.format("encoder")
        )
    known = manifest.tokenizer_fingerprint
    if known is not None and tokenizer_fingerprint is not None and known != tokenizer_fingerprint:
        raise CacheMismatchError(
            f"The embedding cache {folder} was made with the tokenizer {known} of {manifest.text_model_name}, but the "
            f"tokenizer in use is {tokenizer_fingerprint}: other vocabulary, merges, normaliser, added tokens or "
            f"prompt. {advice.format('tokenizer')}"
        )
