"""Embeddings of captions and images, and the cache that stores them."""

from llm2clip.embedding.cache import EmbeddingCache
from llm2clip.embedding.cache_builder import build_embedding_cache
from llm2clip.embedding.cache_files import (
    CacheDamagedError,
    CacheError,
    CacheIncompleteError,
    CacheManifest,
    CacheMismatchError,
    MissingCaptionError,
)
from llm2clip.embedding.caption_embedder import CaptionEmbedder, embed_captions
from llm2clip.embedding.image_embedder import ImageEmbedder, embed_images

__all__ = [
    "CacheDamagedError",
    "CacheError",
    "CacheIncompleteError",
    "CacheManifest",
    "CacheMismatchError",
    "CaptionEmbedder",
    "EmbeddingCache",
    "ImageEmbedder",
    "MissingCaptionError",
    "build_embedding_cache",
    "embed_captions",
    "embed_images",
]
