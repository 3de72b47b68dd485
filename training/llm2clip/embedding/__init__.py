"""Embeddings of captions and images."""

from llm2clip.embedding.caption_embedder import CaptionEmbedder, embed_captions
from llm2clip.embedding.image_embedder import embed_images

__all__ = [
    "CaptionEmbedder",
    "embed_captions",
    "embed_images",
]
