"""Captions as tokens: checks, instructions, and where pooling starts."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from tokenizers import normalizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Added to the tokens of the second of two text encoders; no vocabulary is as large.
SECOND = 2**24
# Half a character, which no encoding has: of bytes that were not UTF-8, or of a pair that was cut.
SURROGATE = re.compile("[\\ud800-\\udfff]")


def clean_captions(texts: Sequence[Any]) -> list[str]:
    """Strip captions, for tokenizers that do not; TypeError if an item is not a string, ValueError if it is empty."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"item {index} is a {type(text).__module__}.{type(text).__name__} where a caption (str) was expected; "
                "images go to images= or encode_image()."
            )
        if not text.strip():
            raise ValueError(f"caption {index} is empty; remove it or replace it.")
        if not text.isascii() and (half := SURROGATE.search(text)) is not None:
            raise ValueError(f"caption {index}, {text!r:.80}, has half a character (U+{ord(half[0]):04X}).")
    return [text.strip() for text in texts]


def count_cut_captions(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], lengths: Sequence[int], limit: int | None = None
) -> int:
    """Count truncated captions, given the lengths after truncation at `limit` (by default the tokenizer's)."""
    if isinstance(parts := getattr(tokenizer, "parts", None), list):  # of two text encoders
        cut = [[len(ids) > part.model_max_length for ids in _tokens(part, texts)] for part in parts]
        return sum(map(max, zip(*cut, strict=True)))
    limit = limit or tokenizer.model_max_length
    suspects = [text for text, length in zip(texts, lengths, strict=True) if length >= limit]
    if not suspects:
        return 0
    return sum(len(ids) > limit for ids in _tokens(tokenizer, suspects))


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any) -> list[list[int]]:
    return tokenizer(list(texts), truncation=False, verbose=False, **options)["input_ids"]


class CaptionTokens(NamedTuple):
    """Tokenized captions.

    Attributes:
        ids: The tokens of each caption, with the prompt.
        starts: How many tokens of each caption come before the pooled ones; None if it is the model's number for all.
        num_cut: Number of captions that were truncated.
    """

    ids: list[list[int]]
    starts: list[int] | None
    num_cut: int


def tokenize_captions(
    texts: Sequence[str] | str,
    tokenizer: PreTrainedTokenizerBase,
    text_config: Any,
    instruction: str | None = None,
) -> CaptionTokens:
    """Tokenize captions for a model.

    Args:
        tokenizer: The tokenizer that was saved with the model; it adds the prompt.
        text_config: The [`LLM2CLIPTextConfig`] of the model.
        instruction: Text before every caption; see [`tokenize_with_instructions`]. It is pooled if the prompt is.

    Raises:
        TypeError: An item is not a string.
        ValueError: A caption is empty, the tokenizer does not add the model's prompt, or the instruction leaves no
            room for a caption.
    """
    texts = clean_captions([texts] if isinstance(texts, str) else list(texts))
    if not texts:
        return CaptionTokens([], None, 0)
    halves = [half.prompt_token_ids for half in text_config.halves()]
    expected = None if None in halves else [token + SECOND * half for half, ids in enumerate(halves) for token in ids]
    if instruction and len(halves) > 1:
        raise ValueError("two text encoders take no instruction; leave it out.")
    if expected is not None and list(tokenizer("")["input_ids"]) != expected:
        raise ValueError(
            f"the tokenizer ({tokenizer.name_or_path or 'unnamed'}) does not add the prompt that this model was "
            "trained with; load it from the model's own folder with AutoTokenizer or AutoProcessor. An embedding "
            "model of sentence-transformers has no such folder: llm2clip.open_text_tower loads it with its tokenizer."
        )
    tokens = tokenize_with_instructions(texts, tokenizer, text_config.num_prefix_tokens, [instruction] * len(texts))
    if tokens.num_cut:
        # Without the number, so that many calls log it only once.
        logger.warning_once(f"captions longer than {tokenizer.model_max_length} tokens are cut.")
    return tokens._replace(starts=None) if text_config.pool_prompt else tokens


