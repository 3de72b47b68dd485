"""Write the tables of docs/models.md: which decoders and encoders of the installed transformers can be a text tower.

python docs/make_models.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, __version__, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from llm2clip.utils.attention_probe import LAYER_FIELDS, packs_exactly, probe_attention
from modeling_llm2clip import LLM2CLIPTextModel
from modeling_llm2clip.modeling_llm2clip_decoder import is_encoder, text_model_class

PAGE = Path(__file__).with_name("models.md")
TABLE = re.compile(r"(?<=<!-- (decoders|encoders): made by docs/make_models\.py -->\n).*?(?=<!-- /\1 -->)", re.DOTALL)
MOST_WEIGHTS = 5_000_000


def _each(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Small values of the fields that decoders' configs share; a config takes those that it has.
SMALL: dict[str, Any] = {
    **_each(32, "hidden_size n_embd d_model embedding_size lru_width attention_hidden_size word_embed_proj_dim"),
    **_each(64, "intermediate_size intermediate_size_mlp ffn_hidden_size ffn_dim dff dim_ff n_inner d_inner"),
    **_each(64, "dense_intermediate_size shared_intermediate_size decoder_ffn_dim mamba_d_ssm"),
    **_each(
        16, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank kv_lora_rank"
    ),
    **_each(
        4, "num_attention_heads num_key_value_heads n_head n_heads num_heads num_kv_heads decoder_attention_heads"
    ),
    **_each(4, "attention_heads linear_num_key_heads linear_num_value_heads swa_num_attention_heads"),
    **_each(4, "swa_num_key_value_heads num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_each(8, "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim kv_channels rotary_dim dim_head d_head"),
    **_each(
        8, "linear_key_head_dim linear_value_head_dim attention_head_dim mamba_d_state mamba_d_head mamba_dt_rank"
    ),
    **_each(8, "state_size ssm_state_size mamba_head_dim time_step_rank mamba_n_heads mamba_num_heads"),
    **_each(8, "swa_head_dim"),
    **_each(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k"),
    **_each(1, "n_group topk_group n_groups mamba_n_groups num_expert_group n_shared_experts num_shared_experts"),
    **_each(4, "sliding_window sliding_window_size attention_chunk_size window_size attention_window_size"),
    **_each(128, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    **_each(4, "num_hidden_layers n_layer n_layers num_layers decoder_layers"),
    **_each(430, "vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    **_each(8, "hidden_size_per_layer_input mamba_chunk_size chunk_size"),
    **_each(1, "pad_token_id bos_token_id eos_token_id"),
}
# What a type needs besides, because its fields depend on each other.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS = {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}}
HEADS = {"attention_hidden_size": 64, "attention_head_dim": 16}
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "cosmos3_edge_text": SECTIONS,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 64, "activation_sparsity_pattern": [0.0] * 5},
    "glm5_next_text": {"linear_head_dim": 8, "linear_num_heads": 4},
    "glm4v_moe_text": SECTIONS,
    "glm4v_text": SECTIONS,
    "glm_image_text": SECTIONS,
    "glm_ocr_text": SECTIONS,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8, **SECTIONS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4},
    "qwen2_5_vl_text": SECTIONS,
    "qwen2_vl_text": SECTIONS,
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1, **HEADS},
    "zamba2": {"mamba_headdim": 8, "layers_block_type": ["linear_attention", "hybrid"] * 2, **HEADS},
    "zaya": {"num_experts_per_tok": 1},
}


def types() -> list[str]:
    """Return the types of decoders: of causal language models, and of the language models inside of other models."""
    causal = (name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    inside = (name for name in MODEL_MAPPING_NAMES if name.endswith("_text"))
    return sorted({name for name in (*causal, *inside) if name in MODEL_MAPPING_NAMES and _is_decoder(name)})


def encoder_types() -> list[str]:
    """Return the types of encoders: of masked language models, and of models with an encoder that stands alone."""
    found = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES}
    return sorted(name for name in found if name in CONFIG_MAPPING and is_encoder(CONFIG_MAPPING[name]()))


def _is_decoder(name: str) -> bool:
    """Whether a type is neither an encoder-decoder nor a wrapper around a language model."""
    kind = CONFIG_MAPPING[name]
    return not getattr(kind, "is_encoder_decoder", False) and "text_config" not in kind.sub_configs


def small_config(name: str) -> PretrainedConfig:
    """Return the config of a small decoder that has one layer of each of its type's kinds."""
    default = CONFIG_MAPPING[name]().to_dict()
    fields = {key: value for key, value in SMALL.items() if isinstance(default.get(key), (int, list)) and default[key]}
    kinds = default.get("layer_types")
    if isinstance(kinds, list):
        places = sorted({*map(kinds.index, kinds), *range(min(4, len(kinds)))})
        columns = {
            key: value for key, value in default.items() if isinstance(value, list) and len(value) == len(kinds)
        }
        fields |= {key: [value[place] for place in places] for key, value in columns.items()}
        fields["num_hidden_layers"] = len(places)
    return CONFIG_MAPPING[name](**{**fields, **MORE.get(name, {})})


