"""Embeddings of captions and images, and the cache that keeps them."""

from llm2clip.embedding.cache import (
    CacheDamagedError,
    CacheError,
    CacheIncompleteError,
    CacheManifest,
    CacheMismatchError,
    EmbeddingCache,
    MissingCaptionError,
)
from llm2clip.embedding.cache_builder import build_embedding_cache

__all__ = [
    "CacheDamagedError",
    "CacheError",
    "CacheIncompleteError",
    "CacheManifest",
    "CacheMismatchError",
    "EmbeddingCache",
    "MissingCaptionError",
    "build_embedding_cache",
]
