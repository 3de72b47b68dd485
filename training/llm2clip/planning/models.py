"""The models of a recipe, built from their configs alone: no weights are read, and none take memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from llm2clip.convert.published import FOLDER
from llm2clip.store import PairedCache
from llm2clip.trainers.alignment import HEADS, freeze_maps, set_heads
from llm2clip.trainers.closed_form import DEFAULT_WIDTH
from llm2clip.trainers.freezing import image_size, prepare_joint_model
from llm2clip.trainers.lora import add_lora
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.run_stage2 import CONFIG_FIELDS
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import NEW_MODEL_FIELDS, Stage2Recipe
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPTextConfig, LLM2CLIPTextModel
from modeling_llm2clip.modeling_llm2clip_decoder import (
    attention_kind,
    avoid_sdpa_without_softcap,
    encoder_fields,
    text_model_class,
)

OUR_TYPES = (LLM2CLIPConfig.model_type, LLM2CLIPTextConfig.model_type)


def read_config(name: str | None, setting: str, revision: str | None = None) -> Any:
    """Read the config of a model.

    Args:
        name: Hub id, folder (its `config.json` is enough), or name of a folder of `hub_configs/`.
        setting: The setting that gives the name, for error messages.

    Raises:
        ValueError: There is no such config, or it cannot be read from here.
    """
    if not name:
        raise ValueError(f"the plan needs {setting}: a Hub id, or a folder with a config.json.")
    packaged = FOLDER / name
    folder = str(packaged) if "/" not in name and packaged.is_dir() and not Path(name).is_dir() else name
    try:
        return AutoConfig.from_pretrained(folder, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the config of {name} cannot be read ({str(error).strip().splitlines()[0]}). Give "
            f"--{setting.replace('_', '-')} a folder that contains its config.json (no weights are needed), or the "
            "name of a packaged config of the same shape: "
            f"{', '.join(sorted(path.parent.name for path in FOLDER.glob('*/config.json')))}."
        ) from None


def text_config_of(name: str, setting: str, revision: str | None, **fields: Any) -> LLM2CLIPTextConfig:
    """Read the config of a text tower, or make that of a plain text model with these fields; see `read_config`."""
    config = read_config(name, setting, revision)
    if config.model_type in OUR_TYPES:
        return getattr(config, "text_config", config)
    given = {key: value for key, value in fields.items() if value is not None}
    inner = getattr(config, "text_config", config)
    return LLM2CLIPTextConfig(decoder_config=inner, **{**encoder_fields(config), **given})


def _build(auto: Any, config: Any, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """Build a tower; FlashAttention, which need not be installed here, keeps what torch's own attention keeps."""
    config = copy.deepcopy(config)
    if attention is not None:
        config._attn_implementation = "sdpa" if attention.startswith("flash") else attention
    avoid_sdpa_without_softcap(config)
    return auto.from_config(config, dtype=dtype)


def build_text_tower(config: LLM2CLIPTextConfig, dtype: str, attention: str | None) -> LLM2CLIPTextModel:
    """Build a text tower on the meta device, as [`LLM2CLIPTextModel.from_pretrained`] does with weights."""
    stored = getattr(config.decoder_config, "dtype", None) or torch.float32
    auto, _ = text_model_class(config.decoder_config)
    with torch.device("meta"):
        decoder = _build(auto, config.decoder_config, stored if dtype == "auto" else getattr(torch, dtype), attention)
        tower = LLM2CLIPTextModel(copy.deepcopy(config), decoder=decoder)
    # The probe needs weights.
    tower.config.verified_attention = [attention_kind(decoder)]
    return tower


def trained_text_tower(config: Stage1Recipe | MNTPRecipe) -> LLM2CLIPTextModel:
    """Build the text tower of stage 1 or MNTP with its LoRA on the meta device."""
    prompt = {name: getattr(config, name) for name in ("pooling", "max_text_length", "bidirectional")}
    text = text_config_of(config.model_name_or_path, "model_name_or_path", config.model_revision, **prompt)
    model = build_text_tower(text, config.dtype, config.attn_implementation)
    with torch.device("meta"):
        add_lora(model, config)
    return model


def trained_joint_model(config: Stage2Recipe) -> LLM2CLIPModel:
    """Build the model of stage 2 on the meta device, without its LLM, with what is frozen in it."""
    if config.alignment == "closed_form":
        raise ValueError("alignment: closed_form trains nothing, so that there is nothing to plan: it takes minutes.")
    if config.model_name_or_path is not None:
        joint = read_config(config.model_name_or_path, "model_name_or_path")
        with torch.device("meta"):
            tower = _build(AutoModel, joint.vision_config, torch.float32, config.attn_implementation)
            model = LLM2CLIPModel(joint, text_model=False, vision_model=tower)
    else:
        vision_name = config.vision_model_name_or_path
        vision = read_config(vision_name, "vision_model_name_or_path", config.vision_model_revision)
        pair = next((folder for folder in config.caches if isinstance(folder, tuple)), None)
        text_name = None if pair else config.text_model_name_or_path
        if pair:
            text = LLM2CLIPTextConfig(encoders=PairedCache.of_folders(pair, verify=False).encoders)
        else:
            text = text_config_of(text_name or "", "text_model_name_or_path", config.text_model_revision)
        given = {name: getattr(config, name) for name in NEW_MODEL_FIELDS if name != "logit_scale_init_value"}
        fields = {name: value for key, value in given.items() for name in CONFIG_FIELDS.get(key, (key,))}
        if config.loss == "sigmoid":
            fields["logit_bias_init_value"] = 0.0
        fields = {name: value for name, value in fields.items() if value is not None}
        with torch.device("meta"):
            vision = getattr(vision, "vision_config", vision)
            tower = _build(AutoModel, vision, torch.float32, config.attn_implementation)
            model = LLM2CLIPModel.from_vision_text_pretrained(tower, text_name, text_config=text, **fields)
    with torch.device("meta"):
        prepare_joint_model(model, config, image_size(model))
        if config.freeze_vision == "all" and config.alignment != "train":
            set_heads(model, HEADS[config.alignment], config.projection_dim or DEFAULT_WIDTH)
            freeze_maps(model)
    return model
