"""What a checkpoint with a vision tower becomes: recognised, renamed, checked, every tensor explained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModel, PretrainedConfig

from llm2clip.convert.checkpoint import Checkpoint
from llm2clip.convert.joint_plan import ADAPTER_PART, HEAD, SCALE_PART, TOWER, JointPlan, listed
from llm2clip.convert.layouts import ADAPTER, HUB_EVA02, SCALE, Layout, Rule, linear, unchanged
from llm2clip.convert.original import joint_config
from llm2clip.convert.published import joint_configs, published_models
from llm2clip.convert.vision_towers import TowerKind, config_of_shapes, find_tower
from llm2clip.utils.towers import describe_text_tower
from modeling_llm2clip import (
    EVA02VisionConfig,
    EVA02VisionModel,
    LLM2CLIPConfig,
    LLM2CLIPModel,
    LLM2CLIPTextConfig,
    LLM2CLIPVisionModelWithProjection,
)

CLIP_TEXT = "CLIP's own text tower, which the LLM replaces"
DROPPED = (
    (r"(?:.*\.)?position_ids", "a counter"),
    (r"text_model\..*|text_projection(?:\.weight)?", CLIP_TEXT),
    (r"text\.(?:transformer|token_embedding|ln_final|text_projection|positional_embedding|cls_emb)\b.*", CLIP_TEXT),
    (r"(?:transformer|token_embedding|ln_final)\..*|positional_embedding|attn_mask", CLIP_TEXT),
    (r"input_resolution|context_length|vocab_size", "a number of the text tower or of the image size"),
    (r"logit_bias", "the bias of the sigmoid loss; the logits here have none"),
)


def plan_joint(
    checkpoint: Checkpoint,
    *,
    model_config: Mapping[str, Any] | None = None,
    text_model: str | None = None,
    text_model_revision: str | None = None,
    projection_dim: int = 1280,
    image_size: int | None = None,
    quick_gelu: bool | None = None,
    reset_heads: bool = False,
) -> JointPlan:
    """Recognise a checkpoint with a vision tower and explain each of its tensors.

    Args:
        checkpoint: The checkpoint.
        model_config: The original's model_configs JSON, where the model is none of the published ones.
        text_model: Repo or folder of the LLM; by default that of the published model of the same sizes.
        text_model_revision: Its revision.
        projection_dim: Width of a new projection, where the checkpoint is a plain CLIP.
        image_size: Image size to which the tower is resized.
        quick_gelu: Activation of an OpenAI tower.
        reset_heads: Leave out the trained projection and adapter.

    Raises:
        ValueError: The checkpoint is not recognised, some of its tensors are not explained or not finite, or weights
            are missing; the message names the first few.
    """
    if checkpoint.config.get("model_type") == LLM2CLIPConfig.model_type:
        plan = _own_plan(checkpoint)
    else:
        plan = _foreign_plan(checkpoint, model_config, text_model, text_model_revision, projection_dim, quick_gelu)
    if reset_heads:
        plan.reset_heads()
    plan.fit_image_size(image_size)
    plan.to_one_dtype()
    plan.check()
    return plan


def _own_plan(checkpoint: Checkpoint) -> JointPlan:
    config = LLM2CLIPConfig.from_dict(checkpoint.config)
    tensors = {name: checkpoint[name] for name in checkpoint}
    return JointPlan(
        recognised="an LLM2CLIP model of this package",
        config=config,
        model_class=LLM2CLIPModel,
        vision_config=config.vision_config,
        tensors=tensors,
        renames=[(name, name) for name in tensors],
        dropped=[],
        text_model=config.text_model_name_or_path,
        text_model_revision=config.text_model_revision,
    )


def _foreign_plan(
    checkpoint: Checkpoint,
    model_config: Mapping[str, Any] | None,
    text_model: str | None,
    text_model_revision: str | None,
    projection_dim: int,
    quick_gelu: bool | None,
) -> JointPlan:
    found = find_tower(checkpoint.shapes)
    if found is None:
        shown = ", ".join(list(checkpoint.shapes)[:5])
        raise ValueError(
            f"{checkpoint.path} holds no vision tower and no LLM of a known layout; its first tensors are {shown}."
        )
    kind, prefix = found
    renamed = _joint_layout(kind, prefix, checkpoint).rename(checkpoint)
    if renamed.unknown:
        raise ValueError(
            f"{checkpoint.path} was recognised as {kind.name}, but {len(renamed.unknown)} of its tensors belong to no "
            f"part of it: {listed(renamed.unknown, checkpoint.shapes)}. It is another model, or of a changed code."
        )
    has_adapter = any(name.startswith(ADAPTER_PART) for name in renamed.tensors)
    vision_config, known = _vision_config(kind, prefix, checkpoint, model_config, quick_gelu)
    plan = JointPlan(
        recognised="",
        config=vision_config,
        model_class=EVA02VisionModel if vision_config.model_type == EVA02VisionConfig.model_type else AutoModel,
        vision_config=vision_config,
        tensors=renamed.tensors,
        renames=renamed.renames,
        dropped=renamed.dropped,
    )
    if has_adapter:
        plan.recognised = f"an LLM2CLIP model: {kind.name}, text adapter"
        _as_llm2clip(plan, known, text_model, text_model_revision)
    elif kind.layout is HUB_EVA02:
        plan.recognised = f"the vision half of an LLM2CLIP model: {kind.name}, without text adapter"
        _as_vision_half(plan)
    elif text_model is not None:
        plan.recognised = f"a plain CLIP: {kind.name}, as the start of stage 2"
        _as_start(plan, text_model, text_model_revision, projection_dim)
    else:
        plan.recognised = f"a plain vision tower: {kind.name}"
        _as_tower(plan)
    return plan


def _joint_layout(kind: TowerKind, prefix: str, checkpoint: Checkpoint) -> Layout:
    layout = kind.layout
    if layout is None:
        names = (name.removeprefix(prefix) for name in checkpoint if name.startswith(prefix))
        layout = unchanged(name for name in names if not name.endswith("position_ids"))
    heads = (
        *linear("visual.head", "visual_projection"),
        *linear("visual_projection", "visual_projection"),
        *(linear("head", "visual_projection") if not prefix else ()),
        Rule(("visual.proj",), ("visual_projection.weight",), transpose=True),
        Rule(("proj",), ("visual_projection.weight",), transpose=True),
        Rule(("text.logit_scale",), ("logit_scale",)),
    )
    return (
        layout.under(prefix, TOWER)
        + Layout(heads, DROPPED)
        + ADAPTER.under("text.text_adaptor.", ADAPTER_PART)
        + ADAPTER.under("text_adapter.adaptor.", ADAPTER_PART)
        + SCALE
    )


def _vision_config(
    kind: TowerKind,
    prefix: str,
    checkpoint: Checkpoint,
    model_config: Mapping[str, Any] | None,
    quick_gelu: bool | None,
) -> tuple[PretrainedConfig, LLM2CLIPConfig | None]:
    """The tower's config, and the joint config where the original's JSON gives one."""
    shapes = {name.removeprefix(prefix): shape for name, shape in checkpoint.shapes.items() if name.startswith(prefix)}
    known = None
    if model_config is not None:
        known = joint_config({"quick_gelu": True, **model_config})
        config = known.vision_config
    elif kind.layout is None and checkpoint.config.get("vision_config") is not None:
        whole = AutoConfig.for_model(checkpoint.config["model_type"]).from_dict(checkpoint.config)
        config = config_of_shapes(kind, shapes, whole.vision_config.to_dict())
    else:
        config = config_of_shapes(kind, shapes)
    if quick_gelu is not None:
        if config.model_type != "clip_vision_model":
            raise ValueError(f"quick_gelu is for OpenAI's towers; this one is of type {config.model_type}.")
        config.hidden_act = "quick_gelu" if quick_gelu else "gelu"
    return config, known


def _as_llm2clip(
    plan: JointPlan, known: LLM2CLIPConfig | None, text_model: str | None, text_model_revision: str | None
) -> None:
    width = plan.tensors["text_adapter.norm.weight"].shape[0]
    published = known or _published_like(plan.vision_config, width)
    if text_model is None and known is None and published is not None:
        text_model, text_model_revision = published.text_model_name_or_path, published.text_model_revision
    if text_model is None:
        raise ValueError(
            f"the text adapter takes embeddings of width {width}; say which LLM gives them: --text-model REPO."
        )
    text_config = _text_config(text_model, text_model_revision)
    if text_config.hidden_size != width:
        raise ValueError(
            f"the text adapter takes embeddings of width {width}, but {text_model} gives {text_config.hidden_size}: "
            "it is the adapter of another LLM. Name that one with --text-model."
        )
    head = plan.tensors.get("visual_projection.weight")
    siglip = plan.vision_config.model_type == "siglip_vision_model"
    _pair(
        plan,
        text_config,
        text_model,
        text_model_revision,
        projection_dim=plan.tensors["text_adapter.proj.weight"].shape[0],
        visual_projection=head is not None,
        visual_projection_bias="visual_projection.bias" in plan.tensors,
        adapter_normalize=published.adapter_normalize if published is not None else not siglip,
    )


def _pair(
    plan: JointPlan, text_config: LLM2CLIPTextConfig, text_model: str, text_model_revision: str | None, **fields: Any
) -> None:
    """Make the plan that of an [`LLM2CLIPModel`] with this LLM."""
    plan.config = LLM2CLIPConfig(
        vision_config=plan.vision_config,
        text_config=text_config,
        text_model_name_or_path=text_model,
        text_model_revision=text_model_revision,
        text_model_fingerprint=text_config.fingerprint,
        **fields,
    )
    plan.model_class = LLM2CLIPModel
    plan.text_model, plan.text_model_revision = text_model, text_model_revision
    if SCALE_PART not in plan.tensors:
        plan.new.append((SCALE_PART, "not in the checkpoint: starts at ln(1 / 0.07)"))


def _as_vision_half(plan: JointPlan) -> None:
    head = plan.tensors["visual_projection.weight"]
    plan.config = LLM2CLIPConfig(
        vision_config=plan.vision_config,
        projection_dim=head.shape[0],
        visual_projection_bias="visual_projection.bias" in plan.tensors,
    )
    plan.model_class = LLM2CLIPVisionModelWithProjection
    plan.drop(SCALE_PART, "an image embedding needs no logit scale")
    plan.notes.append("there is no text adapter in it, so it embeds images only; the .pt of the same repo has one.")


def _as_start(plan: JointPlan, text_model: str, text_model_revision: str | None, projection_dim: int) -> None:
    text_config = _text_config(text_model, text_model_revision)
    reason = f"a head of another space; the new one is {projection_dim} wide"
    bias = plan.vision_config.model_type == EVA02VisionConfig.model_type
    plan.drop(HEAD, reason)
    _pair(
        plan,
        text_config,
        text_model,
        text_model_revision,
        projection_dim=projection_dim,
        visual_projection_bias=bias,
    )
    plan.new += [(HEAD, "to be trained in stage 2"), (ADAPTER_PART, "to be trained in stage 2")]


def _as_tower(plan: JointPlan) -> None:
    scale = plan.tensors.get(SCALE_PART)
    if scale is not None:
        plan.notes.append(
            f"its logit scale is {scale:.4f}: --logit-scale-init-value {scale:.4f} starts stage 2 there."
        )
    plan.drop(HEAD, "the head of CLIP's space; stage 2 trains a new one")
    plan.drop(SCALE_PART, "no part of a vision tower")
    plan.notes.append("with --text-model it becomes a whole LLM2CLIP model to start stage 2 from.")
    plan.tensors = {name.removeprefix(TOWER): tensor for name, tensor in plan.tensors.items()}
    plan.renames = [(theirs, ours.replace(TOWER, "")) for theirs, ours in plan.renames]


def _published_like(vision: PretrainedConfig, llm_width: int) -> LLM2CLIPConfig | None:
    for config in joint_configs().values():
        other = config.vision_config
        same = ("model_type", "hidden_size", "num_hidden_layers", "patch_size")
        if config.text_config.hidden_size == llm_width and all(
            getattr(other, name) == getattr(vision, name) for name in same
        ):
            return config
    return None


def _text_config(name: str, revision: str | None) -> LLM2CLIPTextConfig:
    for published in published_models().values():
        if not published.is_joint and name in (published.name, published.card.get("original_checkpoint")):
            return copy.deepcopy(published.config)
    config, _ = describe_text_tower(name, revision)
    return copy.deepcopy(config)


__all__ = ["plan_joint"]
