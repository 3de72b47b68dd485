"""Embeddings of captions and images, and the cache that stores them."""

from llm2clip.embedding.cache import EmbeddingCache
from llm2clip.embedding.cache_builder import build_embedding_cache
from llm2clip.embedding.cache_files import CacheManifest, MissingCaptionError
from llm2clip.embedding.caption_embedder import CaptionEmbedder, embed_captions
from llm2clip.embedding.image_embedder import embed_images

__all__ = [
    "CacheManifest",
    "CaptionEmbedder",
    "EmbeddingCache",
    "MissingCaptionError",
    "build_embedding_cache",
    "embed_captions",
    "embed_images",
]
