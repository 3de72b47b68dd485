"""Captions as tokens: checks, instructions, and where pooling starts."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from tokenizers import normalizers
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Arguments of a tokenizer that would change the tokens, or that its own truncation and padding have to follow.
UNSUPPORTED_OPTIONS = (
    *("text_pair", "text_target", "stride", "is_split_into_words"),
    *("return_overflowing_tokens", "return_offsets_mapping", "return_length"),
)
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


def tokenize_and_cut(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int | None = None,
    truncation: bool = True,
    **options: Any,
) -> tuple[dict[str, list[list[int]]], list[bool]]:
    """Tokenize texts, and cut each that is too long at its own end, as truncation does; the prompt stays whole.

    A fast tokenizer keeps the truncation and padding of a call until the next one, which may be that of another
    thread. Here it has neither, so that threads can share it.

    Args:
        max_length: Largest number of tokens, with the prompt; by default the tokenizer's own.
        truncation: False cuts nothing.
        options: Other arguments of the tokenizer, without those of padding.

    Returns:
        What the tokenizer returns, each a list of rows of any length, and whether each text was cut.

    Raises:
        ValueError: `max_length` leaves no room for a text.
    """
    limit = (max_length or tokenizer.model_max_length) if truncation else math.inf
    wants_mask = options.pop("return_special_tokens_mask", False)
    encoded = dict(tokenizer(list(texts), return_special_tokens_mask=True, **{**options, "verbose": False}))
    masks = encoded["special_tokens_mask"] if wants_mask else encoded.pop("special_tokens_mask")
    is_cut = [len(mask) > limit for mask in masks]
    for row in [row for row, cut in enumerate(is_cut) if cut]:
        own = [place for place, is_prompt in enumerate(masks[row]) if not is_prompt]
        excess = len(masks[row]) - int(limit)
        if excess >= len(own):
            used = len(masks[row]) - len(own)
            raise ValueError(f"max_length {limit} leaves no room for a caption beside the prompt's {used} tokens.")
        start = own[0] if tokenizer.truncation_side == "left" else own[-1] + 1 - excess
        for values in encoded.values():
            values[row] = values[row][:start] + values[row][start + excess :]
    return encoded, is_cut


class CuttingTokenizer:
    """A tokenizer as a processor calls it, which truncates and pads without a change to the tokenizer in it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(
        self,
        text: str | list[str],
        *,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        return_tensors: Any = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        **options: Any,
    ) -> BatchEncoding:
        tokenizer = self._tokenizer
        if refused := [name for name in UNSUPPORTED_OPTIONS if options.get(name)]:
            raise ValueError(f"a processor of captions does not take {', '.join(refused)}.")
        texts = [text] if isinstance(text, str) else list(text)
        truncates = truncation not in (False, None, "do_not_truncate")
        encoded, is_cut = tokenize_and_cut(tokenizer, texts, max_length, truncates, **options)
        if any(is_cut):
            limit = max_length or tokenizer.model_max_length
            logger.warning(f"{sum(is_cut)} of {len(texts)} captions were cut at {limit} tokens.")
        if padding not in (False, None, "do_not_pad"):
            encoded = tokenizer.pad(
                encoded,
                padding=padding,
                max_length=max_length if padding == "max_length" else None,
                pad_to_multiple_of=pad_to_multiple_of,
                padding_side=padding_side,
                return_attention_mask=options.get("return_attention_mask"),
            )
        features: dict[str, Any] = dict(encoded)
        if isinstance(text, str) and return_tensors is None:
            features = {name: values[0] for name, values in features.items()}
        return BatchEncoding(features, tensor_type=return_tensors)


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
    expected = text_config.prompt_token_ids
    if expected is not None and list(tokenizer("")["input_ids"]) != list(expected):
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
        encoded, is_cut = tokenize_and_cut(tokenizer, captions, max_length)
        return CaptionTokens(encoded["input_ids"], None, sum(is_cut))
    prompt = list(tokenizer("")["input_ids"])
    before, after = prompt[:num_prefix_tokens], prompt[num_prefix_tokens:]
    room = limit - len(prompt)
    texts = [lead + caption for lead, caption in zip(leads, captions, strict=True)]
    whole, alone = (
        tokenize_and_cut(reader, read, truncation=False, add_special_tokens=False)[0]["input_ids"]
        for reader, read in ((tokenizer, texts), (tokenizer_without_lead(tokenizer) or tokenizer, captions))
    )
    starts = [max(0, len(before) + len(text) - len(caption)) for text, caption in zip(whole, alone, strict=True)]
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
        copied = None
        if any(step["type"] == "Prepend" and step["prepend"].isspace() for step in steps):
            copied = copy.deepcopy(tokenizer)
            copied.backend_tokenizer.normalizer = without_prepend(normalizer, only_white_space=True)
        # Whole, since other threads find it as soon as it is there.
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
