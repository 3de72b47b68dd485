"""The processor of LLM2CLIP, and the caption tokenizer with the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, normalizers, processors
from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .compatibility_llm2clip import VERSION, make_readable_by_version_4
from .image_decoding_llm2clip import decode_images, is_missing_file

logger = logging.get_logger(__name__)

PROMPT_PREFIX_PIECE = "<llm2clip_prefix>"
PROMPT_SUFFIX_PIECE = "<llm2clip_suffix>"
# What str.strip() removes; the regex class does not include U+001C to U+001F.
WHITE_SPACE = r"[\s\x1c-\x1f\x85]"
OUTER_WHITE_SPACE = rf"\A{WHITE_SPACE}+|{WHITE_SPACE}+\z"


def with_prompt(
    tokenizer: PreTrainedTokenizerBase, prefix: str = "", suffix: str = "", max_length: int = 512
) -> tuple[PreTrainedTokenizerFast, int]:
    """Build a caption tokenizer, which adds the prompt to every text and truncates only the caption.

    The prompt becomes part of the tokenizer's post-processor (native tokens such as BOS, prefix, caption, suffix), so
    that the tokenizer alone, a pipeline and the processor produce the same ids. Special tokens are recognised in
    `prefix` and `suffix`, but not in captions. Padding is on the left, with EOS if there is no padding token.

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
    before, after = _tokens_around(tokenizer, prefix, suffix)
    used = len(before) + len(after)
    if used >= max_length:
        raise ValueError(f"the prompt takes {used} tokens; max_length {max_length} leaves none for captions.")
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
    backend = prompted.backend_tokenizer
    if not any(token.content.isspace() for token in tokenizer.added_tokens_decoder.values()):
        # First, because SentencePiece-style normalizers put "\u2581" (a visible blank) before the text.
        steps = [normalizers.Replace(Regex(OUTER_WHITE_SPACE), ""), backend.normalizer]
        backend.normalizer = normalizers.Sequence([step for step in steps if step is not None])
    backend.post_processor = _template(tokenizer, before, after)
    return prompted, len(before)


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


class LLM2CLIPProcessor(ProcessorMixin):
    """Image processor and caption tokenizer.

    By default captions are padded to the longest and truncated at the tokenizer's maximum length; the number of
    truncated captions is logged.
    """

    if VERSION < (5, 0):  # version 5 reads the signature and warns about these
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save the processor, readable by transformers 4.57 too."""
        if push_to_hub:
            raise ValueError("save_pretrained(push_to_hub=True) would upload other files; call push_to_hub(repo_id).")
        saved = super().save_pretrained(save_directory, **kwargs)
        make_readable_by_version_4(save_directory)
        return saved

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare images, captions or both.

        Args:
            images: One image or a list, of any kind that [`decode_image`] reads (PIL images, paths, URLs, bytes);
                arrays and tensors go to the image processor as they are.
            text: A caption, or a list of captions.
            kwargs: `return_tensors`, and options of the tokenizer and the image processor.

        Raises:
            DamagedImageError: An image cannot be decoded.
            TypeError, ValueError: A caption is not a string, or is empty.
        """
        if isinstance(images, str) and is_missing_file(images):
            raise TypeError(f"{images[:80]!r} is not an image file; captions go to text=.")
        images = decode_images(images)
        if text is None:
            return super().__call__(images=images, **kwargs)
        is_list = isinstance(text, (list, tuple))
        texts = clean_captions(text if is_list else [text])
        if not texts:
            raise ValueError("the list of captions is empty.")
        options = {"padding": True, "truncation": True, **kwargs.get("text_kwargs", kwargs)}
        kwargs = {**kwargs, "text_kwargs": options} if "text_kwargs" in kwargs else options
        features = super().__call__(images=images, text=texts if is_list else texts[0], **kwargs)
        rows = features["input_ids"]
        lengths = [len(rows)] if isinstance(rows[0], int) else [len(row) for row in rows]
        limit = options.get("max_length") or self.tokenizer.model_max_length
        if count := count_cut_captions(self.tokenizer, texts, lengths, limit):
            logger.warning(f"{count} of {len(texts)} captions were cut at {limit} tokens.")
        return features
