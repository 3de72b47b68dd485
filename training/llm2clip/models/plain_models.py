"""Load plain text models: LLMs, encoders, text halves of CLIP, and embedding models of sentence-transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from llm2clip.models.repos import OUR_MODELS, embedding_modules, find_file, inspect_repo
from modeling_llm2clip import LLM2CLIPTextConfig, LLM2CLIPTextModel
from modeling_llm2clip.modeling_llm2clip_decoder import is_encoder_half, text_model_class
from modeling_llm2clip.modeling_llm2clip_utils import hub_arguments, load_complete

# The usual limit of captions in tokens; encoders that have fewer positions get a lower one.
LENGTH = 512


def is_encoder(config: PretrainedConfig) -> bool:
    """Return whether a text model attends in both directions by its design: BERT and its kind, the encoder of T5."""
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return is_encoder_half(config) or (masked and not config.is_encoder_decoder)


def encoder_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of a text config by which an encoder differs from a decoder: none for a decoder."""
    if config.model_type in ("clip", "clip_text_model"):
        # As CLIPTextModelWithProjection: the state of the end token, projected.
        layer = {"out_features": config.projection_dim, "bias": False, "activation": "linear"}
        fields = {"bidirectional": None, "pool_prompt": True, "pooling": "eos_token", "dense": [layer]}
        return {**fields, "max_text_length": getattr(config, "text_config", config).max_position_embeddings}
    if not is_encoder(config):
        return {}
    fields = {"bidirectional": None, "pool_prompt": True}
    positions = getattr(config, "max_position_embeddings", None) or LENGTH
    return fields if positions >= LENGTH else {**fields, "max_text_length": positions}


def load_plain(name: str, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Load a plain text model: an LLM, an encoder, or an embedding model of sentence-transformers.

    Args:
        name: Repository id or folder.
        options: Arguments of `from_pretrained`.

    Returns:
        The text model, and the weights of the Dense layers after pooling, named as in a `ModuleList`.
    """
    hub = hub_arguments(options)
    trust = {key: options[key] for key in ("trust_remote_code", "code_revision") if key in options}
    config = AutoConfig.from_pretrained(name, **hub, **trust)
    if config.model_type == "clip":
        half, _ = load_complete(CLIPTextModel.from_pretrained, name, **options)
        half.config.projection_dim = config.projection_dim
        config.text_config.projection_dim = config.projection_dim  # which is the only one that CLIPModel reads
        load_projected = CLIPTextModelWithProjection.from_pretrained
        projected, _ = load_complete(load_projected, name, **{**options, "config": config.text_config})
        return half, {"0.weight": projected.text_projection.weight.detach()}
    auto, own_options = text_model_class(config)
    model, _ = load_complete(auto.from_pretrained, name, **own_options, **options)
    folders = [module["path"] for module in embedding_modules(name, **hub) if module["type"].endswith("Dense")]
    dense: dict[str, Tensor] = {}
    for number, folder in enumerate(folders):
        path = find_file(name, f"{folder}/model.safetensors", **hub)
        if path is None:
            raise ValueError(f"{folder} of {name} has no model.safetensors; save it again with sentence-transformers.")
        dense |= {f"{number}.{key.removeprefix('linear.')}": value for key, value in load_file(path).items()}
    return model, dense


def wrap_plain(
    config: LLM2CLIPTextConfig, decoder: PreTrainedModel, dense: Mapping[str, Tensor] | None = None
) -> LLM2CLIPTextModel:
    """Give a text model, and the weights of its Dense layers, the prompt and pooling of a config."""
    config = copy.deepcopy(config)
    config.fingerprint = None  # it is of the weights that the config was saved with
    tower = LLM2CLIPTextModel(config, decoder=decoder)
    try:
        tower.dense.load_state_dict(dense or {})
    except RuntimeError as error:
        raise ValueError(f"{decoder.name_or_path} has other Dense layers than its config says: {error}") from error
    return tower


def load_as_tower(name: str, config: Any, revision: str | None = None) -> LLM2CLIPTextModel:
    """Load a text tower, with its adapter merged, or a plain text model with the prompt and pooling of a config.

    The weights have the dtype of their files. `config` is an [`LLM2CLIPTextConfig`].
    """
    options: dict[str, Any] = {"revision": revision, "dtype": "auto"}
    if inspect_repo(name, revision).kind not in OUR_MODELS:
        return wrap_plain(config, *load_plain(name, options))
    tower = LLM2CLIPTextModel.from_pretrained(name, default_config=config, **options)
    tower.merge_adapter()
    return tower
