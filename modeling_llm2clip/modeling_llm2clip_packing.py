"""Attention masks of the decoder, and packing: several short captions share a row of a batch.

A packed batch costs about as much as its tokens, not as its padding.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from .compatibility_llm2clip import VERSION

# Attention implementations for sequences without padding, which need the lengths of the captions.
VARIABLE_LENGTHS = ("flash_attention_2", "flash_attention_3")
# Whether decoders respect `is_causal` of their config.
IS_CAUSAL_COUNTS = VERSION >= (5, 2)


def assign_rows(lengths: Sequence[int], capacity: int) -> tuple[list[int], list[int], int]:
    """Assign captions of these `lengths` to rows of `capacity` tokens by best-fit decreasing bin packing.

    Returns:
        The row of each caption, the position of its first token in that row, and the number of rows.
    """
    rows, starts = [0] * len(lengths), [0] * len(lengths)
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    num_rows = 0
    for caption in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
        found = bisect_left(free, (lengths[caption], 0))
        if found < len(free):
            left, row = free.pop(found)
        else:
            left, row = capacity, num_rows
            num_rows += 1
        rows[caption], starts[caption] = row, capacity - left
        if left > lengths[caption]:
            insort(free, (left - lengths[caption], row))
    return rows, starts, num_rows


class PackedBatch:
    """The positions of a padded batch's tokens in rows as long as its longest caption, or in a single row.

    Args:
        attention_mask: `(batch, tokens)`, 1 for real tokens.
        order: `(batch, tokens)`, the 1-based position of each real token in its caption.
        single_row: Whether all captions share one row, in their order.
    """

    def __init__(self, attention_mask: Tensor, order: Tensor, single_row: bool = False) -> None:
        lengths = order[:, -1].tolist()
        self.ends = [0, *accumulate(lengths)]
        if single_row:
            self.width, self.num_rows = max(1, self.ends[-1]), 1
            rows, starts = [0] * len(lengths), self.ends[:-1]
        else:
            self.width = max([1, *lengths])
            rows, starts, self.num_rows = assign_rows(lengths, self.width)
        self.longest = max(lengths, default=0)
        self.shape = attention_mask.shape
        real, places = attention_mask.bool(), order - 1
        self.source = real.flatten().nonzero().squeeze(1)
        first = [row * self.width + start for row, start in zip(rows, starts, strict=True)]
        self.target = (torch.tensor(first, dtype=torch.long, device=order.device)[:, None] + places)[real]
        captions = torch.arange(1, len(lengths) + 1, device=order.device)[:, None].expand_as(order)
        self.position_ids = self._rows(places[real])
        # 0 where a row is not full: such positions attend only to each other.
        self.caption_ids = self._rows(captions[real])

    def _rows(self, values: Tensor) -> Tensor:
        rows = values.new_zeros(self.num_rows * self.width, *values.shape[1:])
        return rows.index_copy(0, self.target, values).unflatten(0, (self.num_rows, self.width))

    def pack(self, values: Tensor) -> Tensor:
        """Rearrange `(batch, tokens, ...)` to `(rows, width, ...)`, zero where a row is not full."""
        return self._rows(values.flatten(0, 1)[self.source])

    def unpack(self, states: Tensor) -> Tensor:
        """Rearrange `(rows, width, ...)` to `(batch, tokens, ...)`, zero at the padding."""
        batch = states.new_zeros(self.shape[0] * self.shape[1], *states.shape[2:])
        target, source = self.target.to(states.device), self.source.to(states.device)
        return batch.index_copy(0, source, states.flatten(0, 1)[target]).unflatten(0, self.shape)

    def visible(self) -> Tensor:
        """Return the boolean mask `(rows, 1, width, width)` of the token pairs in the same caption."""
        return (self.caption_ids[:, :, None] == self.caption_ids[:, None, :])[:, None]

    def block_mask(self) -> Any:
        """Return the same mask for FlexAttention."""
        # Imported here: some torch versions lack it but support the other implementations.
        from torch.nn.attention.flex_attention import create_block_mask

        ids, rows, width = self.caption_ids, self.num_rows, self.width
        return create_block_mask(
            lambda row, head, query, key: ids[row, query] == ids[row, key], rows, None, width, width, device=ids.device
        )

    def sequence_arguments(self) -> dict[str, Any]:
        """Return flash attention's arguments for the caption boundaries in a single row."""
        ends = torch.tensor(self.ends, dtype=torch.int32, device=self.caption_ids.device)
        lengths = {"max_length_q": self.longest, "max_length_k": self.longest}
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, **lengths}


def avoid_sdpa_without_softcap(config: PretrainedConfig) -> None:
    """Select eager attention for Gemma 2: sdpa cannot cap the logits, which older transformers versions ignore."""
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation in (None, "sdpa"):
        config._attn_implementation = "eager"


def takes_additive_mask(decoder: Any) -> bool:
    """Return whether a decoder's attention adds a 4-D mask to its logits, as in every transformers version.

    The flag `is_causal` is less reliable: 4.57 ignores it, and a sliding window would hide part of a long caption.
    """
    return decoder.config._attn_implementation in ("eager", "sdpa")


def additive_mask(decoder: Any, visible: Tensor) -> Tensor:
    """Return 0 where a token is visible, and the smallest number of the decoder's dtype elsewhere."""
    dtype: Any = decoder.get_input_embeddings().weight.dtype
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def padded_mask(decoder: Any, attention_mask: Tensor, bidirectional: bool | None) -> Tensor:
    """Return the decoder's mask for a padded batch; ValueError if attention is causal in this transformers version."""
    if not bidirectional:
        return attention_mask
    if takes_additive_mask(decoder):
        row = additive_mask(decoder, attention_mask[:, None, None, :] != 0)
        return row.expand(-1, 1, attention_mask.shape[1], -1)
    if not IS_CAUSAL_COUNTS:
        raise ValueError(
            f"attn_implementation {decoder.config._attn_implementation!r} is causal in this transformers version; "
            "use 'sdpa' or 'eager', or transformers >= 5.2."
        )
    return attention_mask


def packed_mask(decoder: Any, packed: PackedBatch) -> dict[str, Any]:
    """Return the decoder's arguments that separate the captions of a row."""
    if takes_additive_mask(decoder):
        return {"attention_mask": additive_mask(decoder, packed.visible())}
    if decoder.config._attn_implementation == "flex_attention":
        return {"attention_mask": packed.block_mask()}
    return {"attention_mask": None, **packed.sequence_arguments()}
