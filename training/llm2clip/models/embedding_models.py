"""Read the files in which sentence-transformers describes a text embedding model: pooling, prompt, layers, length."""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenizers import normalizers
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llm2clip.models.repos import read_json_file

# The first one that exists counts.
TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta")
)
POOLING = {"mean": "mean", "cls": "bos_token", "lasttoken": "last_token", "weightedmean": "weighted_mean"}
# The fields that older versions of sentence-transformers write, one for each mode.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = {
    "Identity": "linear", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu", "Sigmoid": "sigmoid",
}  # fmt: skip
# Arguments for the model and the tokenizer that do not change an embedding.
HARMLESS_ARGUMENTS = {
    "add_pooling_layer", "attn_implementation", "dtype", "padding_side", "torch_dtype", "trust_remote_code",
    "use_cache", "use_fast",
}  # fmt: skip
ARGUMENT_FIELDS = (
    "model_args", "model_kwargs", "config_args", "config_kwargs", "tokenizer_args", "processor_kwargs",
)  # fmt: skip
# A tokenizer without a limit of its own says 1e30; ours needs one.
LONGEST_LIMIT = 10**6


class EmbeddingModel(NamedTuple):
    """What the files say.

    Attributes:
        fields: Fields of [`LLM2CLIPTextConfig`]; `pool_prompt` is whether a prompt, if there is one, is pooled.
        lower_case: Whether texts are put in lower case before the tokenizer reads them.
    """

    fields: dict[str, Any]
    lower_case: bool


def read_embedding_model(name: str, config: PretrainedConfig, **hub: Any) -> EmbeddingModel | None:
    """Read the files of a repository or folder.

    Args:
        config: The text model's config.
        hub: Arguments of `from_pretrained` that locate the repository.

    Returns:
        Its settings, or None if there is no `modules.json`.

    Raises:
        ValueError: The files describe something that a text tower cannot do.
    """
    modules = read_json_file(name, "modules.json", **hub)
    if modules is None:
        return None
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    paths = [module.get("path") or "" for module in modules]
    middle = kinds[2:-1] if kinds[-1] == "Normalize" else kinds[2:]
    if kinds[:2] != ["Transformer", "Pooling"] or set(middle) - {"Dense"} or paths[0]:
        raise refusal(
            name, f"its modules are {', '.join(kinds)}; supported are Transformer, Pooling, Dense, Normalize"
        )
    transformer: dict[str, Any] = next(
        (content for file in TRANSFORMER_FILES if (content := read_json_file(name, file, **hub)) is not None), {}
    )
    settings = read_json_file(name, "config_sentence_transformers.json", **hub) or {}
    _check_transformer(name, transformer)
    pooling = read_json_file(name, f"{paths[1]}/config.json", **hub) or {}
    folders = [path for kind, path in zip(kinds, paths, strict=True) if kind == "Dense"]
    fields = {
        "pooling": _pooling(name, pooling),
        "pool_prompt": bool(pooling.get("include_prompt", True)),
        "prompt_prefix": _default_prompt(name, settings),
        "dense": [_dense(name, read_json_file(name, f"{folder}/config.json", **hub) or {}) for folder in folders],
        "normalize": kinds[-1] == "Normalize",
        # As the text model itself does: an encoder in both directions, a decoder as its config says.
        "bidirectional": None,
    }
    tokenizer = read_json_file(name, "tokenizer_config.json", **hub) or {}
    if (length := _max_length(transformer, tokenizer, config)) is not None:
        fields["max_text_length"] = length
    return EmbeddingModel(fields, bool(transformer.get("do_lower_case")))


