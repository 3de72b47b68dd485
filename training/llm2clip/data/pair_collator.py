"""Batches for stage 1: pairs become token ids, with a mask of the tokens that are pooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin


class PairCollator:
    """Tokenises the pairs of `PairDataset`.

    The batch is `{"anchor": {...}, "positive": {...}, "negative": {...}}` (no `negative` where the pairs have none),
    each `{"input_ids", "attention_mask", "pooling_mask"}`, (n, L) int64, left padded; and `source`, the pairs' label,
    and `num_truncated`, the number of texts that were cut.

    The prompt is the tokenizer's: its post-processor puts BOS and prefix before a text and the suffix after it. The
    pooling mask covers caption and suffix. An instruction is put before the caption (after a space, unless it ends
    in white space) and belongs to the context: a token is left out of pooling if it ends within the instruction. A
    text that is too long is cut at its end, before the suffix.

    Args:
        processor: The caption tokenizer (a fast one, with a padding token), or the processor that holds it.
        num_prefix_tokens: Tokens that the tokenizer puts before a text, as in the text config.
        max_length: Longest input in tokens, prompt and instruction included; by default the tokenizer's own.

    Raises:
        ValueError: If the tokenizer is not a fast one, cannot pad, or `max_length` leaves no room for a caption.
    """

    def __init__(
        self,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        num_prefix_tokens: int,
        max_length: int | None = None,
    ) -> None:
        tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer, which alone knows character spans.")
        if tokenizer.pad_token is None:
            raise ValueError(f"{type(tokenizer).__name__} has no padding token; set tokenizer.pad_token first.")
        max_length = tokenizer.model_max_length if max_length is None else max_length
        if max_length <= tokenizer.num_special_tokens_to_add():
            raise ValueError(
                f"max_length {max_length} leaves no room for a caption beside the prompt's "
                f"{tokenizer.num_special_tokens_to_add()} tokens."
            )
        self.tokenizer = tokenizer
        self.num_prefix_tokens = num_prefix_tokens
        self.max_length = max_length

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate pairs.

        Raises:
            ValueError: If only some of them have a negative, or an instruction leaves no room for its caption.
        """
        places = {"anchor": "instruction", "positive": "positive_instruction", "negative": "positive_instruction"}
        without = sum(pair["negative"] is None for pair in pairs)
        if without:
            if without < len(pairs):
                raise ValueError(f"{without} of {len(pairs)} pairs of a batch have no negative; all or none must.")
            del places["negative"]
        batch: dict[str, Any] = {}
        num_truncated = 0
        for place, instruction in places.items():
            batch[place], truncated = self.tokenize(
                [pair[place] for pair in pairs], [pair[instruction] for pair in pairs]
            )
            num_truncated += truncated
        return {**batch, "source": pairs[0]["source"], "num_truncated": num_truncated}

    def tokenize(
        self, captions: Sequence[str], instructions: Sequence[str | None]
    ) -> tuple[dict[str, torch.Tensor], int]:
        """Tokenise captions after their instructions.

        Args:
            captions: n captions.
            instructions: The instruction of each, or None.

        Returns:
            `input_ids`, `attention_mask` and `pooling_mask`, and how many texts were cut.
        """
        leads = [_lead(instruction) for instruction in instructions]
        encoding = self.tokenizer(
            text=[lead + caption for lead, caption in zip(leads, captions, strict=True)],
            padding=True,
            padding_side="left",
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=True,
        )
        attention = np.asarray(encoding["attention_mask"], dtype=np.int64)
        pooled = attention * (attention.cumsum(axis=1) > self.num_prefix_tokens)
        for row, (lead, tokens) in enumerate(zip(leads, encoding.encodings, strict=True)):
            if not lead:
                continue
            is_text = np.asarray(tokens.special_tokens_mask) == 0
            in_lead = is_text & (np.asarray(tokens.offsets)[:, 1] <= len(lead))
            if not (is_text & ~in_lead).any():
                raise ValueError(
                    f"The instruction {lead[:80]!r} leaves no room for its caption within {self.max_length} tokens."
                )
            pooled[row, in_lead] = 0
        tensors = {
            "input_ids": torch.tensor(encoding["input_ids"], dtype=torch.int64),
            "attention_mask": torch.from_numpy(attention),
            "pooling_mask": torch.from_numpy(pooled),
        }
        return tensors, sum(bool(tokens.overflowing) for tokens in encoding.encodings)


def _lead(instruction: str | None) -> str:
    if not instruction:
        return ""
    return instruction if instruction[-1].isspace() else f"{instruction} "
