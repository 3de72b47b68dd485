"""Models of the original LLM2CLIP code: its model_configs JSON, and its state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from llm2clip.convert.layouts import ADAPTER, EVA, EVA02, OPENAI, SCALE, TIMM_SIGLIP
from llm2clip.convert.renaming import Layout, Rule, linears
from llm2clip.convert.vision_towers import config_of_original
from modeling_llm2clip import EVA02VisionConfig, LLM2CLIPConfig, LLM2CLIPTextConfig

# The default of the original's text_cfg.
DEFAULT_LLM_WIDTH = 4096
# What a model may do with features and the original does not.
FEATURE_FIELDS = ("vision_pooling", "vision_layers", "standardize_vision", "center_text", "visual_head", "text_head")


def original_layout(vision_config: PretrainedConfig) -> Layout:
    """Return the layout of the original's state dict for a model with this vision tower."""
    head = Layout(linears("visual.head", "visual_projection"))
    if vision_config.model_type == EVA02VisionConfig.model_type:
        tower = (EVA02 if vision_config.sub_layer_norm else EVA).under("visual.", "vision_model.")
    elif vision_config.model_type == "clip_vision_model":
        tower = OPENAI.under("visual.", "vision_model.")
        head = Layout((Rule(("visual.proj",), ("visual_projection.weight",), transpose=True),))
    elif vision_config.model_type == "siglip_vision_model":
        tower = TIMM_SIGLIP.under("visual.trunk.", "vision_model.")
    else:
        raise ValueError(f"the original has no vision tower of type {vision_config.model_type!r}.")
    return tower + head + ADAPTER.under("text.text_adaptor.", "text_adapter.") + SCALE


def joint_config(model_config: Mapping[str, Any]) -> LLM2CLIPConfig:
    """Return the config of an LLM2CLIP model, from an original model_configs JSON.

    Of its LLM only the width is set: the one in the JSON, or that of the tower where the JSON has no `text_cfg`.
    """
    vision = config_of_original(model_config["vision_cfg"], model_config.get("quick_gelu", False))
    text = model_config.get("text_cfg", {"llm_embedding_dim": vision.hidden_size})
    return LLM2CLIPConfig(
        vision_config=vision,
        text_config=_width_only(text.get("llm_embedding_dim", DEFAULT_LLM_WIDTH)),
        projection_dim=model_config["embed_dim"],
        # The timm towers of the original have no projection after their attention pooling.
        visual_projection="timm_model_name" not in model_config["vision_cfg"],
        visual_projection_bias=vision.model_type == EVA02VisionConfig.model_type,
        # The original does not normalize the LLM embeddings if the LLM runs inside its model.
        adapter_normalize=text.get("use_embedding", True),
    )


def _width_only(width: int) -> LLM2CLIPTextConfig:
    """Return a text config for an LLM of which only the width is known."""
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    return LLM2CLIPTextConfig(decoder_config={"model_type": "llama", "hidden_size": width, **heads})


def to_original(config: LLM2CLIPConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a model to the names of the original, without its LLM.

    Raises:
        ValueError: The original has no vision tower of this type, or not what this model does with vision features.
    """
    default = LLM2CLIPConfig()
    different = [name for name in FEATURE_FIELDS if getattr(config, name) != getattr(default, name)]
    if different:
        shown = ", ".join(f"{name} {getattr(config, name)!r}" for name in different)
        raise ValueError(f"the original code knows no {shown}; such a model cannot be converted to its format.")
    state = {name: tensor for name, tensor in state_dict.items() if not name.startswith("text_model.")}
    return original_layout(config.vision_config).restore(state)