def embedding_fields(name: str, model: EmbeddingModel, given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the text config of an embedding model.

    Args:
        name: The model, for messages.
        given: Fields that take precedence over the files.

    Raises:
        ValueError: The pooling leaves out the prompt in a way that a text tower cannot.
    """
    fields = {**model.fields, **given}
    # As in sentence-transformers, where only a prompt's presence leaves out what precedes the text.
    fields["pool_prompt"] = fields["pool_prompt"] or not fields["prompt_prefix"]
    if not fields["pool_prompt"] and fields["pooling"] in ("bos_token", "weighted_mean"):
        raise refusal(name, f"{fields['pooling']} pooling without the prompt (include_prompt: false)")
    return fields


def with_lower_case(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Make a fast tokenizer put texts in lower case first, in place."""
    backend = tokenizer.backend_tokenizer
    steps = [normalizers.Lowercase(), *([] if backend.normalizer is None else [backend.normalizer])]
    backend.normalizer = normalizers.Sequence(steps)
    return tokenizer


def refusal(name: str, fault: str) -> ValueError:
    """Return the error for a model whose files describe something that a text tower cannot do."""
    return ValueError(f"{name} is a sentence-transformers model that cannot be a text tower: {fault}.")


def _check_transformer(name: str, settings: dict[str, Any]) -> None:
    task = settings.get("transformer_task", "feature-extraction")
    text = (settings.get("modality_config") or {}).get("text") or {}
    output = text.get("method", "forward"), text.get("method_output_name", "last_hidden_state")
    if task != "feature-extraction" or output != ("forward", "last_hidden_state"):
        raise refusal(
            name, f"it embeds texts by {task}, {output[0]} and {output[1]} instead of its last hidden states"
        )
    if "message" in (settings.get("modality_config") or {}) or settings.get("processing_kwargs"):
        raise refusal(name, "it writes texts into a chat template or with tokenizer arguments of its own")
    for field in ARGUMENT_FIELDS:
        given = set(settings.get(field) or {}) - HARMLESS_ARGUMENTS - {"model_max_length"}
        if given:
            raise refusal(name, f"{field} sets {', '.join(sorted(given))}; write that into the model's own config")


def _default_prompt(name: str, settings: dict[str, Any]) -> str:
    default, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
    if default is not None and default not in prompts:
        raise refusal(name, f"default_prompt_name {default!r} is not one of its prompts ({', '.join(prompts)})")
    return (prompts.get(default) if default is not None else None) or ""


def _pooling(name: str, settings: dict[str, Any]) -> str:
    modes = settings.get("pooling_mode") or [mode for flag, mode in POOLING_FLAGS.items() if settings.get(flag)]
    modes = [modes] if isinstance(modes, str) else list(modes) or ["mean"]
    if len(modes) > 1 or modes[0] not in POOLING:
        raise refusal(name, f"its pooling is {' + '.join(modes)}; supported is one of {', '.join(POOLING)}")
    return POOLING[modes[0]]


def _dense(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    activation = settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    kind = activation.rpartition(".")[2]
    names = {settings.get(key) or "sentence_embedding" for key in ("module_input_name", "module_output_name")}
    if not activation.startswith("torch.nn.") or kind not in ACTIVATIONS:
        raise refusal(name, f"its Dense layer has the activation {activation}; supported are {', '.join(ACTIVATIONS)}")
    if settings.get("use_residual") or names != {"sentence_embedding"}:
        raise refusal(name, "its Dense layer has a residual branch or reads something other than the pooled states")
    bias = settings.get("bias", True)
    return {"out_features": settings["out_features"], "bias": bias, "activation": ACTIVATIONS[kind]}


def _max_length(transformer: dict[str, Any], tokenizer: dict[str, Any], config: PretrainedConfig) -> int | None:
    length = transformer.get("max_seq_length")
    for field in ("tokenizer_args", "processor_kwargs"):
        length = length or (transformer.get(field) or {}).get("model_max_length")
    if length is not None:
        return int(length)
    limits = [tokenizer.get("model_max_length"), getattr(config, "max_position_embeddings", None)]
    lengths = [int(limit) for limit in limits if limit is not None and 0 < limit < LONGEST_LIMIT]
    return min(lengths, default=None)