def tokenize_with_instructions(
    captions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    num_prefix_tokens: int,
    instructions: Sequence[str | None],
    max_length: int | None = None,
) -> CaptionTokens:
    """Tokenize captions, each preceded by its instruction, which is context and not pooled.

    An instruction is separated from its caption by a space unless it ends in white space. As in the original code
    (`LLM2Vec.tokenize`), as many tokens are pooled at the end as caption and suffix have on their own. Where a caption
    has another number of tokens after a space, this is one token more or less than the caption's own. Without an
    instruction everything after the prefix is pooled, as the model does with the ids alone.

    Args:
        captions: Captions without outer white space.
        num_prefix_tokens: Number of tokens that the tokenizer adds before a text.
        instructions: One for each caption; None for none.
        max_length: Largest number of tokens; by default the tokenizer's own. The end of a caption is cut.

    Raises:
        ValueError: An instruction leaves no room for its caption.
    """
    limit = max_length or tokenizer.model_max_length
    leads = [f"{text} " if text and not text[-1].isspace() else text or "" for text in instructions]
    if not any(leads):
        ids = tokenizer(list(captions), truncation=True, max_length=limit)["input_ids"]
        return CaptionTokens(ids, None, count_cut_captions(tokenizer, captions, [len(row) for row in ids], limit))
    prompt = list(tokenizer("")["input_ids"])
    before, after = prompt[:num_prefix_tokens], prompt[num_prefix_tokens:]
    room = limit - len(prompt)
    texts = [lead + caption for lead, caption in zip(leads, captions, strict=True)]
    whole = _tokens(tokenizer, texts, add_special_tokens=False)
    own = _tokens(tokenizer_without_lead(tokenizer) or tokenizer, captions, add_special_tokens=False)
    starts = [max(0, len(before) + len(text) - len(caption)) for text, caption in zip(whole, own, strict=True)]
    for lead, start in zip(leads, starts, strict=True):
        if start >= len(before) + room:
            raise ValueError(f"The instruction {lead[:80]!r} leaves no room for its caption within {limit} tokens.")
    ids = [[*before, *content[:room], *after] for content in whole]
    return CaptionTokens(ids, starts, sum(len(content) > room for content in whole))


_WITHOUT_LEAD: WeakKeyDictionary[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None] = WeakKeyDictionary()


def tokenizer_without_lead(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """Copy a caption tokenizer without the white space of its prompt that it puts before a caption.

    Tokenizers with byte-level vocabularies do so where the prompt ends in white space.

    Returns:
        The copy, or None if the tokenizer puts nothing before a caption.
    """
    if tokenizer not in _WITHOUT_LEAD:
        normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
        steps = json.loads(normalizer.__getstate__()).get("normalizers", []) if normalizer is not None else []
        _WITHOUT_LEAD[tokenizer] = None
        if any(step["type"] == "Prepend" and step["prepend"].isspace() for step in steps):
            copied = copy.deepcopy(tokenizer)
            copied.backend_tokenizer.normalizer = without_prepend(normalizer, only_white_space=True)
            _WITHOUT_LEAD[tokenizer] = copied
    return _WITHOUT_LEAD[tokenizer]


def without_prepend(normalizer: Any, only_white_space: bool = False) -> Any:
    """Copy a normalizer without its steps that put something, or only white space, before a text."""
    if normalizer is None:
        return None
    state = json.loads(normalizer.__getstate__())
    steps = state["normalizers"] if state["type"] == "Sequence" else [state]
    kept = [step for step in steps if step["type"] != "Prepend" or (only_white_space and step["prepend"].strip())]
    copied = normalizers.Sequence([])
    copied.__setstate__(json.dumps({"type": "Sequence", "normalizers": kept}).encode())
    return copied


def pooling_mask(attention_mask: Tensor, starts: Sequence[int]) -> Tensor:
    """Mark the pooled tokens of `(batch, tokens)`: the real ones after the first `starts` of each caption."""
    return attention_mask * (attention_mask.cumsum(1) > torch.tensor(starts)[:, None])
