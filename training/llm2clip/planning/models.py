"""The models of a recipe, built from their configs alone: no weights are read, and none take memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from llm2clip.convert.published import FOLDER
from llm2clip.trainers.alignment import HEADS, freeze_maps, head_fields
from llm2clip.trainers.closed_form import DEFAULT_WIDTH
from llm2clip.trainers.frozen_layers import FrozenLayers, freeze_unused
from llm2clip.trainers.lora import add_lora
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.run_stage2 import CONFIG_FIELDS
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import NEW_MODEL_FIELDS, Stage2Recipe
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPTextConfig, LLM2CLIPTextModel

ModelT = TypeVar("ModelT", bound=nn.Module)
OUR_TYPES = (LLM2CLIPConfig.model_type, LLM2CLIPTextConfig.model_type)


def read_config(name: str, setting: str, revision: str | None = None) -> Any:
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
    place = str(packaged) if "/" not in name and packaged.is_dir() and not Path(name).is_dir() else name
    try:
        return AutoConfig.from_pretrained(place, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the config of {name} cannot be read ({str(error).strip().splitlines()[0]}). Give --{setting} a folder "
            "that contains its config.json (no weights are needed), or the name of a packaged config of the same "
            f"shape: {', '.join(sorted(path.parent.name for path in FOLDER.glob('*/config.json')))}."
        ) from None


@contextmanager
def new_weights_in(dtype: torch.dtype) -> Iterator[None]:
    """Within this context, models are built in a dtype, without memory for their weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def with_fake_weights(model: ModelT) -> ModelT:
    """Replace the weights of a model on the meta device by those of the current mode of tensors without data.

    These belong to a device, so that autocast and attention do what they do there. The model is built on the meta
    device first, because such tensors cannot change their dtype, as LoRA layers do.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        options: dict[str, Any] = {"recurse": False, "remove_duplicate": False}
        for name, tensor in [*module.named_parameters(**options), *module.named_buffers(**options)]:
            if not tensor.is_meta:
                continue
            if id(tensor) not in made:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
            setattr(module, name, made[id(tensor)])
    return model


def text_config_of(name: str, setting: str, revision: str | None = None, **fields: Any) -> LLM2CLIPTextConfig:
    """Read the config of a text tower, or make that of a plain LLM."""
    config = read_config(name, setting, revision)
    if config.model_type in OUR_TYPES:
        return copy.deepcopy(getattr(config, "text_config", config))
    given = {key: value for key, value in fields.items() if value is not None}
    return LLM2CLIPTextConfig(decoder_config=config, **given)


def build_text_tower(config: LLM2CLIPTextConfig, dtype: str, attention: str | None) -> LLM2CLIPTextModel:
    """Build a text tower.

    FlashAttention, which need not be installed here, keeps what torch's own attention keeps.
    """
    stored = getattr(config.decoder_config, "dtype", None) or torch.float32
    wanted = stored if dtype == "auto" else getattr(torch, dtype)
    attention = "sdpa" if attention is not None and attention.startswith("flash") else attention
    if attention is not None:
        config.decoder_config._attn_implementation = attention
    config.decoder_config.dtype = wanted
    with new_weights_in(wanted):
        return LLM2CLIPTextModel(config)


def trained_text_tower(config: Stage1Recipe | MNTPRecipe) -> LLM2CLIPTextModel:
    """Build the text tower of stage 1 or MNTP with its LoRA."""
    fields = {"pooling": config.pooling, "max_text_length": config.max_text_length}
    if config.bidirectional is not None:
        fields["bidirectional"] = config.bidirectional
    text = text_config_of(config.model_name_or_path, "model_name_or_path", config.model_revision, **fields)
    model = build_text_tower(text, config.dtype, config.attn_implementation)
    with torch.device("meta"):
        add_lora(model, config)
    return model


def joint_config(config: Stage2Recipe) -> LLM2CLIPConfig:
    """The config of the model of stage 2."""
    if config.model_name_or_path is not None:
        return read_config(config.model_name_or_path, "model_name_or_path")
    vision = read_config(config.vision_model_name_or_path, "vision_model_name_or_path", config.vision_model_revision)
    text = text_config_of(config.text_model_name_or_path, "text_model_name_or_path", config.text_model_revision)
    fields = {
        name: getattr(config, key)
        for key in NEW_MODEL_FIELDS
        if getattr(config, key) is not None and key != "logit_scale_init_value"
        for name in CONFIG_FIELDS.get(key, (key,))
    }
    if config.alignment == "closed_form":
        raise ValueError("alignment: closed_form trains nothing, so that there is nothing to plan: it takes minutes.")
    if config.alignment != "train":
        fields |= head_fields(HEADS[config.alignment], config.projection_dim or DEFAULT_WIDTH)
    if config.loss == "sigmoid":
        fields.setdefault("logit_bias_init_value", 0.0)
    return LLM2CLIPConfig(
        vision_config=copy.deepcopy(getattr(vision, "vision_config", vision)),
        text_config=text,
        text_model_name_or_path=config.text_model_name_or_path,
        **fields,
    )


def trained_joint_model(config: Stage2Recipe) -> LLM2CLIPModel:
    """Build the model of stage 2 without its LLM."""
    joint = joint_config(config)
    attention = config.attn_implementation
    if attention is not None and not attention.startswith("flash"):
        joint.vision_config._attn_implementation = attention
    joint.vision_config.dtype = joint.dtype = torch.float32
    with new_weights_in(torch.float32):
        model = LLM2CLIPModel(joint, text_model=False)
    if config.patch_dropout is not None:
        model.vision_model.config.patch_dropout = config.patch_dropout
    freeze_unused(model.vision_model)
    if config.freeze_vision == "all":
        model.vision_model.requires_grad_(False)
        if config.alignment != "train":
            freeze_maps(model)
    elif config.freeze_vision_layers:
        with torch.device("meta"):
            FrozenLayers(model.vision_model, config.freeze_vision_layers, image_size(model))
    return model


def image_size(model: LLM2CLIPModel) -> tuple[int, int]:
    """Height and width of the images of a model, in pixels."""
    size = model.config.vision_config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])
