"""Models of the original code as tensors and configs, without files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llm2clip.convert.original import joint_config, original_layout
from modeling_llm2clip import LLM2CLIPConfig

ADAPTER_NORM = "text.text_adaptor.4.weight"


def from_original(
    state_dict: Mapping[str, Tensor], model_config: Mapping[str, Any]
) -> tuple[LLM2CLIPConfig, dict[str, Tensor]]:
    """Convert all or some of the tensors of an original model, and its model_configs JSON.

    Returns:
        The config, with the width of the LLM that the adapter has, and the state dict of an `LLM2CLIPModel`.
    """
    if ADAPTER_NORM in state_dict:
        width = state_dict[ADAPTER_NORM].shape[0]
        model_config = {**model_config, "text_cfg": {**model_config.get("text_cfg", {}), "llm_embedding_dim": width}}
    config = joint_config(model_config)
    renamed = original_layout(config.vision_config).rename(state_dict)
    assert not renamed.unknown, renamed.unknown
    return config, renamed.tensors
