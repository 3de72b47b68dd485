"""Plan the conversion of a checkpoint with a vision tower: recognize it and account for every tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, PretrainedConfig

from llm2clip.convert.checkpoint import Checkpoint
from llm2clip.convert.joint_model import as_llm2clip, as_start, as_tower, as_vision_half
from llm2clip.convert.joint_plan import ADAPTER_PART, TOWER, JointPlan, listed
from llm2clip.convert.layouts import ADAPTER, HUB_EVA02, SCALE
from llm2clip.convert.original import joint_config
from llm2clip.convert.renaming import Layout, Rule, linears, unchanged
from llm2clip.convert.vision_towers import TowerKind, config_of_shapes, find_tower
from llm2clip.utils.files import read_json
from llm2clip.utils.library_errors import wrap_read_errors
from modeling_llm2clip import EVA02VisionConfig, EVA02VisionModel, LLM2CLIPConfig, LLM2CLIPModel

if TYPE_CHECKING:
    from llm2clip.convert.conversion import ConvertConfig

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
        return _checked_plan(checkpoint, settings, known)


def _checked_plan(checkpoint: Checkpoint, settings: ConvertConfig, known: LLM2CLIPConfig | None) -> JointPlan:
    is_own = checkpoint.config.get("model_type") == LLM2CLIPConfig.model_type
    plan = _own_plan(checkpoint) if is_own else _foreign_plan(checkpoint, settings, known)
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


def _own_plan(checkpoint: Checkpoint) -> JointPlan:
    config = LLM2CLIPConfig.from_dict(checkpoint.config)
    renames = [(name, name) for name in checkpoint]
    return JointPlan("an LLM2CLIP model of this package", config, LLM2CLIPModel, dict(checkpoint), renames, [])


def _foreign_plan(checkpoint: Checkpoint, settings: ConvertConfig, known: LLM2CLIPConfig | None) -> JointPlan:
    found = find_tower(checkpoint.shapes)
    if found is None:
        shown = ", ".join(list(checkpoint.shapes)[:5])
        raise ValueError(
            f"{checkpoint.path} contains no vision tower or LLM in a known layout; its first tensors are {shown}."
        )
    kind, prefix = found
    renamed = _joint_layout(kind, prefix, checkpoint).rename(checkpoint)
    if renamed.unknown:
        raise ValueError(
            f"{checkpoint.path} was recognized as {kind.name}, but {len(renamed.unknown)} of its tensors do not "
            f"belong to it: {listed(renamed.unknown, checkpoint.shapes)}. It is another model, or from modified code."
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
        as_llm2clip(plan, known, settings.text_model, settings.text_model_revision)
    elif kind.layout is HUB_EVA02:
        plan.recognized = f"the vision half of an LLM2CLIP model: {kind.name}, without text adapter"
        as_vision_half(plan)
    elif settings.text_model is not None:
        plan.recognized = f"a plain CLIP: {kind.name}, the initial model of stage 2"
        as_start(plan, settings.text_model, settings.text_model_revision, settings.projection_dim)
    else:
        plan.recognized = f"a plain vision tower: {kind.name}"
        as_tower(plan)
    return plan


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
    """The config of the tower, from the config of the checkpoint if it has one, and from shapes."""
    shapes = {name.removeprefix(prefix): shape for name, shape in checkpoint.shapes.items() if name.startswith(prefix)}
    if kind.layout is None and checkpoint.config.get("vision_config") is not None:
        whole = AutoConfig.for_model(checkpoint.config["model_type"]).from_dict(checkpoint.config)
        return config_of_shapes(kind, shapes, whole.vision_config.to_dict())
    return config_of_shapes(kind, shapes)
