"""Encoders: models of any library that map texts and images to rows of one space."""

from llm2clip.encoders.caption_embedder import CaptionEmbedder, embed_captions
from llm2clip.encoders.image_embedder import embed_images
from llm2clip.encoders.load import load_encoder

__all__ = ["CaptionEmbedder", "embed_captions", "embed_images", "load_encoder"]
