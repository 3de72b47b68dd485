"""The models that a checkpoint with a vision tower can become; each function completes a plan for one of them."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig

from llm2clip.convert.joint_plan import ADAPTER_PART, HEAD, SCALE_PART, TOWER, JointPlan
from llm2clip.convert.published import joint_configs, published_models
from llm2clip.utils.towers import describe_text_tower
from modeling_llm2clip import (
    EVA02VisionConfig,
    LLM2CLIPConfig,
    LLM2CLIPModel,
    LLM2CLIPTextConfig,
    LLM2CLIPVisionModelWithProjection,
)


def as_llm2clip(
    plan: JointPlan, known: LLM2CLIPConfig | None, text_model: str | None, text_model_revision: str | None
) -> None:
    """Complete the plan of a checkpoint with a text adapter.

    Args:
        known: Joint config from the original's model_configs JSON, if it is given.
        text_model: Repo or folder of the LLM; by default that of the published model of the same sizes.

    Raises:
        ValueError: The LLM is unknown, or the adapter was trained with an LLM of another width.
    """
    width = plan.tensors["text_adapter.norm.weight"].shape[0]
    published = known or _published_like(plan.vision_config, width)
    if text_model is None and known is None and published is not None:
        text_model, text_model_revision = published.text_model_name_or_path, published.text_model_revision
    if text_model is None:
        raise ValueError(
            f"the text adapter expects embeddings of width {width}; give their LLM with --text-model REPO."
        )
    text_config = _text_config(text_model, text_model_revision)
    if text_config.hidden_size != width:
        raise ValueError(
            f"the text adapter expects embeddings of width {width}, but {text_model} has width "
            f"{text_config.hidden_size}: it is the adapter of another LLM. Give that one with --text-model."
        )
    siglip = plan.vision_config.model_type == "siglip_vision_model"
    fields = {
        "projection_dim": plan.tensors["text_adapter.proj.weight"].shape[0],
        "visual_projection": "visual_projection.weight" in plan.tensors,
        "visual_projection_bias": "visual_projection.bias" in plan.tensors,
        "adapter_normalize": published.adapter_normalize if published is not None else not siglip,
    }
    _pair(plan, text_config, text_model, text_model_revision, **fields)


def _pair(
    plan: JointPlan, text_config: LLM2CLIPTextConfig, text_model: str, text_model_revision: str | None, **fields: Any
) -> None:
    """Make the result an [`LLM2CLIPModel`] with this LLM."""
    plan.config = LLM2CLIPConfig(
        vision_config=plan.vision_config,
        text_config=text_config,
        text_model_name_or_path=text_model,
        text_model_revision=text_model_revision,
        text_model_fingerprint=text_config.fingerprint,
        **fields,
    )
    plan.model_class = LLM2CLIPModel
    if SCALE_PART not in plan.tensors:
        plan.new.append((SCALE_PART, "not in the checkpoint; initialized to ln(1 / 0.07)"))


def as_vision_half(plan: JointPlan) -> None:
    """Complete the plan of a vision tower with a projection but without a text adapter."""
    plan.config = LLM2CLIPConfig(
        vision_config=plan.vision_config,
        projection_dim=plan.tensors["visual_projection.weight"].shape[0],
        visual_projection_bias="visual_projection.bias" in plan.tensors,
    )
    plan.model_class = LLM2CLIPVisionModelWithProjection
    plan.drop(SCALE_PART, "not needed for image embeddings")
    plan.notes.append("it has no text adapter and embeds only images; the .pt file of the same repo has one.")


def as_start(plan: JointPlan, text_model: str, text_model_revision: str | None, projection_dim: int) -> None:
    """Complete the plan of a plain CLIP that becomes the initial model of stage 2, with a new head and adapter."""
    text_config = _text_config(text_model, text_model_revision)
    bias = plan.vision_config.model_type == EVA02VisionConfig.model_type
    plan.drop(HEAD, f"the head of another embedding space; the new one has width {projection_dim}")
    fields = {"projection_dim": projection_dim, "visual_projection_bias": bias}
    _pair(plan, text_config, text_model, text_model_revision, **fields)
    plan.new += [(HEAD, "trained in stage 2"), (ADAPTER_PART, "trained in stage 2")]


def as_tower(plan: JointPlan) -> None:
    """Complete the plan of a checkpoint of which only the vision tower is kept."""
    scale = plan.tensors.get(SCALE_PART)
    if scale is not None:
        # Kept for stage 2, which starts with it as the original code does.
        plan.config.logit_scale_init_value = scale.float().item()
        plan.notes.append(f"its logit scale is {scale.item():.4f}: stage 2 starts with it.")
    plan.drop(HEAD, "the head of the embedding space of CLIP; stage 2 trains a new one")
    plan.drop(SCALE_PART, "not part of a vision tower")
    plan.notes.append("with --text-model the result is an LLM2CLIP model to start stage 2 from.")
    plan.tensors = {name.removeprefix(TOWER): tensor for name, tensor in plan.tensors.items()}
    plan.renames = [(theirs, ours.replace(TOWER, "")) for theirs, ours in plan.renames]


def _published_like(vision: PretrainedConfig, llm_width: int) -> LLM2CLIPConfig | None:
    """The published config with the same sizes of vision tower and LLM."""
    same = ("model_type", "hidden_size", "num_hidden_layers", "patch_size")
    for config in joint_configs().values():
        is_same = all(getattr(config.vision_config, name) == getattr(vision, name) for name in same)
        if is_same and config.text_config.hidden_size == llm_width:
            return config
    return None


def _text_config(name: str, revision: str | None) -> LLM2CLIPTextConfig:
    for published in published_models().values():
        if not published.is_joint and name in (published.name, published.card.get("original_checkpoint")):
            return copy.deepcopy(published.config)
    try:
        return describe_text_tower(name, revision)[0]
    except OSError as error:
        raise ValueError(
            f"the config and tokenizer of {name} cannot be read ({str(error).splitlines()[0]}); give --text-model a "
            "folder with its config.json and its tokenizer files, which is enough: weights are not needed."
        ) from error
