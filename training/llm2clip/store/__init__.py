"""Rows of numbers found by key, in shards: caches, sidecars, image features, rows of evaluations."""

from llm2clip.store.building import build_embedding_cache, build_store
from llm2clip.store.manifest import (
    MissingCaptionError,
    StoreDamagedError,
    StoreError,
    StoreIncompleteError,
    StoreManifest,
    StoreMismatchError,
    caption_manifest,
)
from llm2clip.store.pair import PairedCache
from llm2clip.store.store import EmbeddingCache, Store

__all__ = [
    "EmbeddingCache",
    "MissingCaptionError",
    "PairedCache",
    "Store",
    "StoreDamagedError",
    "StoreError",
    "StoreIncompleteError",
    "StoreManifest",
    "StoreMismatchError",
    "build_embedding_cache",
    "build_store",
    "caption_manifest",
]
