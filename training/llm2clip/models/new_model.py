"""Build the model of two pretrained towers that stage 2 trains: a new projection and adapter, and a logit scale."""

from __future__ import annotations

import copy
import inspect
import math
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from modeling_llm2clip import (
    EVA02VisionConfig,
    EVA02VisionModel,
    LLM2CLIPConfig,
    LLM2CLIPModel,
    LLM2CLIPVisionModelWithProjection,
)
from modeling_llm2clip.modeling_llm2clip_utils import absolute_path, hub_arguments, load_complete


def from_vision_text_pretrained(
    vision_model: str | os.PathLike[str] | PreTrainedModel,
    text_model: Any,
    *,
    vision_model_kwargs: dict[str, Any] | None = None,
    text_config: PretrainedConfig | None = None,
    text_model_revision: Any = None,
    logit_scale_init_value: float | str | None = None,
    **config_fields: Any,
) -> LLM2CLIPModel:
    """Build a model for stage 2: a pretrained vision tower, a text tower, and a new projection and adapter.

    Args:
        vision_model: A vision model, or its repository or folder; of a CLIP-like model, the vision half is used.
        text_model: A text tower, which becomes part of the model, or the repository or folder of one, which is
            recorded but not loaded; None for a model that takes `llm_embeds` alone.
        text_config: Config of the text tower, if its repository has none (a plain LLM). For a model that takes
            `llm_embeds` alone, `LLM2CLIPTextConfig(encoders=..., fingerprint=...)` by the cache of its rows.
        logit_scale_init_value: Logarithm of the initial logit scale; `"checkpoint"`: that of the CLIP-like
            checkpoint of the vision tower. By default the checkpoint's, as in the original code, or ln(1 / 0.07)
            if it has none.
        config_fields: Fields of [`LLM2CLIPConfig`], such as `projection_dim`.

    Raises:
        ValueError: The checkpoint has no logit scale, but `"checkpoint"` asks for it; or there is no such field,
            or neither a text tower nor `encoders`.
    """
    refuse_unknown(LLM2CLIPConfig, config_fields)
    if (text_model is None) != bool(getattr(text_config, "encoders", None)):
        raise ValueError("give a text_model, or in its place text_config=LLM2CLIPTextConfig(encoders=...).")
    source, vision_kwargs = vision_model, vision_model_kwargs or {}
    if not isinstance(vision_model, PreTrainedModel):
        vision_model = load_vision_tower(vision_model, vision_kwargs)
    scale = new_logit_scale(source, vision_model, vision_kwargs, logit_scale_init_value)
    if scale is not None:
        config_fields["logit_scale_init_value"] = scale
    if isinstance(text_model, PreTrainedModel):
        text_config = text_model.config
    else:
        if text_config is None:
            text_config = AutoConfig.from_pretrained(text_model, revision=text_model_revision)
            text_config = getattr(text_config, "text_config", text_config)
        if text_model is not None:
            config_fields["text_model_name_or_path"] = absolute_path(text_model)
            config_fields["text_model_revision"] = text_model_revision
        config_fields.setdefault("text_model_fingerprint", getattr(text_config, "fingerprint", None))
    # Copied, because a new config resets the attention implementation of its sub-configs.
    config = LLM2CLIPConfig(
        vision_config=copy.deepcopy(vision_model.config), text_config=copy.deepcopy(text_config), **config_fields
    )
    model = LLM2CLIPModel(config, text_model=False, vision_model=vision_model)
    if isinstance(text_model, PreTrainedModel):
        model.set_text_model(text_model)  # type: ignore[arg-type]
    return model


def refuse_unknown(config_class: Any, fields: dict[str, Any]) -> None:
    """Raise ValueError for a field that a config does not have, which its class would keep as an extra one."""
    known = inspect.signature(config_class.__init__).parameters
    if unknown := [name for name in fields if name not in known]:
        raise ValueError(f"{config_class.__name__} has no field {unknown[0]!r}; it has {', '.join([*known][1:-1])}.")


class LLM2CLIPLogitScale(PreTrainedModel):
    """The logit scale of a CLIP-like checkpoint alone; NaN if the checkpoint has none."""

    config_class = PretrainedConfig
    _keys_to_ignore_on_load_unexpected = [r".*"]
    _keys_to_ignore_on_load_missing = [r"logit_scale"]

    def __init__(self, config: PretrainedConfig, shape: tuple[int, ...] = ()) -> None:
        super().__init__(config)
        self.logit_scale = nn.Parameter(torch.full(shape, math.nan))
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        nn.init.constant_(module.logit_scale, math.nan)


def read_logit_scale(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> float | None:
    """Read the logarithm of a checkpoint's logit scale, whatever else it holds; None if it has none."""
    for shape in ((), (1,)):  # of CLIP, of SigLIP
        options = {**hub_arguments(kwargs), "dtype": torch.float32, "ignore_mismatched_sizes": True}
        model = LLM2CLIPLogitScale.from_pretrained(name, shape, config=PretrainedConfig(), **options)
        if not model.logit_scale.isnan().any():
            return model.logit_scale.item()
    return None


def new_logit_scale(
    source: Any, tower: PreTrainedModel, kwargs: dict[str, Any], asked: float | str | None
) -> float | None:
    """Return the logarithm of the logit scale that a new model starts with; None for the default of its config.

    Args:
        source: Where the vision tower is from: the tower itself, or its repository or folder.
        asked: A number, `"checkpoint"` to insist on that of the source, or None to take it if there is one.

    Raises:
        ValueError: The source has no logit scale, but is asked for it.
    """
    if asked is not None and asked != "checkpoint":
        return float(asked)
    scale = None if source is tower else read_logit_scale(source, kwargs)
    if scale is None:
        # `llm2clip convert` keeps the scale there, because a tower has no such weight.
        scale = getattr(tower.config, "logit_scale_init_value", None)
    if scale is None and asked is not None:
        raise ValueError(
            f"{tower.name_or_path or type(tower).__name__} has no logit scale; set logit_scale_init_value to a "
            "number, or leave it unset for ln(1 / 0.07)."
        )
    return scale


def load_vision_tower(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load a vision tower: a vision model, or that of a CLIP-like or LLM2CLIP model; otherwise raise ValueError."""
    config = AutoConfig.from_pretrained(name, **hub_arguments(kwargs))
    if config.model_type == LLM2CLIPConfig.model_type:
        return LLM2CLIPVisionModelWithProjection.from_pretrained(name, **kwargs).vision_model
    # Only the vision half of a CLIP-like repository is read.
    config = getattr(config, "vision_config", config)
    loader: Any = EVA02VisionModel if config.model_type == EVA02VisionConfig.model_type else AutoModel
    tower, _ = load_complete(loader.from_pretrained, name, config=config, **kwargs)
    if tower.main_input_name != "pixel_values":
        raise ValueError(f"{name} contains a {type(tower).__name__}, which does not take images; pass a vision tower.")
    return tower
