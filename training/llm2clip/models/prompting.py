"""Build a caption tokenizer, which has the prompt of a text tower; a saved one has it already."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_llm2clip.tokenization_llm2clip import without_prepend

logger = logging.getLogger(__name__)

PROMPT_PREFIX_PIECE = "<llm2clip_prefix>"
PROMPT_SUFFIX_PIECE = "<llm2clip_suffix>"
# What str.strip() removes; the regex class does not include U+001C to U+001F.
WHITE_SPACE = r"[\s\x1c-\x1f\x85]"
OUTER_WHITE_SPACE = rf"\A{WHITE_SPACE}+|{WHITE_SPACE}+\z"
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
    for white space (Gemma) split texts at them before any normalizer runs, and without a prompt those with a Metaspace
    of `prepend_scheme="first"` look at the caption as it came; for these the processor and `encode_text` strip
    captions, a bare tokenizer does not.

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
    splits_at_white_space = any(token.content.isspace() for token in tokenizer.added_tokens_decoder.values())
    variants = list(_variants(backend, prefix, strips=not splits_at_white_space))
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
    yield chain(without_prepend(normalizer)), _without_prefix_space(pre_tokenizer)
    if prefix and not prefix[-1].isalnum() and not prefix[-1].isspace():
        # Byte-level tokenizers attach one punctuation mark to the word after it, as in "Query:dog".
        yield chain(normalizers.Prepend(prefix[-1]), normalizer), pre_tokenizer


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
