"""Captions as tokens: the tokenizer with the prompt, instructions, and where pooling starts."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

logger = logging.get_logger(__name__)

PROMPT_PREFIX_PIECE = "<llm2clip_prefix>"
PROMPT_SUFFIX_PIECE = "<llm2clip_suffix>"
# What str.strip() removes; the regex class does not include U+001C to U+001F.
WHITE_SPACE = r"[\s\x1c-\x1f\x85]"
OUTER_WHITE_SPACE = rf"\A{WHITE_SPACE}+|{WHITE_SPACE}+\z"
# Half a character, which no encoding has: of bytes that were not UTF-8, or of a pair that was cut.
SURROGATE = re.compile("[\\ud800-\\udfff]")
# Captions that show how a tokenizer joins a prompt with what follows: letters, a digit, inner white space.
PROBES = ("a", "B\nb", "1  b", "\u00e9 c")


def with_prompt(
    tokenizer: PreTrainedTokenizerBase, prefix: str = "", suffix: str = "", max_length: int = 512
) -> tuple[PreTrainedTokenizerFast, int]:
    """Build a caption tokenizer, which adds the prompt to every text and truncates only the caption.

    The prompt becomes part of the tokenizer's post-processor (native tokens such as BOS, prefix, caption, suffix), so
    that the tokenizer alone, a pipeline and the processor produce the same ids: those of prefix, caption and suffix as
    one text, which the original code tokenizes. White space at the end of the prefix, which byte-level tokenizers
    attach to the next word, becomes part of the caption for that. Where no such rule reproduces the ids of the whole
    text, a warning says that prompt and caption are tokenized separately. A caption that begins or ends with
    punctuation can still merge with punctuation of the prompt in the whole text; here it does not.

    Special tokens are recognised in `prefix` and `suffix`, but not in captions. Padding is on the left, with EOS if
    there is no padding token.

    White space around a caption is removed by a normalizer, as `str.strip` does. Tokenizers with tokens of their own
    for white space (Gemma) split texts at them before any normalizer runs; for these the processor and `encode_text`
    strip captions, a bare tokenizer does not.

    Args:
        tokenizer: A fast tokenizer; it is not modified.
        prefix: Text before the caption, after BOS; it is not pooled.
        suffix: Text after the caption; it is pooled.
        max_length: Longest input in tokens, prompt included.

    Returns:
        The caption tokenizer, and the number of tokens before the caption (`num_prefix_tokens` of the text config).

    Raises:
        ValueError: The tokenizer is not a fast one, has neither padding nor EOS token, or the prompt alone fills
            `max_length`.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; load one with AutoTokenizer.")
    pad_token = tokenizer.pad_token or tokenizer.eos_token
    if pad_token is None:
        raise ValueError(f"{type(tokenizer).__name__} has neither a padding token nor EOS; set tokenizer.pad_token.")
    # The generic class, because classes of some architectures rebuild the post-processor when they are loaded.
    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    prompted = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        **{name: token for name, token in special_tokens.items() if token is not None},
        pad_token=pad_token,
        padding_side="left",
        truncation_side="right",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
    before, after = _fit(prompted.backend_tokenizer, tokenizer, prefix, suffix)
    used = len(before) + len(after)
    if used >= max_length:
        raise ValueError(f"the prompt takes {used} tokens; max_length {max_length} leaves none for captions.")
    prompted.backend_tokenizer.post_processor = _template(tokenizer, before, after)
    return prompted, len(before)


def _fit(
    backend: Tokenizer, tokenizer: PreTrainedTokenizerBase, prefix: str, suffix: str
) -> tuple[list[int], list[int]]:
    """Set the normalizer and pre-tokenizer of `backend` so that a caption has the tokens of its place in the prompt.

    Returns:
        The tokens before and after a caption, those that the tokenizer itself adds (such as BOS) included.
    """
    backend.no_truncation()
    backend.no_padding()
    joined = [list(tokenizer(f"{prefix}{probe}{suffix}")["input_ids"]) for probe in PROBES]
    before = [ids[0] for ids in itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*joined))]  # noqa: B905
    variants = list(_variants(backend, prefix, strips=not _has_white_space_tokens(tokenizer)))
    for backend.normalizer, backend.pre_tokenizer in variants:
        contents = [_encode(backend, probe) for probe in PROBES]
        after = joined[0][len(before) + len(contents[0]) :]
        if all(ids == [*before, *content, *after] for ids, content in zip(joined, contents, strict=True)):
            return before, after
    logger.warning(
        f"the prompt {prefix!r}, {suffix!r} and the captions are tokenized separately: this tokenizer merges them, so "
        "that their tokens differ from those of the whole text."
    )
    backend.normalizer, backend.pre_tokenizer = variants[0]
    return _tokens_around(tokenizer, prefix, suffix)


