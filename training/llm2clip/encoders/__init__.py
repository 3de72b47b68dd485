"""Encoders: models of any library that map texts and images to rows of one space."""

from llm2clip.encoders.encoder import Encoder
from llm2clip.encoders.load import embed_captions, embed_images, load_encoder
from llm2clip.encoders.ours import OurEncoder

__all__ = ["Encoder", "OurEncoder", "embed_captions", "embed_images", "load_encoder"]
