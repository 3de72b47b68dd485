"""Small models of several types of transformers, and what they are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoConfig

from modeling_llm2clip.modeling_llm2clip_decoder import text_model_class

LAYERS = {"num_hidden_layers": 4, "vocab_size": 430}
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, **LAYERS}
ROWS: dict[str, Any] = {**SIZES, "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 1}
ONE_OF_EACH = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
LINEAR = {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
STATES = {"hidden_size": 32, "state_size": 8, **LAYERS}
DECODERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("cohere", "llama", "olmo2", "phi", "qwen3", "smollm3", "starcoder2"), ROWS),
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4, "vocab_size": 430},
    "falcon": {**SIZES, "ffn_hidden_size": 64},
    "gpt_neo": {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "gpt_oss": {**ROWS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "jamba": {**ROWS, "num_experts": 4, "mamba_dt_rank": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {**ROWS, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "mamba": STATES,
    "mamba2": {**STATES, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "qwen3_next": {**ROWS, **ONE_OF_EACH, **LINEAR, "num_experts": 4, "num_experts_per_tok": 2},
    "recurrent_gemma": {**ROWS, "lru_width": 32, "attention_window_size": 4},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, **LAYERS},
    "stablelm": ROWS,
}
ENCODERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "deberta-v2", "electra", "mpnet", "roberta", "roformer", "xlm-roberta"), SIZES),
    "fnet": SIZES,
    "modernbert": {**SIZES, "pad_token_id": 1, "local_attention": 8},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4, "vocab_size": 430},
}


def small_model(model_type: str) -> Any:
    """Return a small text model with random weights."""
    config = AutoConfig.for_model(model_type, **{**DECODERS, **ENCODERS}[model_type])
    auto, options = text_model_class(config)
    torch.manual_seed(0)
    model = auto.from_config(config, **options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            # The default initialisation is so small that a wrong mask would hardly show.
            if weight.ndim > 1:
                weight.normal_(std=0.2)
    return model


@contextmanager
def embedded_batches() -> Iterator[list[Any]]:
    """Collect the token ids of every forward pass in this context."""
    batches: list[Any] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding):
            batches.append(args[0])

    handle = register_module_forward_pre_hook(record)
    try:
        yield batches
    finally:
        handle.remove()
