"""Opening a text tower with its tokenizer, whatever the repo holds: a tower, an LLM2CLIP model, or a plain LLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llm2clip.utils.repos import OURS, inspect_repo
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPTextConfig, LLM2CLIPTextModel, with_prompt
from modeling_llm2clip.compatibility_llm2clip import make_readable_by_version_4


def loading_options(dtype: str, attn_implementation: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the settings of a run; what is unset is left out.

    Args:
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for that of the weights.
        attn_implementation: Such as `sdpa`.
        revision: Branch, tag or commit.

    Raises:
        ValueError: There is no dtype of that name.
    """
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if torch_dtype != "auto" and not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is unknown; choose float32, bfloat16, float16 or auto.")
    options = {"dtype": torch_dtype, "attn_implementation": attn_implementation, "revision": revision}
    return {key: value for key, value in options.items() if value is not None}


def is_text_tower(name: str, revision: str | None = None) -> bool:
    """Whether a repository specifies how its LLM encodes captions: a text tower, or an LLM2CLIP model."""
    return inspect_repo(name, revision).kind in OURS


def open_text_tower(
    name: str,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
    decoder: PreTrainedModel | None = None,
    **prompt: Any,
) -> tuple[LLM2CLIPTextModel, PreTrainedTokenizerBase]:
    """Load a text tower and the caption tokenizer that holds its prompt. An adapter is merged.

    Args:
        name: Hub id or folder of a text tower, of an LLM2CLIP model, or of a plain LLM, which becomes a tower.
        dtype: See [`loading_options`].
        attn_implementation: Such as `sdpa`.
        revision: Branch, tag or commit.
        decoder: The plain LLM, where it is loaded already.
        prompt: For a plain LLM, fields of [`LLM2CLIPTextConfig`] such as `prompt_prefix`; None means unset.

    Raises:
        ValueError: `prompt` would change what a text tower says itself.
    """
    options = loading_options(dtype, attn_implementation, revision)
    tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
    prompt = {key: value for key, value in prompt.items() if value is not None}
    if is_text_tower(name, revision):
        if prompt:
            raise ValueError(
                f"{name} is a text tower and says itself how captions are encoded; leave out {', '.join(prompt)}."
            )
        model = LLM2CLIPTextModel.from_pretrained(name, **options)
        model.merge_adapter()
        return model, tokenizer
    tokenizer, fields = prompted(tokenizer, prompt)
    source: Any = name if decoder is None else decoder
    return LLM2CLIPTextModel.from_decoder(source, decoder_kwargs=options, **fields), tokenizer


def save_text_tower(model: LLM2CLIPTextModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save a text tower with its tokenizer, as a Hub repo holds them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_readable_by_version_4(folder)


def describe_text_tower(name: str, revision: str | None = None) -> tuple[LLM2CLIPTextConfig, PreTrainedTokenizerBase]:
    """The config and the tokenizer that [`open_text_tower`] would give, without loading the LLM."""
    tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
    config = AutoConfig.from_pretrained(name, revision=revision)
    if config.model_type == LLM2CLIPConfig.model_type:
        return config.text_config, tokenizer
    if config.model_type == LLM2CLIPTextConfig.model_type:
        return config, tokenizer
    tokenizer, fields = prompted(tokenizer, {})
    return LLM2CLIPTextConfig(decoder_config=config, **fields), tokenizer


def prompted(
    tokenizer: PreTrainedTokenizerBase, prompt: dict[str, Any]
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """A plain LLM's tokenizer with a prompt, and the fields of [`LLM2CLIPTextConfig`] that go with it."""
    defaults = LLM2CLIPTextConfig()
    prefix, suffix, length = (
        prompt.get(key, getattr(defaults, key)) for key in ("prompt_prefix", "prompt_suffix", "max_text_length")
    )
    caption_tokenizer, prefix_tokens = with_prompt(tokenizer, prefix, suffix, length)
    ids = list(caption_tokenizer("")["input_ids"])
    return caption_tokenizer, {**prompt, "num_prefix_tokens": prefix_tokens, "prompt_token_ids": ids}
