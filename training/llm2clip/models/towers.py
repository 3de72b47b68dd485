"""Load text towers with their tokenizers from a text tower, an LLM2CLIP model or a plain text model.

Plain text models are LLMs, encoders, and embedding models of sentence-transformers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llm2clip.files.manifests import refuse_changed_model
from llm2clip.models.attention_probe import probe_text_tower
from llm2clip.models.embedding_models import embedding_fields, read_embedding_model, with_lower_case
from llm2clip.models.new_model import refuse_unknown
from llm2clip.models.plain_models import encoder_fields, load_plain, wrap_plain
from llm2clip.models.prompting import with_prompt
from llm2clip.models.repos import LLM, OUR_MODELS, Repo, RepoKind, inspect_repo, refuse_revision
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPTextConfig, LLM2CLIPTextModel
from modeling_llm2clip.compatibility_llm2clip import make_readable_by_version_4

logger = logging.getLogger(__name__)


def loading_options(dtype: str, attn_implementation: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Build keyword arguments for `from_pretrained` from the settings of a run; unset values are omitted.

    Args:
        dtype: `float32`, `bfloat16` or `float16`; `auto` keeps the dtype of the checkpoint.
        attn_implementation: Such as `sdpa`.
        revision: Branch, tag or commit on the Hub.
    """
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "revision": revision}
    return {key: value for key, value in options.items() if value is not None}