def small_decoder(name: str) -> Any:
    """Return a small random decoder, or None, with the reason on stderr, if it cannot be built or read text alone."""
    try:
        config = small_config(name)
        auto, options = text_model_class(config)
        with torch.device("meta"):
            if sum(weight.numel() for weight in auto.from_config(config, **options).parameters()) > MOST_WEIGHTS:
                raise ValueError(f"it has more than {MOST_WEIGHTS:,} weights")
        torch.manual_seed(0)
        decoder = auto.from_config(config, **options).eval()
        with torch.no_grad():
            for weight in decoder.parameters():
                # The default initialisation is so small that a wrong mask would hardly show.
                if weight.ndim > 1:
                    weight.normal_(std=0.2)
            decoder(input_ids=torch.arange(2, 14)[None], **({} if is_encoder(config) else {"use_cache": False}))
    # Of any kind: each type's own code runs here, on a config that its authors did not foresee.
    except Exception as error:
        print(f"{name} is not tried: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return None
    return decoder


def outcome(name: str) -> str | None:
    """Return `works`, or why a type of decoder is refused, or None if there is no small decoder of this type."""
    decoder = small_decoder(name)
    if decoder is None:
        return None
    try:
        tower = LLM2CLIPTextModel.from_decoder(decoder)
        probe_attention(tower)
    except ValueError as error:
        if "cannot be a text tower: " not in str(error):
            raise
        reason = re.split(r"\. (?:A text tower needs|Use )", str(error).split("cannot be a text tower: ")[1])[0]
        return "refused: " + reason.split(" (")[0]
    return "works" if tower.config.bidirectional or packs_exactly(tower) else "works, one text per row"


def _layers(name: str) -> str:
    config = small_config(name)
    found = (getattr(config, field, None) for field in LAYER_FIELDS)
    return ", ".join(dict.fromkeys(next((kinds for kinds in found if kinds), ())))


def table(kind: str) -> str:
    """Return the table of `decoders` or `encoders`: the types with their outcome, and those that were not tried."""
    outcomes = {name: outcome(name) for name in (types() if kind == "decoders" else encoder_types())}
    rows = [f"| `{name}` | {_layers(name)} | {found} |" for name, found in outcomes.items() if found is not None]
    untried = ", ".join(f"`{name}`" for name, found in outcomes.items() if found is None)
    head = [
        f"The types of transformers {__version__}, each tried as a small model with random weights on a CPU (sdpa,"
    ]
    head += ["or eager where a type has no sdpa):", "", "| type | layers | text tower |", "| --- | --- | --- |"]
    tail = ["", f"Not tried, since they cannot be built small or do not read text alone: {untried}."]
    return "\n" + "\n".join([*head, *rows, *tail]) + "\n\n"


def with_table(page: str) -> str:
    """Return the text of the page with its tables made anew."""
    return TABLE.sub(lambda found: table(found[1]), page)


if __name__ == "__main__":
    logging.set_verbosity_error()
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
