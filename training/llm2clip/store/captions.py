"""Stored embeddings of captions, found by the exact text."""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from llm2clip.store.building import ComputedRows, build_store, check_rows, refuse_rows
from llm2clip.store.manifest import MissingCaptionError, StoredDtype, StoreManifest, StoreMismatchError
from llm2clip.store.store import Store
from llm2clip.utils.progress import ProgressBar

logger = logging.getLogger(__name__)

CacheT = TypeVar("CacheT", bound="EmbeddingCache")
# Captions to their embeddings, and how many of them were truncated.
Embed = Callable[[list[str]], tuple[Tensor, int]]


def caption_keys(captions: Iterable[str]) -> np.ndarray:
    """Compute the keys of captions, (captions, 2) int64: the 128-bit BLAKE2b hash of each exact text."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in captions)
    return np.frombuffer(digests, dtype="<i8").reshape(-1, 2).astype(np.int64, copy=False)


def caption_key(caption: str) -> tuple[int, int]:
    """Compute the halves of a key of [`caption_keys`]."""
    first, second = struct.unpack("<qq", hashlib.blake2b(caption.encode(), digest_size=16).digest())
    return first, second


def caption_manifest(
    text_model: str,
    fingerprint: str,
    *,
    width: int,
    pooling: str,
    prompt_prefix: str,
    prompt_suffix: str,
    max_length: int,
    tokenizer_fingerprint: str | None = None,
    text_model_dtype: str = "float32",
    dtype: StoredDtype = "float16",
    normalize: bool = False,
) -> StoreManifest:
    """Describe the embeddings of captions by a text encoder.

    Args:
        text_model: Name of the text encoder in messages.
        fingerprint, tokenizer_fingerprint: Identity of its weights and of its tokenizer; None: any is accepted.
        width: Of an embedding.
        pooling, prompt_prefix, prompt_suffix, max_length: How it reads a caption; the prefix has an instruction too.
        text_model_dtype: The dtype that it computes in.
        dtype, normalize: The stored dtype, and whether embeddings have unit length.
    """
    identity = {
        "fingerprint": fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "pooling": pooling,
        "prompt_prefix": prompt_prefix,
        "prompt_suffix": prompt_suffix,
        "max_length": max_length,
        "text_model_dtype": text_model_dtype,
        "normalize": normalize,
    }
    return StoreManifest(kind="captions", encoder=text_model, identity=identity, dtype=dtype, width=width)


class EmbeddingCache(Store):
    """Stored embeddings of captions, opened for reading by [`EmbeddingCache.open`]."""

    KIND = "captions"

    @classmethod
    def open(
        cls: type[CacheT],
        path: str | Path,
        fingerprint: str | None = None,
        verify: bool = True,
        tokenizer_fingerprint: str | None = None,
    ) -> CacheT:
        """Open a cache, or the embeddings that lie beside the shards in a folder.

        Args:
            path: The folder.
            fingerprint: Identity of the text encoder that must have made the embeddings. None accepts any.
            verify: See [`Store.open`]. Rows are also checked when they are looked up.
            tokenizer_fingerprint: Identity of the tokenizer that must have made the embeddings. None accepts any.

        Raises:
            FileNotFoundError: There is no cache.
            StoreMismatchError: Another encoder or tokenizer made it.
            StoreIncompleteError: It was not built to the end.
            StoreDamagedError: A file is missing or damaged.
        """
        cache = super().open(path, verify=False)
        refuse_other_encoder(path, cache.manifest, fingerprint, tokenizer_fingerprint)
        if verify:
            cache.require_unchanged()
        return cache

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
                f"The embedding cache {self.path} ({len(self)} captions) lacks {len(missing)} of {len(captions)} "
                f"captions, such as {shown}. Run `llm2clip embed` on the source of these captions."
            )
        return rows

    def lookup(self, captions: Sequence[str], dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Return the embeddings of captions, found by their exact text.

        Args:
            captions: n captions, which may repeat.
            dtype: Dtype of the result; None keeps the stored dtype, which is fastest.

        Returns:
            (n, width).

        Raises:
            MissingCaptionError: A caption has no embedding.
            StoreDamagedError: A row is not finite.
        """
        return self.read(self.rows(captions), dtype)


