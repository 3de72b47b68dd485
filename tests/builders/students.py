"""Tiny query encoders, and models that have one."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

from llm2clip.files.manifests import QUERY_ENCODER
from llm2clip.models.identity import space_identity
from llm2clip.trainers.student import Student
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import tiny


def save_student(folder: Path, space: str | None = None) -> Student:
    """Save a random query encoder of the width of the tiny model."""
    torch.manual_seed(0)
    tokenizer = tiny.plain_tokenizer()
    config = AutoConfig.for_model("bert", **tiny.SIZES, vocab_size=len(tokenizer), max_position_embeddings=64)
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.model_max_length = tokenizer.eos_token, "right", 64
    student = Student(AutoModel.from_config(config), tokenizer, 24, space).eval()
    student.save_pretrained(folder)
    return student


def add_query_encoder(model: Path) -> Student:
    """Give the tiny model in a folder a query encoder of its space."""
    space = space_identity(LLM2CLIPModel.from_pretrained(model, text_model=False))
    return save_student(model / QUERY_ENCODER, space)
