"""Texts of a card that are derived from a model's config."""

from __future__ import annotations

from typing import Any

from llm2clip.utils.repos import hub_ids
from modeling_llm2clip import LLM2CLIPTextConfig


def summary(model: Any) -> str:
    """Describe a model in one or two sentences."""
    config = model.config
    if config.model_type == LLM2CLIPTextConfig.model_type:
        kind = config.decoder_config.model_type
        return (
            f"A caption encoder (LLM2CLIP, stage 1): a {kind} language model with bidirectional attention; "
            f"{config.hidden_size} dimensions, captions of up to {config.max_text_length} tokens."
        )
    vision = config.vision_config
    # The path of a local folder means nothing to others and may be private.
    names = hub_ids(config.text_model_name_or_path)
    llm = names[0] if names else f"a {config.text_config.decoder_config.model_type} language model"
    size = getattr(vision, "image_size", None)
    return (
        f"An LLM2CLIP model: a vision tower ({vision.model_type}{f', {size} px' if size else ''}) and {llm} as the "
        f"caption encoder, with embeddings of {config.projection_dim} dimensions in one space."
    )


def base_models(config: Any) -> list[str]:
    """Names that the parts of a model were loaded from."""
    if config.model_type == LLM2CLIPTextConfig.model_type:
        return [config.decoder_config._name_or_path]
    return [
        config.vision_config._name_or_path,
        config.text_model_name_or_path or config.text_config.decoder_config._name_or_path,
    ]


__all__ = ["base_models", "summary"]
