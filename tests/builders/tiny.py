"""Tiny models and tokenizers, built in code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessor,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessor,
)

from llm2clip.models.new_model import from_vision_text_pretrained
from llm2clip.models.prompting import with_prompt
from modeling_llm2clip import (
    EVA02VisionConfig,
    LLM2CLIPConfig,
    LLM2CLIPModel,
    LLM2CLIPProcessor,
    LLM2CLIPTextConfig,
    LLM2CLIPTextModel,
)
from tests.golden import FOLDER

HIDDEN = 32
SIZES = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {
    **SIZES, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 430, "max_position_embeddings": 128,
    "bos_token_id": 420, "eos_token_id": 424, "pad_token_id": 424,
}  # fmt: skip
# Decoders for the tests of the text tower; a window of 4 reveals whether a sliding window hides tokens.
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "phi3": {},
}
# Vision towers of transformers.
VISION_TOWERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"image_size": 28},
    "siglip_vision_model": {"image_size": 28},
    "siglip2_vision_model": {"num_patches": 16},
    "dinov2": {"image_size": 28},
}
# Fields of a model that is trained on stored features of frozen towers.
FROZEN_TOWER: dict[str, Any] = {
    "vision_pooling": "cls_mean",
    "standardize_vision": True,
    "center_text": True,
    "visual_head": "gated",
    "visual_head_expansion": 3,
    "feature_dropout": 0.2,
}
CAPTIONS = ["a small dog", "two children play football in a green park", "a red bus"]
IMAGES = [Image.effect_noise((40, 30), 80).convert("RGB") for _ in range(2)]
PREFIX = "<|start_header_id|>user<|end_header_id|>\n\n"
SUFFIX = "<|eot_id|>"


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Load a byte-level BPE tokenizer with Llama 3's special tokens, which adds BOS."""
    return AutoTokenizer.from_pretrained(FOLDER / "llm2vec_llama_a_hf")


def decoder_config(model_type: str = "llama") -> Any:
    return AutoConfig.for_model(model_type, **{**DECODER, **DECODERS[model_type]})


def next_release(monkeypatch: Any) -> None:
    """Change a default of Llama, and add a setting, as a release of transformers does."""
    made = LlamaConfig.__init__

    def init(self: Any, *args: Any, rms_norm_eps: float = 1e-3, new_setting: float = 1.5, **fields: Any) -> None:
        made(self, *args, rms_norm_eps=rms_norm_eps, **fields)
        self.new_setting = new_setting

    monkeypatch.setattr(LlamaConfig, "__init__", init)


def text_config(model_type: str = "llama", **fields: Any) -> LLM2CLIPTextConfig:
    tokenizer, prefix_tokens = with_prompt(plain_tokenizer(), PREFIX, SUFFIX)
    defaults = {
        "prompt_prefix": PREFIX,
        "prompt_suffix": SUFFIX,
        "num_prefix_tokens": prefix_tokens,
        "prompt_token_ids": tokenizer("")["input_ids"],
        "max_text_length": 64,
    }
    return LLM2CLIPTextConfig(**{"decoder_config": decoder_config(model_type), **defaults, **fields})


def wrapped(decoder: Any, **fields: Any) -> LLM2CLIPTextModel:
    """A plain text model as a text tower."""
    return LLM2CLIPTextModel(LLM2CLIPTextConfig(decoder.config, **fields), decoder)


def text_model(model_type: str = "llama", attn_implementation: str = "sdpa", **fields: Any) -> LLM2CLIPTextModel:
    config = text_config(model_type, **fields)
    config._attn_implementation = attn_implementation
    model = LLM2CLIPTextModel(config).eval()
    # The default initialisation is so small that a wrong mask would hardly show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def vision_config(**fields: Any) -> EVA02VisionConfig:
    return EVA02VisionConfig(**{**SIZES, "image_size": 28, "patch_size": 7, "rope_grid_size": 3, **fields})


def other_vision_config(model_type: str) -> PretrainedConfig:
    """The config of a vision tower of transformers."""
    return AutoConfig.for_model(model_type, **SIZES, patch_size=7, **VISION_TOWERS[model_type])


def joint_config(vision: Any = None, text: Any = None, **fields: Any) -> LLM2CLIPConfig:
    # Features of a new head of EVA02 would be too small for comparisons.
    defaults = {"projection_dim": 24, "adapter_num_layers": 2, "initializer": "normal", "initializer_range": 0.2}
    return LLM2CLIPConfig(vision or vision_config(), text or text_config(), **{**defaults, **fields})


def joint_model(**fields: Any) -> LLM2CLIPModel:
    return LLM2CLIPModel(joint_config(**fields)).eval()


def with_statistics(model: LLM2CLIPModel) -> LLM2CLIPModel:
    """Give a model random statistics of its vision features and LLM embeddings, where it has any."""
    generator = torch.Generator().manual_seed(1)
    if model.visual_standardization is not None:
        mean, std = torch.rand(2, model.config.vision_width, generator=generator)
        model.visual_standardization.mean.copy_(mean)
        model.visual_standardization.std.copy_(0.5 + std)
    if model.text_adapter.center is not None:
        model.text_adapter.center.copy_(torch.rand(HIDDEN, generator=generator))
    return model


def processor(image_size: int = 28) -> LLM2CLIPProcessor:
    tokenizer, _ = with_prompt(plain_tokenizer(), PREFIX, SUFFIX, max_length=64)
    size = {"shortest_edge": image_size}
    image_processor = CLIPImageProcessor(size=size, crop_size={"height": image_size, "width": image_size})
    return LLM2CLIPProcessor(image_processor, tokenizer)


def naflex_processor() -> LLM2CLIPProcessor:
    """The processor of a `siglip2_vision_model`, which reads images of any shape as lists of patches."""
    return LLM2CLIPProcessor(Siglip2ImageProcessor(patch_size=7, max_num_patches=16), processor().tokenizer)


def save(folder: Path, **fields: Any) -> LLM2CLIPModel:
    """Save a tiny model with its processor, like a Hub repository."""
    model = with_statistics(joint_model(**fields))
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return model


def save_apart(folder: Path, **fields: Any) -> LLM2CLIPModel:
    """Save an LLM, and in another folder a model that refers to it."""
    llm = text_model()
    llm.save_pretrained(folder / "llm")
    fields = {"projection_dim": 24, "initializer": "normal", "initializer_range": 0.2, **fields}
    vision = save_vision(folder / "vision")
    model = from_vision_text_pretrained(vision, folder / "llm", **fields).eval()
    with_statistics(model).config.text_model_fingerprint = llm.fingerprint()
    model.set_text_model(llm)
    model.save_pretrained(folder / "clip")
    processor().save_pretrained(folder / "clip")
    return model


def save_vision(folder: Path) -> Path:
    joint_model().vision_model.save_pretrained(folder)
    return folder
