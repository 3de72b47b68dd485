"""A text encoder for cache tests: cheap, and a pure function of the text."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2clip.embedding import CacheManifest, build_embedding_cache

WIDTH = 8


def embed(texts: list[str]) -> torch.Tensor:
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
    rows = np.stack([np.random.default_rng(seed).standard_normal(WIDTH, dtype=np.float32) for seed in seeds])
    return torch.from_numpy(rows)


def none_truncated(texts: list[str]) -> int:
    return 0


def build(
    folder: Path, texts: list[str], encoder: Any = embed, count_truncated: Any = none_truncated, **fields: Any
) -> CacheManifest:
    """Build a cache; `fields` are those of the manifest and arguments of `build_embedding_cache`."""
    settings: dict[str, Any] = {
        "fingerprint": "finger-a",
        "text_model_name": "tiny-encoder",
        "hidden_size": WIDTH,
        "pooling": "mean",
        "prompt_prefix": "user: ",
        "prompt_suffix": "<eot>",
        "max_length": 64,
        "shard_size": 10,
    }
    names = {entry.name for entry in dataclasses.fields(CacheManifest)}
    manifest = CacheManifest(**{**settings, **{name: fields[name] for name in names & set(fields)}})
    options = {"embed_size": 4, **{name: value for name, value in fields.items() if name not in names}}

    def embed_and_count(batch: list[str]) -> tuple[torch.Tensor, int]:
        return encoder(batch), count_truncated(batch)

    return build_embedding_cache(folder, texts, embed_and_count, manifest, **options)
