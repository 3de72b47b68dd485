"""The text model inside of a text tower: which class of transformers it is, and how it is called.

Decoders are made to attend in both directions. Encoders and embedding models keep their own attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)

from .configuration_llm2clip import WINDOW_FIELDS
from .modeling_llm2clip_packing import IS_CAUSAL_COUNTS, VARIABLE_LENGTHS, PackedBatch, takes_additive_mask
from .modeling_llm2clip_utils import hub_arguments, load_complete
from .sentence_transformers_llm2clip import EmbeddingModel, read_dense_weights, read_embedding_model, refusal
from .tokenization_llm2clip import with_prompt

# The usual limit of captions in tokens; encoders that have fewer positions get a lower one.
LENGTH = 512
# Total width of a window to both sides, in encoders.
TWO_SIDED_WINDOW_FIELDS = ("local_attention",)


def is_encoder_half(config: PretrainedConfig) -> bool:
    """Return whether a type has an encoder and a decoder, and transformers has a class for its encoder alone (T5)."""
    return str(MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type)).endswith("EncoderModel")


def is_encoder(config: PretrainedConfig) -> bool:
    """Return whether a text model attends in both directions by its design: BERT and its kind, the encoder of T5."""
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return is_encoder_half(config) or (masked and not config.is_encoder_decoder)


def text_model_class(config: PretrainedConfig) -> tuple[Any, dict[str, Any]]:
    """Return the auto class that builds or loads a text model, and the arguments for it.

    The layer that some encoders put on their first token is left out: published weights often lack it, and a text
    tower pools the states itself.

    Raises:
        ValueError: The model is no text model, or an encoder with a decoder that transformers cannot separate.
    """
    if not hasattr(config, "hidden_size"):
        raise ValueError(f"{config.model_type} has no hidden_size: it is not a text model, or consists of several.")
    if config.is_encoder_decoder and not is_encoder_half(config):
        raise ValueError(
            f"{config.model_type} is an encoder with a decoder, of which transformers has no class for the encoder "
            "alone; use a decoder, an encoder such as BERT, or T5."
        )
    auto: Any = AutoModelForTextEncoding if is_encoder_half(config) else AutoModel
    found: Any = auto._model_mapping.get(type(config), None)
    found = found[0] if isinstance(found, tuple) else found
    has_pooler = found is not None and "add_pooling_layer" in inspect.signature(found.__init__).parameters
    return auto, {"add_pooling_layer": False} if has_pooler else {}


def text_fields(
    name: str, config: PretrainedConfig, found: EmbeddingModel | None, given: dict[str, Any]
) -> dict[str, Any]:
    """Return the fields of the text config of a plain text model.

    Args:
        name: The model, for messages.
        found: What the files of sentence-transformers say, from [`read_embedding_model`]; None if there are none.
        given: Fields that take precedence.

    Raises:
        ValueError: The pooling leaves out the prompt in a way that a text tower cannot.
    """
    if found is None:
        return {**(_encoder_fields(config) if is_encoder(config) else {}), **given}
    fields = {**found.fields, **given}
    # As in sentence-transformers, where only a prompt's presence leaves out what precedes the text.
    fields["pool_prompt"] = fields["pool_prompt"] or not fields["prompt_prefix"]
    if not fields["pool_prompt"] and fields["pooling"] in ("bos_token", "weighted_mean"):
        raise refusal(name, f"{fields['pooling']} pooling without the prompt (include_prompt: false)")
    return fields


def _encoder_fields(config: PretrainedConfig) -> dict[str, Any]:
    fields = {"bidirectional": None, "pool_prompt": True}
    positions = getattr(config, "max_position_embeddings", None) or LENGTH
    return fields if positions >= LENGTH else {**fields, "max_text_length": positions}


def load_text_model(
    name: str, options: dict[str, Any], fields: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any], dict[str, Tensor]]:
    """Load a plain text model: an LLM, an encoder, or an embedding model of sentence-transformers.

    Args:
        name: Repository id or folder.
        options: Arguments of `from_pretrained`.
        fields: Fields of the text config that take precedence over the files.

    Returns:
        The text model, the fields of its text config, and the weights of the layers after pooling.

    Raises:
        ValueError: Weights are missing, or the files describe something that a text tower cannot do.
    """
    hub = hub_arguments(options)
    trust = {key: options[key] for key in ("trust_remote_code", "code_revision") if key in options}
    config = AutoConfig.from_pretrained(name, **hub, **trust)
    found = read_embedding_model(name, config, **hub)
    fields = text_fields(name, config, found, fields)
    if found is not None and fields["prompt_prefix"] and "prompt_token_ids" not in fields:
        fields |= _prompt_tokens(name, fields, **hub)
    auto, own_options = text_model_class(config)
    model, _ = load_complete(auto.from_pretrained, name, **own_options, **options)
    return model, fields, {} if found is None else read_dense_weights(name, found.dense_folders, **hub)


def _prompt_tokens(name: str, fields: dict[str, Any], **hub: Any) -> dict[str, Any]:
    """Return the fields of a text config that the tokens of the prompt decide."""
    length = {"max_length": fields["max_text_length"]} if "max_text_length" in fields else {}
    tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    tokenizer, count = with_prompt(tokenizer, fields["prompt_prefix"], fields.get("prompt_suffix", ""), **length)
    return {"num_prefix_tokens": count, "prompt_token_ids": list(tokenizer("")["input_ids"])}


def remove_pooler(text_model: Any) -> None:
    """Remove the layer that [`text_model_class`] leaves out from a finished text model, in place."""
    if "add_pooling_layer" in inspect.signature(type(text_model).__init__).parameters:
        text_model.pooler = None


def argument_names(text_model: Any, only_declared: bool) -> tuple[str, ...]:
    """Return which of the arguments `position_ids` and `use_cache` a text model takes.

    Args:
        only_declared: Whether arguments that it would take as `**kwargs` do not count: T5 passes them on to layers.
    """
    inner = text_model.get_base_model() if hasattr(text_model, "get_base_model") else text_model  # inside of PEFT
    parameters = inspect.signature(type(inner).forward).parameters
    anything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()) and not only_declared
    return tuple(name for name in ("position_ids", "use_cache") if anything or name in parameters)


def position_offset(text_model: nn.Module) -> int:
    """Return the position of the first token: RoBERTa and its kind count on from the index of the padding token."""
    for module in text_model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return padding + 1
    return 0


def window_reach(config: PretrainedConfig) -> int | None:
    """Return how many tokens apart two tokens may be that no window separates; None if no layer has a window."""
    fields = config.to_dict()
    one_sided = [fields.get(name) for name in WINDOW_FIELDS]
    two_sided = [fields.get(name) for name in TWO_SIDED_WINDOW_FIELDS]
    reaches = [window // 2 for window in (*one_sided, *two_sided) if isinstance(window, int) and window > 0]
    if reaches:
        return min(reaches)
    kinds = set(fields.get("layer_types") or ())
    return None if kinds <= {"full_attention"} else 0


def pack_if_worthwhile(
    tower: Any, attention_mask: Tensor, order: Tensor, kwargs: dict[str, Any]
) -> PackedBatch | None:
    """Pack a batch of a tower if attention can separate its captions and only the last states are requested.

    Args:
        attention_mask, order: See [`PackedBatch`].
        kwargs: Further arguments of the text model.
    """
    options = ("output_hidden_states", "output_attentions")
    config, own_attention = tower.decoder.config, tower.config.bidirectional is None
    asked = any(kwargs.get(name, getattr(config, name, False)) for name in options)
    if asked or tower.config.bidirectional is False or torch.compiler.is_compiling():
        return None
    single_row = config._attn_implementation in VARIABLE_LENGTHS
    supported = (single_row or config._attn_implementation == "flex_attention") and IS_CAUSAL_COUNTS
    if not supported and not takes_additive_mask(tower.decoder):
        return None
    packed = PackedBatch(attention_mask, order, single_row)
    # Packing must save enough to make up for its larger mask.
    limit = attention_mask.numel() - 1 if single_row else 0.9 * attention_mask.numel()
    if packed.position_ids.numel() > limit:
        return None
    # A mask of captions replaces that of a window.
    reach = window_reach(config) if own_attention else None
    known = tower.packing_verdicts.get(config._attn_implementation, False)
    if own_attention and not (known and (reach is None or packed.longest <= reach)):
        return None
    return packed


def dense_layers(width: int, layers: Sequence[Mapping[str, Any]]) -> nn.ModuleList:
    """Build the linear layers after pooling, for pooled states of this width."""
    widths = [width, *(layer["out_features"] for layer in layers)]
    return nn.ModuleList(
        nn.Linear(before, layer["out_features"], bias=layer["bias"])
        for before, layer in zip(widths, layers, strict=False)
    )


def load_dense(modules: nn.ModuleList, state: Mapping[str, Tensor]) -> None:
    """Load the weights of the layers after pooling; ValueError if they are other layers' or missing."""
    expected = {name: tuple(weight.shape) for name, weight in modules.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in state.items()}
    if expected != found:
        raise ValueError(
            f"the config describes Dense layers with the weights {expected}, but the files have {found}; Dense layers "
            "come from the folder of an embedding model, not from settings or from a loaded text model."
        )
    modules.load_state_dict(state)


def apply_dense(pooled: Tensor, modules: nn.ModuleList, layers: Sequence[Mapping[str, Any]]) -> Tensor:
    """Apply the layers after pooling to float32 `(batch, hidden)`; returns float32 `(batch, out_features)`."""
    for module, layer in zip(modules, layers, strict=True):
        weight: Any = module.weight
        pooled = ACT2FN[layer["activation"]](module(pooled.to(weight.dtype))).float()
    return pooled
