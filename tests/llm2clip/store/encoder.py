"""A text encoder for cache tests: cheap, and a pure function of the text."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2clip.store import StoreManifest, build_embedding_cache, caption_manifest

WIDTH = 8


def embed(texts: list[str]) -> torch.Tensor:
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
    rows = np.stack([np.random.default_rng(seed).standard_normal(WIDTH, dtype=np.float32) for seed in seeds])
    return torch.from_numpy(rows)


def none_truncated(texts: list[str]) -> int:
    return 0


def build(
    folder: Path, texts: list[str], encoder: Any = embed, count_truncated: Any = none_truncated, **fields: Any
) -> StoreManifest:
    """Build a cache; `fields` are arguments of `caption_manifest` and `build_embedding_cache`."""
    settings: dict[str, Any] = {
        "fingerprint": "finger-a",
        "text_model": "tiny-encoder",
        "width": WIDTH,
        "pooling": "mean",
        "prompt_prefix": "user: ",
        "prompt_suffix": "<eot>",
        "max_length": 64,
    }
    names = set(inspect.signature(caption_manifest).parameters)
    manifest = caption_manifest(**{**settings, **{name: fields[name] for name in names & set(fields)}})
    given = {name: value for name, value in fields.items() if name not in names}
    options = {"shard_size": 10, "embed_size": 4, **given}

    def embed_and_count(batch: list[str]) -> tuple[torch.Tensor, int]:
        return encoder(batch), count_truncated(batch)

    return build_embedding_cache(folder, texts, embed_and_count, manifest, **options)
