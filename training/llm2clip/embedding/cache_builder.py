"""Building an embedding cache: each distinct caption once, in shards that survive a kill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2clip.data.records import caption_keys
from llm2clip.embedding.cache_files import CacheManifest
from llm2clip.embedding.row_builder import build_rows, refuse_rows, stored_rows
from llm2clip.utils.progress import ProgressBar

# Captions to their embeddings, and how many of them were truncated.
Embed = Callable[[list[str]], tuple[torch.Tensor, int]]


def build_embedding_cache(
    path: str | Path,
    captions: Sequence[str],
    embed: Embed,
    manifest: CacheManifest,
    *,
    embed_size: int = 1024,
    **options: Any,
) -> CacheManifest:
    """Embed captions into a cache; resume an interrupted build, or append to a complete cache what it lacks.

    Args:
        path: The folder, created if it does not exist.
        captions: Distinct captions, the same on every rank.
        embed: Maps n captions to (n, hidden_size) finite numbers and the number of captions that exceed `max_length`.
        manifest: The text encoder and the format of the cache. A build that is resumed keeps its `shard_size`.
        embed_size: Captions per call of `embed`, which can sort them by length.
        options: `show_progress_bar`, `rank`, `world_size` and `barrier` of [`build_rows`], which also describes how a
            build survives a kill.

    Returns:
        The manifest of the complete cache.

    Raises:
        CacheMismatchError: The folder contains the cache of another encoder, or an unfinished one of other captions.
        ValueError: There are no captions or they repeat, or an embedding has the wrong shape, is not finite or exceeds
            float16.
    """

    def compute(positions: np.ndarray, bar: ProgressBar) -> tuple[torch.Tensor, dict[str, str]]:
        rows, truncated = [], 0
        for start in range(0, len(positions), embed_size):
            texts = [captions[position] for position in positions[start : start + embed_size]]
            embeddings, cut = embed(texts)
            rows.append(rows_to_store(embeddings, texts, manifest))
            truncated += cut
            bar.update(advance=len(texts))
        return torch.cat(rows), {"num_truncated": str(truncated)}

    return build_rows(path, _distinct_keys(captions), compute, manifest, title="Embedding captions", **options)


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


def rows_to_store(vectors: torch.Tensor, texts: list[str], manifest: CacheManifest) -> torch.Tensor:
    """Check the embeddings of captions, (n, hidden), and round them to the dtype of a cache.

    Raises:
        ValueError: They have another shape, or one is not finite, exceeds the range or has no direction.
    """

    def name(row: int) -> str:
        return f"the caption {texts[row][:200]!r}"

    vectors = vectors.detach().float().cpu()
    expected = (len(texts), manifest.hidden_size)
    if tuple(vectors.shape) != expected:
        raise ValueError(
            f"{manifest.text_model_name} returned embeddings of shape {tuple(vectors.shape)} instead of {expected}."
        )
    if manifest.normalize:
        refuse_rows(~torch.isfinite(vectors), name, "is not finite")
        lengths = vectors.norm(dim=-1, keepdim=True)
        refuse_rows(lengths == 0, name, "is zero, which has no direction")
        vectors = vectors / lengths
    return stored_rows(vectors, manifest, name)
