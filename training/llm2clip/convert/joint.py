"""Plan the conversion of a checkpoint with a vision tower: recognize it and account for every tensor."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig, AutoModel, PretrainedConfig

from llm2clip.command_line.settings import refuse
from llm2clip.convert.checkpoint import Checkpoint
from llm2clip.convert.convert_config import ConvertConfig
from llm2clip.convert.joint_plan import ADAPTER_PART, HEAD, SCALE_PART, TOWER, JointPlan
from llm2clip.convert.layouts import ADAPTER, HUB_EVA02, SCALE
from llm2clip.convert.original import joint_config
from llm2clip.convert.published import published_like, published_models
from llm2clip.convert.renaming import Layout, Rule, linears, unchanged
from llm2clip.convert.vision_towers import TowerKind, config_of_shapes, find_tower
from llm2clip.files.atomic import read_json
from llm2clip.files.library_errors import wrap_read_errors
from llm2clip.models.towers import describe_text_tower
from modeling_llm2clip import (
    EVA02VisionConfig,
    EVA02VisionModel,
    LLM2CLIPConfig,
    LLM2CLIPModel,
    LLM2CLIPTextConfig,
    LLM2CLIPVisionModelWithProjection,
)
from modeling_llm2clip.modeling_llm2clip_utils import absolute_path

SIZES = ("model_type", "hidden_size", "num_hidden_layers", "patch_size")
CLIP_TEXT = "the text tower of CLIP, which the LLM replaces"
DROPPED = (
    (r"(?:.*\.)?position_ids", "an index buffer"),
    (r"text_model\..*|text_projection(?:\.weight)?", CLIP_TEXT),
    (r"text\.(?:transformer|token_embedding|ln_final|text_projection|positional_embedding|cls_emb)\b.*", CLIP_TEXT),
    (r"(?:transformer|token_embedding|ln_final)\..*|positional_embedding|attn_mask", CLIP_TEXT),
    (r"input_resolution|context_length|vocab_size", "a size of the text tower or of the images"),
    (r"logit_bias", "the bias of the sigmoid loss, which these logits do not use"),
)


def plan_joint(checkpoint: Checkpoint, settings: ConvertConfig) -> JointPlan:
    """Recognize a checkpoint with a vision tower and plan its conversion.

    Raises:
        ValueError: The checkpoint is not recognized, or tensors are missing, unexpected or not finite; the message
            names the first few.
    """
    known = _read_model_config(settings.model_config)
    with wrap_read_errors(checkpoint.path):
        if checkpoint.config.get("model_type") == LLM2CLIPConfig.model_type:
            config, renames = LLM2CLIPConfig.from_dict(checkpoint.config), [(name, name) for name in checkpoint]
            recognized = "an LLM2CLIP model of this package"
            plan = JointPlan(recognized, config, LLM2CLIPModel, dict(checkpoint), renames, [])
            names = ("model_config", "text_model", "projection_dim", "quick_gelu")
            refuse(settings, names, f"{checkpoint.path} is {recognized}")
        else:
            plan = _foreign_plan(checkpoint, settings, known)
        if isinstance(plan.config, LLM2CLIPConfig):
            plan.config.initializer = settings.initializer
        if settings.reset_heads:
            plan.reset_heads()
        plan.fit_image_size(settings.image_size)
        plan.to_one_dtype()
        plan.check()
        return plan


def _read_model_config(path: str | None) -> LLM2CLIPConfig | None:
    if path is None:
        return None
    fields = read_json(path)
    missing = [key for key in ("embed_dim", "vision_cfg") if key not in fields]
    if missing:
        raise ValueError(f"{path} is not a model_configs JSON of the original code: it lacks {', '.join(missing)}.")
    with wrap_read_errors(path):
        return joint_config({"quick_gelu": True, **fields})


def _foreign_plan(checkpoint: Checkpoint, settings: ConvertConfig, known: LLM2CLIPConfig | None) -> JointPlan:
    tower = find_tower(checkpoint.shapes)
    if tower is None:
        shown = ", ".join(list(checkpoint.shapes)[:5])
        raise ValueError(
            f"{checkpoint.path} contains no vision tower or LLM in a known layout; its first tensors are {shown}."
        )
    kind, prefix = tower
    renamed = _joint_layout(kind, prefix, checkpoint).rename(checkpoint)
    if renamed.unknown:
        raise ValueError(
            f"{checkpoint.path} was recognized as {kind.name}, but {len(renamed.unknown)} of its tensors do not "
            f"belong to it: {', '.join(renamed.unknown[:4])}. It is another model, or from modified code."
        )
    config = known.vision_config if known is not None else _vision_config(kind, prefix, checkpoint)
    if settings.quick_gelu is not None:
        if config.model_type != "clip_vision_model":
            raise ValueError(f"quick_gelu applies to OpenAI towers; this one has type {config.model_type}.")
        config.hidden_act = "quick_gelu" if settings.quick_gelu else "gelu"
    model_class = EVA02VisionModel if config.model_type == EVA02VisionConfig.model_type else AutoModel
    plan = JointPlan("", config, model_class, renamed.tensors, renamed.renames, renamed.dropped)
    if any(name.startswith(ADAPTER_PART) for name in plan.tensors):
        plan.recognized = f"an LLM2CLIP model: {kind.name}, text adapter"
        refuse(settings, ["projection_dim"], f"{checkpoint.path} has a projection")
        _as_llm2clip(plan, known, settings)
    elif kind.layout is HUB_EVA02:
        plan.recognized = f"the vision half of an LLM2CLIP model: {kind.name}, without text adapter"
        refuse(settings, ["text_model", "projection_dim"], f"{checkpoint.path} is {plan.recognized}")
        _as_vision_half(plan)
    elif settings.text_model is not None:
        plan.recognized = f"a plain CLIP: {kind.name}, the initial model of stage 2"
        _as_start(plan, settings.text_model, settings)
    else:
        plan.recognized = f"a plain vision tower: {kind.name}"
        names = ("projection_dim", "reset_heads", "initializer", "seed")
        refuse(settings, names, "without text_model there is no head")
        _as_tower(plan)
    return plan


def _as_llm2clip(plan: JointPlan, known: LLM2CLIPConfig | None, settings: ConvertConfig) -> None:
    """Complete the plan of a checkpoint with a text adapter; the LLM is by default that of the published model."""
    width = plan.tensors["text_adapter.norm.weight"].shape[0]
    published = known or published_like({name: getattr(plan.vision_config, name) for name in SIZES}, width)
    text_model: Any = settings.text_model
    revision: Any = settings.text_model_revision
    if text_model is None and known is None and published is not None:
        text_model, revision = published.text_model_name_or_path, published.text_model_revision
    if text_model is None:
        raise ValueError(
            f"the text adapter expects embeddings of width {width}; give their LLM with --text-model REPO."
        )
    siglip = plan.vision_config.model_type == "siglip_vision_model"
    _pair(
        plan,
        text_model,
        revision,
        projection_dim=plan.tensors["text_adapter.proj.weight"].shape[0],
        visual_projection="visual_projection.weight" in plan.tensors,
        visual_projection_bias="visual_projection.bias" in plan.tensors,
        adapter_normalize=published.adapter_normalize if published is not None else not siglip,
    )
    if (llm_width := plan.config.text_config.hidden_size) != width:
        raise ValueError(
            f"the text adapter expects embeddings of width {width}, but {text_model} has width {llm_width}: it is the "
            "adapter of another LLM. Give that one with --text-model."
        )


def _as_start(plan: JointPlan, text_model: str, settings: ConvertConfig) -> None:
    """Complete the plan of a plain CLIP that becomes the initial model of stage 2, with a new head and adapter."""
    width, bias = settings.projection_dim, plan.vision_config.model_type == EVA02VisionConfig.model_type
    plan.drop(HEAD, f"the head of another embedding space; the new one has width {width}")
    _pair(plan, text_model, settings.text_model_revision, projection_dim=width, visual_projection_bias=bias)
    plan.new += [(HEAD, "trained in stage 2"), (ADAPTER_PART, "trained in stage 2")]


def _pair(plan: JointPlan, text_model: str, revision: str | None, **fields: Any) -> None:
    """Make the result an [`LLM2CLIPModel`] with this LLM."""
    text_config = _text_config(text_model, revision)
    plan.config = LLM2CLIPConfig(
        vision_config=plan.vision_config,
        text_config=text_config,
        text_model_name_or_path=absolute_path(text_model),
        text_model_revision=revision,
        text_model_fingerprint=text_config.fingerprint,
        **fields,
    )
    plan.model_class = LLM2CLIPModel
    if SCALE_PART not in plan.tensors:
        plan.new.append((SCALE_PART, "not in the checkpoint; initialized to ln(1 / 0.07)"))


def _as_vision_half(plan: JointPlan) -> None:
    """Complete the plan of a vision tower with a projection but without a text adapter."""
    plan.config = LLM2CLIPConfig(
        vision_config=plan.vision_config,
        projection_dim=plan.tensors["visual_projection.weight"].shape[0],
        visual_projection_bias="visual_projection.bias" in plan.tensors,
    )
    plan.model_class = LLM2CLIPVisionModelWithProjection
    plan.drop(SCALE_PART, "not needed for image embeddings")
    plan.notes.append("it has no text adapter and embeds only images; the .pt file of the same repo has one.")


def _as_tower(plan: JointPlan) -> None:
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


def _text_config(name: str, revision: str | None) -> LLM2CLIPTextConfig:
    for published in published_models().values():
        if not published.is_joint and name in (published.name, published.checkpoint):
            return copy.deepcopy(published.config)
    try:
        return describe_text_tower(name, revision)[0]
    except OSError as error:
        raise ValueError(
            f"the config and tokenizer of {name} cannot be read ({str(error).splitlines()[0]}); give --text-model a "
            "folder with its config.json and its tokenizer files, which is enough: weights are not needed."
        ) from error


def _joint_layout(kind: TowerKind, prefix: str, checkpoint: Checkpoint) -> Layout:
    layout = kind.layout
    if layout is None:
        names = (name.removeprefix(prefix) for name in checkpoint if name.startswith(prefix))
        layout = unchanged(name for name in names if not name.endswith("position_ids"))
    heads = (
        *linears("visual.head", "visual_projection"),
        *linears("visual_projection", "visual_projection"),
        *(linears("head", "visual_projection") if not prefix else ()),
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


def _vision_config(kind: TowerKind, prefix: str, checkpoint: Checkpoint) -> PretrainedConfig:
    """Return the config of the tower, from the config of the checkpoint if it has one, and from shapes."""
    shapes = {name.removeprefix(prefix): shape for name, shape in checkpoint.shapes.items() if name.startswith(prefix)}
    if kind.layout is None and checkpoint.config.get("vision_config") is not None:
        whole = AutoConfig.for_model(checkpoint.config["model_type"]).from_dict(checkpoint.config)
        return config_of_shapes(kind, shapes, whole.vision_config.to_dict())
    return config_of_shapes(kind, shapes)
