"""Batches for stage 1: tokenized text pairs with the mask of the pooled tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from llm2clip.data.rows import clean_caption
from modeling_llm2clip.tokenization_llm2clip import pooling_mask, tokenize_with_instructions


class PairCollator:
    """Tokenizes text pairs for stage 1.

    A row is a dict from any map-style or iterable data set, [`PairDataset`] being one: `anchor` and `positive`, texts
    that describe the same thing; optionally `negative`, a hard negative, which all rows of a batch have or none has;
    and optionally `instruction` for the anchor, `positive_instruction` for positive and negative, `source`, a label,
    and `key`, a name for messages. Two rows of a batch must not have interchangeable texts, since each is trained as a
    negative of the other: [`PairBatchSampler`] sees to it for a `PairDataset`.

    The batch is `{"anchor": {...}, "positive": {...}, "negative": {...}}` (without `negative` if the rows have none),
    each `{"input_ids", "attention_mask", "pooling_mask"}`, (n, L) int64, padded on the left, along with `source` (the
    first row's, if any), `keys` (if any) and `num_truncated`, the number of texts that were truncated.

    The tokenizer's post-processor adds the prompt: BOS and prefix before the text, the suffix after it. The pooling
    mask covers caption and suffix. An instruction precedes the caption, separated by a space unless it ends in white
    space, and is context, which is not pooled (see [`tokenize_with_instructions`]). Texts that are too long are
    truncated at their end, before the suffix.

    Args:
        processor: The caption tokenizer (a fast one with a padding token), or a processor that contains it.
        num_prefix_tokens: Number of tokens that the tokenizer adds before a text, as in the text config.
        max_length: Maximum number of tokens including prompt and instruction; by default the tokenizer's own.
        pool_prompt: Whether prompt and instruction are pooled too, as in the text config.

    Raises:
        ValueError: If the tokenizer is not a fast one, cannot pad, or `max_length` leaves no room for a caption.
    """

    def __init__(
        self,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        num_prefix_tokens: int,
        max_length: int | None = None,
        pool_prompt: bool = False,
    ) -> None:
        tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; only those have character offsets.")
        if tokenizer.pad_token is None:
            raise ValueError(f"{type(tokenizer).__name__} has no padding token; set tokenizer.pad_token first.")
        max_length = tokenizer.model_max_length if max_length is None else max_length
        added = tokenizer.num_special_tokens_to_add()
        if max_length <= added:
            raise ValueError(
                f"max_length {max_length} leaves no room for a caption beside the prompt's {added} tokens."
            )
        self.tokenizer, self.num_prefix_tokens, self.max_length = tokenizer, num_prefix_tokens, max_length
        self.pool_prompt = pool_prompt

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate pairs.

        Raises:
            ValueError: If a text is missing, only some pairs have a negative, or an instruction leaves no room for
                its caption.
        """
        sides = {"anchor": "instruction", "positive": "positive_instruction", "negative": "positive_instruction"}
        without = sum(pair.get("negative") is None for pair in pairs)
        if without == len(pairs):
            del sides["negative"]
        elif without:
            raise ValueError(
                f"{without} of {len(pairs)} pairs of a batch have no negative; all or none must have one."
            )
        batch: dict[str, Any] = {}
        num_truncated = 0
        for side, instruction in sides.items():
            captions = [_text(pair, side, number) for number, pair in enumerate(pairs)]
            batch[side], truncated = self.tokenize(captions, [pair.get(instruction) for pair in pairs])
            num_truncated += truncated
        if "source" in pairs[0]:
            batch["source"] = pairs[0]["source"]
        if "key" in pairs[0]:
            batch["keys"] = [str(pair["key"]) for pair in pairs]
        return {**batch, "num_truncated": num_truncated}

    def tokenize(
        self, captions: Sequence[str], instructions: Sequence[str | None]
    ) -> tuple[dict[str, torch.Tensor], int]:
        """Tokenize captions preceded by their instructions.

        Returns:
            `input_ids`, `attention_mask` and `pooling_mask`, and the number of truncated texts.
        """
        tokens = tokenize_with_instructions(
            captions, self.tokenizer, self.num_prefix_tokens, instructions, self.max_length
        )
        starts = tokens.starts or [self.num_prefix_tokens] * len(captions)
        if self.pool_prompt:
            starts = [0] * len(captions)
        tensors = dict(self.tokenizer.pad({"input_ids": tokens.ids}, padding_side="left", return_tensors="pt"))
        return {**tensors, "pooling_mask": pooling_mask(tensors["attention_mask"], starts)}, tokens.num_cut


def _text(pair: Mapping[str, Any], side: str, number: int) -> str:
    try:
        text = clean_caption(pair.get(side))
    except TypeError as error:
        raise ValueError(f"The {side} of row {number} of a batch cannot be used: {error}.") from None
    if text is None:
        raise ValueError(f"Row {number} of a batch has no text in {side!r}; it has {', '.join(pair)}.")
    return text
