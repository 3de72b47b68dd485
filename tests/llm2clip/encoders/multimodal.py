"""Tiny multimodal embedding models, saved by sentence-transformers as published ones are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from .models import TOWER, save, tokenizer

MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SIZES = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}IMAGE"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
)
QWEN_TEMPLATE = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
Built = tuple[Any, Any]


def _qwen(name: str, text: dict[str, Any], vision: dict[str, Any]) -> Built:
    words = tokenizer(True, model_max_length=400)
    words.add_special_tokens({"additional_special_tokens": MARKS})
    start, end, image, video = words.convert_tokens_to_ids(MARKS)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = {**TOWER, "num_key_value_heads": 2, "vocab_size": len(words), "rope_parameters": rope, **text}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 8, **vision}
    marks = {
        "image_token_id": image, "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **marks)
    pixels = transformers.Qwen2VLImageProcessorPil(patch_size=8, size=SIZES)
    videos = getattr(transformers, f"{name}VideoProcessor")(patch_size=8)
    processor = getattr(transformers, f"{name}Processor")(pixels, words, videos, chat_template=QWEN_TEMPLATE)
    return getattr(transformers, f"{name}Model")(config), processor


def qwen3_vl() -> Built:
    """Qwen3-VL-Embedding."""
    vision = {
        "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return _qwen("Qwen3VL", {"head_dim": 8}, vision)


def qwen2_vl() -> Built:
    """Qwen2-VL, the class of GME."""
    return _qwen("Qwen2VL", {}, {"embed_dim": 32, "mlp_ratio": 2})


def embedding_gemma2() -> Built:
    """EmbeddingGemma 2, whose rows are wider than its layers."""
    marks = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
    words = tokenizer(True, model_max_length=400, extra_special_tokens=marks)
    words.add_special_tokens({"additional_special_tokens": ["<|video|>"]})
    text = {
        **TOWER, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "vocab_size": len(words),
        "hidden_size_per_layer_input": 8, "embedding_dim": 48,
    }  # fmt: skip
    vision = {
        **TOWER, "model_type": "gemma4_vision", "num_key_value_heads": 4, "head_dim": 8, "patch_size": 8,
        "pooling_kernel_size": 2, "position_embedding_size": 64,
    }  # fmt: skip
    ids = {name: words.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    config = transformers.EmbeddingGemma2Config(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_token"],
        boi_token_id=ids["boi_token"],
        eoi_token_id=ids["eoi_token"],
        video_token_id=words.convert_tokens_to_ids("<|video|>"),
        audio_token_id=None,
    )
    processor = transformers.EmbeddingGemma2Processor(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(),
        image_processor=transformers.Gemma4ImageProcessorPil(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70),
        tokenizer=words,
        video_processor=transformers.EmbeddingGemma2VideoProcessor(patch_size=8, pooling_kernel_size=2),
        chat_template=TEMPLATE.replace("IMAGE", "<|image|>"),
    )
    return transformers.EmbeddingGemma2Model(config), processor


def save_embedder(build: Callable[[], Built], plain: Path, folder: Path) -> None:
    """Save a random model as sentence-transformers does, with prompts of queries and documents."""
    save(build, plain)
    part = Transformer(str(plain))
    modules = [part, Pooling(part.get_embedding_dimension(), pooling_mode="lasttoken"), Normalize()]
    prompts = {"query": "Find the picture.", "document": "Represent the picture."}
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save_pretrained(str(folder))
