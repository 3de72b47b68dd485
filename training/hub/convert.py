"""From the original LLM2CLIP code's checkpoints to this package's names.

The original keeps a model as one state dict plus a `model_configs/*.json`, and lets the prompt of an LLM depend on
the LLM's name. Here the state dict's names are transformers' style and the prompt is part of the text config.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig, PretrainedConfig

from modeling_llm2clip import EVA02VisionConfig, LLM2CLIPConfig, LLM2CLIPTextConfig

LAYER_NORM_EPS_OPENAI = 1e-5

_EVA02_RENAMES = (
    (r"^visual\.head\.", "visual_projection."),
    (r"^visual\.(blocks\.\d+\.attn\.[qv])_bias$", r"vision_model.\1_proj.bias"),
    (r"^visual\.", "vision_model."),
)
_OPENAI_RENAMES = (
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"vision_model.encoder.layers.\1.mlp.fc1."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"vision_model.encoder.layers.\1.mlp.fc2."),
)
_ADAPTER_RENAMES = (
    (r"^text\.text_adaptor\.([0-3])\.ln\.", r"text_adapter.blocks.\1.norm."),
    (r"^text\.text_adaptor\.([0-3])\.fn\.0\.", r"text_adapter.blocks.\1.fc1."),
    (r"^text\.text_adaptor\.([0-3])\.fn\.3\.", r"text_adapter.blocks.\1.fc2."),
    (r"^text\.text_adaptor\.4\.", "text_adapter.norm."),
    (r"^text\.text_adaptor\.5\.", "text_adapter.proj."),
)


def from_original(
    state_dict: dict[str, Tensor],
    model_config: dict[str, Any],
    text_config: PretrainedConfig | dict[str, Any] | None = None,
) -> tuple[LLM2CLIPConfig, dict[str, Tensor]]:
    """Map an original model to this package.

    Args:
        state_dict: The original's tensors: `visual.*`, `text.text_adaptor.*`, `logit_scale`; a part of them is fine.
        model_config: The original's model_configs JSON. Of its vision part the EVA02 and the OpenAI ViT layouts are
            known.
        text_config: The LLM that the adapter belongs to; by default only its width is recorded.

    Returns:
        The config and the renamed state dict of an [`LLM2CLIPModel`] without its LLM. Rotary tables, which the
        original repeats in every block, are left out: they follow from the config.

    Raises:
        ValueError: A tensor is of no known layout; the message names it.
    """
    vision = model_config["vision_cfg"]
    is_eva = "eva_model_name" in vision
    text = model_config.get("text_cfg", {})
    if text_config is None:
        width = text.get("llm_embedding_dim", 4096)
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
        text_config = LLM2CLIPTextConfig(decoder_config={"model_type": "llama", "hidden_size": width, **heads})
    config = LLM2CLIPConfig(
        vision_config=_eva02_config(vision)
        if is_eva
        else _openai_config(vision, model_config.get("quick_gelu", False)),
        text_config=text_config,
        projection_dim=model_config["embed_dim"],
        visual_projection_bias=is_eva,
        # Where the LLM runs inside the original's model, the original skips the normalisation.
        adapter_normalize=text.get("use_embedding", True),
    )
    renames = (*(_EVA02_RENAMES if is_eva else _OPENAI_RENAMES), *_ADAPTER_RENAMES)
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if re.search(r"\brope\.freqs_(cos|sin)$", name):
            continue
        if name == "logit_scale":
            converted[name] = tensor
        elif name == "visual.proj":
            converted["visual_projection.weight"] = tensor.t().contiguous()
        elif match := re.match(r"^(visual\..*\.attn)\.in_proj_(weight|bias)$", name):
            parts = zip("qkv", tensor.chunk(3), strict=True)
            for letter, part in parts:
                target = _rename(f"{match[1]}.{letter}_proj.{match[2]}", renames)
                converted[target] = part.contiguous()
        else:
            converted[_rename(name, renames)] = tensor
    return config, converted


def original_prompt(model_type: str, name_or_path: str, pooling: str = "mean") -> tuple[str, str]:
    """The prompt that the original code's encoder wraps around a caption, which it chooses by the LLM's name.

    Args:
        model_type: The LLM's `model_type`, such as `llama`.
        name_or_path: The LLM's name as its config recorded it.
        pooling: With `eos_token` the original appends an end-of-sequence token.

    Returns:
        `(prompt_prefix, prompt_suffix)` for [`LLM2CLIPTextConfig`].
    """
    prefix = suffix = ""
    if model_type == "llama" and "Llama-3" in name_or_path and "Instruct" in name_or_path:
        return "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
    if name_or_path in ("mistralai/Mistral-7B-Instruct-v0.2", "meta-llama/Llama-2-7b-chat-hf"):
        prefix, suffix = "[INST] ", " [/INST]"
    elif name_or_path == "google/gemma-2-9b-it":
        prefix, suffix = "<bos><start_of_turn>user\n", "<end_of_turn>"
    elif name_or_path in ("Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2-7B-Instruct"):
        prefix, suffix = "<|im_start|>user\n", "<|im_end|>"
    elif name_or_path == "microsoft/Phi-3.5-mini-instruct":
        prefix, suffix = "<|user|>\n", "<|end|>\n"
    if pooling == "eos_token":
        ends = {"gemma": "<eos>", "qwen2": "<|endoftext|>", "phi3": "<|endoftext|>"}
        end = "<|end_of_text|>" if name_or_path == "meta-llama/Meta-Llama-3-8B" else ends.get(model_type, " </s>")
        suffix = suffix.rstrip() + end
    return prefix, suffix


def _rename(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise ValueError(f"the tensor {name!r} belongs to no layout of the original code that is known here.")


def _eva02_config(vision: dict[str, Any]) -> EVA02VisionConfig:
    missing = [flag for flag in ("rope", "naiveswiglu", "subln") if not vision.get(flag)]
    if missing:
        raise ValueError(f"{vision['eva_model_name']} is not an EVA02 tower: its config lacks {', '.join(missing)}.")
    width, patch_size = vision["width"], vision["patch_size"]
    grid = vision["image_size"] // patch_size
    return EVA02VisionConfig(
        hidden_size=width,
        intermediate_size=int(width * vision["mlp_ratio"]),
        num_hidden_layers=vision["layers"],
        num_attention_heads=width // vision["head_width"],
        image_size=vision["image_size"],
        patch_size=patch_size,
        # Without interpolation the original's rotary positions are the grid's own.
        rope_grid_size=vision["pt_hw_seq_len"] if vision.get("intp_freq") else grid,
        drop_path_rate=vision.get("drop_path_rate", 0.0),
    )


def _openai_config(vision: dict[str, Any], quick_gelu: bool) -> CLIPVisionConfig:
    width = vision["width"]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
        num_hidden_layers=vision["layers"],
        num_attention_heads=width // vision.get("head_width", 64),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        hidden_act="quick_gelu" if quick_gelu else "gelu",
        layer_norm_eps=LAYER_NORM_EPS_OPENAI,
    )


__all__ = ["from_original", "original_prompt"]