def open_text_tower(
    name: str,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
    decoder: PreTrainedModel | None = None,
    **prompt: Any,
) -> tuple[LLM2CLIPTextModel, PreTrainedTokenizerBase]:
    """Load a text tower and its caption tokenizer, which adds the prompt. Adapters are merged.

    Args:
        name: Hub id or folder of a text tower, an LLM2CLIP model, or a plain text model, which is wrapped as a tower;
            of a CLIP model, the text half.
        dtype, attn_implementation, revision: See [`loading_options`].
        decoder: The plain LLM, if it is already loaded.
        prompt: Fields of [`LLM2CLIPTextConfig`] for a plain text model, such as `prompt_prefix`; None means unset.
            They take precedence over the files of an embedding model of sentence-transformers, whose default prompt,
            pooling and length count otherwise (E5, for one, has no default prompt and needs `"query: "`). Without
            prefix and suffix the prompt of an LLM is that which the original gives by `name` (see
            [`original_prompt`]).

    Raises:
        ValueError: `prompt` is not that of a text tower, whose config defines it; or the model cannot be a text tower
            (see [`probe_text_tower`]); the files of an embedding model describe something that a text tower cannot do;
            or a file of a local folder is not the one that was written.
    """
    refuse_changed_model(name)
    options = loading_options(dtype, attn_implementation, revision)
    prompt = {key: value for key, value in prompt.items() if value is not None}
    repo = inspect_repo(name, revision)
    if repo.kind is RepoKind.ADAPTER:
        raise ValueError(
            f"{name} is a PEFT adapter without the config of a text tower; merge it into its LLM: "
            f"llm2clip convert LLM OUTPUT --adapters {name}"
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
    if repo.kind in OUR_MODELS:
        config = LLM2CLIPTextConfig.from_pretrained(name, revision=revision or "main")
        if other := [key for key, value in prompt.items() if value != getattr(config, key, None)]:
            raise ValueError(f"{name} is a text tower, whose config defines the prompt; remove {', '.join(other)}.")
        is_adapter = _has_adapter(repo)
        # Rounded before the merge as in the training, and after it: so the merged weights are the same in every dtype.
        model = LLM2CLIPTextModel.from_pretrained(name, **{**options, **({"dtype": "auto"} if is_adapter else {})})
        if dtype == "float32":
            model.float()
        model.merge_adapter()
        if dtype != "auto":
            model.to(getattr(torch, dtype))
    else:
        refuse_unknown(LLM2CLIPTextConfig, prompt)
        config = AutoConfig.from_pretrained(name, revision=revision)
        tokenizer, fields = _plain(name, revision, config, tokenizer, prompt)
        decoder, dense = (decoder, None) if decoder is not None else load_plain(name, options)
        model = wrap_plain(LLM2CLIPTextConfig(decoder_config=decoder.config, **fields), decoder, dense)
    probe_text_tower(model)
    return model, tokenizer


def _has_adapter(repo: Repo) -> bool:
    """Tell whether the LLM of a text tower or joint model is stored as an adapter."""
    llm = repo.config.get(LLM)
    return repo.is_adapter or (
        llm is not None and inspect_repo(llm, repo.config.get("text_model_revision")).is_adapter
    )


def save_text_tower(
    model: LLM2CLIPTextModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Save a text tower, by default with its own weights, and its tokenizer in the layout of a Hub repository."""
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    make_readable_by_version_4(folder)


def describe_text_tower(
    name: str, revision: str | None = None, **prompt: Any
) -> tuple[LLM2CLIPTextConfig, PreTrainedTokenizerBase]:
    """Return the config and the tokenizer of [`open_text_tower`] without loading the weights.

    `prompt` is for a plain LLM; a text tower keeps its own.
    """
    refuse_revision(name, revision)
    tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
    config = AutoConfig.from_pretrained(name, revision=revision)
    if config.model_type in (LLM2CLIPConfig.model_type, LLM2CLIPTextConfig.model_type):
        return getattr(config, "text_config", config), tokenizer
    tokenizer, fields = _plain(name, revision, config, tokenizer, prompt)
    return LLM2CLIPTextConfig(decoder_config=getattr(config, "text_config", config), **fields), tokenizer


def _plain(
    name: str, revision: str | None, config: Any, tokenizer: PreTrainedTokenizerBase, given: dict[str, Any]
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Return the caption tokenizer of a plain text model, and the fields of its text config, `given` first."""
    described = read_embedding_model(name, config, revision=revision)
    if described is None:
        return prompted(tokenizer, _with_original_prompt({**encoder_fields(config), **given}, config, name))
    if described.lower_case:
        tokenizer = with_lower_case(tokenizer)
    return prompted(tokenizer, embedding_fields(name, described, given))


def _with_original_prompt(prompt: dict[str, Any], config: Any, name: str) -> dict[str, Any]:
    """Add the chat header that the original code gives a plain LLM by its name, unless a prompt is set."""
    prefix, suffix = original_prompt(config.model_type, name)
    if "prompt_prefix" in prompt or "prompt_suffix" in prompt or not (prefix or suffix):
        return prompt
    logger.info("Prompt of %s, by its name as in the original code: %r caption %r.", name, prefix, suffix)
    return {**prompt, "prompt_prefix": prefix, "prompt_suffix": suffix}


def prompted(
    tokenizer: PreTrainedTokenizerBase, prompt: dict[str, Any]
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Add a prompt to the tokenizer of a plain text model; also return the fields of its text config."""
    defaults = LLM2CLIPTextConfig()
    prefix, suffix, length = (
        prompt.get(key, getattr(defaults, key)) for key in ("prompt_prefix", "prompt_suffix", "max_text_length")
    )
    caption_tokenizer, prefix_tokens = with_prompt(tokenizer, prefix, suffix, length)
    ids = list(caption_tokenizer("")["input_ids"])
    return caption_tokenizer, {**prompt, "num_prefix_tokens": prefix_tokens, "prompt_token_ids": ids}


def original_prompt(model_type: str, name_or_path: str, pooling: str = "mean") -> tuple[str, str]:
    """Return the prompt around a caption in the original code, which depends on the name of the LLM.

    Args:
        model_type: `model_type` in the config of the LLM.
        name_or_path: `_name_or_path` in the config of the LLM.
        pooling: With `eos_token` the original appends an end-of-sequence token.

    Returns:
        `(prompt_prefix, prompt_suffix)` for [`LLM2CLIPTextConfig`].
    """
    prefix = suffix = ""
    if model_type == "llama" and "Llama-3" in name_or_path and "Instruct" in name_or_path:
        return "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
    if name_or_path in ("mistralai/Mistral-7B-Instruct-v0.2", "meta-llama/Llama-2-7b-chat-hf"):
        prefix, suffix = "[INST] ", " [/INST]"
    elif name_or_path == "google/gemma-2-9b-it":
        prefix, suffix = "<bos><start_of_turn>user\n", "<end_of_turn>"
    elif name_or_path in ("Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2-7B-Instruct"):
        prefix, suffix = "<|im_start|>user\n", "<|im_end|>"
    elif name_or_path == "microsoft/Phi-3.5-mini-instruct":
        prefix, suffix = "<|user|>\n", "<|end|>\n"
    if pooling == "eos_token":
        ends = {"gemma": "<eos>", "qwen2": "<|endoftext|>", "phi3": "<|endoftext|>"}
        end = "<|end_of_text|>" if name_or_path == "meta-llama/Meta-Llama-3-8B" else ends.get(model_type, " </s>")
        suffix = suffix.rstrip() + end
    return prefix, suffix