def refuse_other_encoder(
    path: str | Path, manifest: StoreManifest, fingerprint: str | None, tokenizer_fingerprint: str | None
) -> None:
    """Raise a `StoreMismatchError` if another encoder or tokenizer made embeddings; None accepts any."""
    advice = "Use that {}, or embed the captions with this one into another folder (`llm2clip embed`)."
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise StoreMismatchError(
            f"The embedding cache {path} was made by {manifest.encoder} with fingerprint {manifest.fingerprint}, but "
            f"the text encoder in use has fingerprint {fingerprint}. {advice.format('encoder')}"
        )
    known = manifest.identity["tokenizer_fingerprint"]
    if known is not None and tokenizer_fingerprint is not None and known != tokenizer_fingerprint:
        raise StoreMismatchError(
            f"The embedding cache {path} was made with the tokenizer {known} of {manifest.encoder}, but the tokenizer "
            f"in use is {tokenizer_fingerprint}: other vocabulary, merges, normaliser, added tokens or prompt. "
            f"{advice.format('tokenizer')}"
        )


def build_embedding_cache(
    path: str | Path,
    captions: Sequence[str],
    embed: Embed,
    manifest: StoreManifest,
    *,
    embed_size: int = 1024,
    **options: Any,
) -> StoreManifest:
    """Embed captions into a cache; resume an interrupted build, or append to a complete cache what it lacks.

    Args:
        path: The folder, created if it does not exist.
        captions: Distinct captions, the same on every rank.
        embed: Maps n captions to (n, width) finite numbers and the number of captions that exceed `max_length`.
        manifest: The text encoder and the format, see [`caption_manifest`].
        embed_size: Captions per call of `embed`, which can sort them by length.
        options: `shard_size`, `show_progress_bar`, `rank`, `world_size` and `barrier` of [`build_store`], which also
            describes how a build survives a kill.

    Returns:
        The manifest of the complete cache.

    Raises:
        StoreMismatchError: The folder contains the cache of another encoder.
        ValueError: There are no captions or they repeat, or an embedding has the wrong shape, is not finite or exceeds
            float16.
    """

    def compute(positions: np.ndarray, bar: ProgressBar) -> ComputedRows:
        rows, truncated = [], 0
        for start in range(0, len(positions), embed_size):
            texts = [captions[position] for position in positions[start : start + embed_size]]
            embeddings, cut = embed(texts)
            rows.append(check_embeddings(embeddings, texts, manifest))
            truncated += cut
            bar.update(len(texts))
        return ComputedRows(torch.cat(rows), {"truncated": truncated})

    keys = _distinct_keys(captions)
    built = build_store(path, keys, compute, manifest, title="Embedding captions", **options).manifest
    if truncated := built.counts["truncated"]:
        counts = truncated, built.rows, manifest.identity["max_length"]
        logger.warning("%d of %d captions were cut at %d tokens.", *counts)
    return built


def _distinct_keys(captions: Sequence[str]) -> np.ndarray:
    if not captions:
        raise ValueError("There are no captions to embed.")
    keys = caption_keys(captions)
    _, first, counts = np.unique(keys, axis=0, return_index=True, return_counts=True)
    if len(first) != len(keys):
        raise ValueError(
            f"{len(keys) - len(first)} captions repeat an earlier one, such as "
            f"{captions[int(first[counts > 1][0])][:80]!r}; pass distinct captions, as distinct_captions returns them."
        )
    return keys


def check_embeddings(vectors: Tensor, texts: Sequence[str], manifest: StoreManifest) -> Tensor:
    """Check the embeddings of captions, (n, width), and round them to the stored dtype.

    Raises:
        ValueError: They have another shape, or one is not finite, exceeds the range or has no direction.
    """

    def name(row: int) -> str:
        return f"the caption {texts[row][:200]!r}"

    vectors = vectors.detach().float().cpu()
    expected = (len(texts), manifest.width)
    if tuple(vectors.shape) != expected:
        raise ValueError(
            f"{manifest.encoder} returned embeddings of shape {tuple(vectors.shape)} instead of {expected}."
        )
    if manifest.identity["normalize"]:
        refuse_rows(~torch.isfinite(vectors), name, "is not finite")
        lengths = vectors.norm(dim=-1, keepdim=True)
        refuse_rows(lengths == 0, name, "is zero, which has no direction")
        vectors = vectors / lengths
    return check_rows(vectors, manifest.dtype, name, "; use bfloat16 or normalize the embeddings")
