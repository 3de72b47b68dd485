"""The models of a recipe, built from their configs alone: no weights are read, and none take memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from llm2clip.convert.published import FOLDER
from llm2clip.models.new_model import from_vision_text_pretrained
from llm2clip.models.plain_models import encoder_fields
from llm2clip.store import PairedCache
from llm2clip.trainers.freezing import prepare_joint_model
from llm2clip.trainers.lora import add_lora, lora_arguments
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.trainers.text_tower_config import TextTowerConfig
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPTextConfig, LLM2CLIPTextModel
from modeling_llm2clip.modeling_llm2clip_decoder import avoid_sdpa_without_softcap, text_model_class

# Settings that decide the shapes of a new model, and the length of its texts.
SHAPES = ("projection_dim", "adapter_num_layers", "vision_pooling", "vision_layers", "visual_head")
TEXT_FIELDS = ("pooling", "max_text_length", "bidirectional")


def read_config(config: Any, setting: str) -> Any:
    """Read the config of a model: of a Hub id, a folder, or the name of a folder of `hub_configs/`.

    Args:
        config: The settings of the recipe, of which `setting` has the name.

    Raises:
        ValueError: There is no such config, or it cannot be read from here.
    """
    name = getattr(config, setting)
    if not name:
        raise ValueError(f"the plan needs {setting}: a Hub id, or a folder with a config.json.")
    packaged = FOLDER / name
    folder = str(packaged) if "/" not in name and packaged.is_dir() and not Path(name).is_dir() else name
    revision = getattr(config, setting.replace("name_or_path", "revision"), None)
    try:
        return AutoConfig.from_pretrained(folder, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the config of {name} cannot be read ({str(error).strip().splitlines()[0]}). Give "
            f"--{setting.replace('_', '-')} a folder that contains its config.json (no weights are needed), or the "
            "name of a packaged config of the same shape: "
            f"{', '.join(sorted(path.parent.name for path in FOLDER.glob('*/config.json')))}."
        ) from None


def read_text_config(config: Any, setting: str) -> LLM2CLIPTextConfig:
    """Read the config of a text tower, or make that of a plain text model with the recipe's fields."""
    read = read_config(config, setting)
    if read.model_type in (LLM2CLIPConfig.model_type, LLM2CLIPTextConfig.model_type):
        return getattr(read, "text_config", read)
    fields = {key: value for key in TEXT_FIELDS if (value := getattr(config, key, None)) is not None}
    return LLM2CLIPTextConfig(decoder_config=getattr(read, "text_config", read), **{**encoder_fields(read), **fields})


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
        return LLM2CLIPTextModel(copy.deepcopy(config), decoder=decoder)


def build_trained_text_tower(config: TextTowerConfig) -> LLM2CLIPTextModel:
    """Build the text tower of stage 1 or MNTP with its LoRA on the meta device."""
    text = read_text_config(config, "model_name_or_path")
    model = build_text_tower(text, config.dtype, config.attn_implementation)  # type: ignore[attr-defined]
    if config.lora_rank:
        with torch.device("meta"):
            add_lora(model, **lora_arguments(config))
    return model


def build_trained_joint_model(config: Stage2Recipe) -> LLM2CLIPModel:
    """Build the model of stage 2 on the meta device, with its LLM only if that runs, and with what is frozen in it."""
    joint = read_config(config, "model_name_or_path") if config.model_name_or_path is not None else None
    vision = joint or read_config(config, "vision_model_name_or_path")
    pair = next((folder for folder in config.caches if isinstance(folder, tuple)), None)
    if joint is not None:
        text = joint.text_config
    elif pair:
        text = LLM2CLIPTextConfig(encoders=PairedCache.of_folders(pair, verify=False).encoders)
    else:
        text = read_text_config(config, "text_model_name_or_path")
    with torch.device("meta"):
        vision = getattr(vision, "vision_config", vision)
        tower = _build(AutoModel, vision, torch.float32, config.attn_implementation)
        if joint is not None:
            model = LLM2CLIPModel(joint, text_model=False, vision_model=tower)
        else:
            fields = {key: value for key in SHAPES if (value := getattr(config, key)) is not None}
            name = config.text_model_name_or_path or None
            model = from_vision_text_pretrained(tower, name, text_config=text, **fields)
        if config.runs_text_model:
            model.text_model = build_text_tower(text, config.text_model_dtype, None)
        prepare_joint_model(model, config)
        if config.lora_rank:
            add_lora(model.text_model, **lora_arguments(config))
    return model