def _encode(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def _has_white_space_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    return any(token.content.isspace() for token in tokenizer.added_tokens_decoder.values())


def _variants(backend: Tokenizer, prefix: str, strips: bool) -> Iterator[tuple[Any, Any]]:
    """Yield the ways to tokenize a caption: alone, after a space, or without the space that the tokenizer inserts."""

    def chain(*steps: Any) -> Any:
        # Stripping comes first, because SentencePiece-style normalizers put "\u2581" (a visible blank) before a text.
        strip = [normalizers.Replace(Regex(OUTER_WHITE_SPACE), "")] if strips else []
        present = [*strip, *(step for step in steps if step is not None)]
        return normalizers.Sequence(present) if present else None

    normalizer, pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    yield chain(normalizer), pre_tokenizer
    if prefix[-1:].isspace():
        yield chain(normalizers.Prepend(prefix[-1]), normalizer), pre_tokenizer
    yield chain(_without_prepend(normalizer)), _without_prefix_space(pre_tokenizer)
    if prefix and not prefix[-1].isalnum() and not prefix[-1].isspace():
        # Byte-level tokenizers attach one punctuation mark to the word after it, as in "Query:dog".
        yield chain(normalizers.Prepend(prefix[-1]), normalizer), pre_tokenizer


def _without_prepend(normalizer: Any, only_white_space: bool = False) -> Any:
    """Copy a normalizer without its steps that put something, or only white space, before a text."""
    if normalizer is None:
        return None
    state = json.loads(normalizer.__getstate__())
    steps = state["normalizers"] if state["type"] == "Sequence" else [state]
    kept = [step for step in steps if step["type"] != "Prepend" or (only_white_space and step["prepend"].strip())]
    copied = normalizers.Sequence([])
    copied.__setstate__(json.dumps({"type": "Sequence", "normalizers": kept}).encode())
    return copied


def _without_prefix_space(pre_tokenizer: Any) -> Any:
    """Copy a pre-tokenizer that does not put a space before a text."""
    if pre_tokenizer is None:
        return None
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    state = json.loads(
        pre_tokenizer.__getstate__(), object_hook=lambda step: step | {key: off[key] for key in off.keys() & step}
    )
    copied = pre_tokenizers.Sequence([])
    copied.__setstate__(json.dumps(state).encode())
    return copied


def _tokens_around(tokenizer: PreTrainedTokenizerBase, prefix: str, suffix: str) -> tuple[list[int], list[int]]:
    """Return the tokens before and after a caption: the prompt and what the tokenizer itself adds, such as BOS."""
    content = tokenizer("a", add_special_tokens=False)["input_ids"]
    native = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(native)) if native[i : i + len(content)] == content)
    before = native[:start] + tokenizer(prefix, add_special_tokens=False)["input_ids"]
    return before, tokenizer(suffix, add_special_tokens=False)["input_ids"] + native[start + len(content) :]


def _template(tokenizer: PreTrainedTokenizerBase, before: list[int], after: list[int]) -> processors.PostProcessor:
    sides = ((PROMPT_PREFIX_PIECE, before), (PROMPT_SUFFIX_PIECE, after))
    pieces = [{"id": id, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)} for id, ids in sides if ids]
    template = f"{PROMPT_PREFIX_PIECE if before else ''} $A {PROMPT_SUFFIX_PIECE if after else ''}".strip()
    return processors.TemplateProcessing(single=template, special_tokens=pieces)


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
    limit = limit or tokenizer.model_max_length
    suspects = [text for text, length in zip(texts, lengths, strict=True) if length >= limit]
    if not suspects:
        return 0
    return sum(len(ids) > limit for ids in tokenizer(suspects, truncation=False, verbose=False)["input_ids"])


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
    whole = _contents(tokenizer, texts)
    own = _contents(tokenizer_without_lead(tokenizer) or tokenizer, captions)
    starts = [max(0, len(before) + len(text) - len(caption)) for text, caption in zip(whole, own, strict=True)]
    for lead, start in zip(leads, starts, strict=True):
        if start >= len(before) + room:
            raise ValueError(f"The instruction {lead[:80]!r} leaves no room for its caption within {limit} tokens.")
    ids = [[*before, *content[:room], *after] for content in whole]
    return CaptionTokens(ids, starts, sum(len(content) > room for content in whole))


def _contents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


_WITHOUT_LEAD: WeakKeyDictionary[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None] = WeakKeyDictionary()


def tokenizer_without_lead(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """Copy a caption tokenizer without the white space of its prompt that it puts before a caption.

    [`with_prompt`] makes such tokenizers for byte-level vocabularies and prompts that end in white space.

    Returns:
        The copy, or None if the tokenizer puts nothing before a caption.
    """
    if tokenizer not in _WITHOUT_LEAD:
        normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
        steps = json.loads(normalizer.__getstate__()).get("normalizers", []) if normalizer is not None else []
        _WITHOUT_LEAD[tokenizer] = None
        if any(step["type"] == "Prepend" and step["prepend"].isspace() for step in steps):
            copied = copy.deepcopy(tokenizer)
            copied.backend_tokenizer.normalizer = _without_prepend(normalizer, only_white_space=True)
            _WITHOUT_LEAD[tokenizer] = copied
    return _WITHOUT_LEAD[tokenizer]


def pooling_mask(attention_mask: Tensor, starts: Sequence[int]) -> Tensor:
    """Mark the pooled tokens of `(batch, tokens)`: the real ones after the first `starts` of each caption."""
    return attention_mask * (attention_mask.cumsum(1) > torch.tensor(starts)[:, None])
