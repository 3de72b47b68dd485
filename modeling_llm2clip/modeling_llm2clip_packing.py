"""Several short captions in one row, so that a batch costs about as much as its tokens and not as its padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def assign_rows(lengths: Sequence[int], capacity: int) -> tuple[list[int], list[int], int]:
    """Best-fit decreasing bin packing.

    Args:
        lengths: Tokens of each caption.
        capacity: Tokens of a row; no caption has more.

    Returns:
        The row of each caption, the place of its first token there, and the number of rows.
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
    """Where each token of a padded batch goes in rows as long as its longest caption, or in a single row.

    Args:
        attention_mask: `(batch, tokens)`, 1 for real tokens.
        order: `(batch, tokens)`, the 1-based place of each real token in its caption.
        single_row: Whether all captions stand in one row, in their order.
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
        first = [row * self.width + start for row, start in zip(rows, starts, strict=True)]
        real = attention_mask.bool()
        self.source = real.flatten().nonzero().squeeze(1)
        places = order - 1
        self.target = (torch.tensor(first, dtype=torch.long, device=order.device)[:, None] + places)[real]
        captions = torch.arange(1, len(lengths) + 1, device=order.device)[:, None].expand_as(order)
        self.position_ids = self._rows(places[real])
        # 0 where a row is not full: such places see each other only.
        self.caption_ids = self._rows(captions[real])

    def _rows(self, values: Tensor) -> Tensor:
        rows = values.new_zeros(self.num_rows * self.width, *values.shape[1:])
        return rows.index_copy(0, self.target, values).unflatten(0, (self.num_rows, self.width))

    def pack(self, values: Tensor) -> Tensor:
        """`(batch, tokens, ...)` as `(rows, width, ...)`, zero where a row is not full."""
        return self._rows(values.flatten(0, 1)[self.source])

    def unpack(self, states: Tensor) -> Tensor:
        """`(rows, width, ...)` as `(batch, tokens, ...)`, zero at the padding."""
        batch = states.new_zeros(self.shape[0] * self.shape[1], *states.shape[2:])
        target, source = self.target.to(states.device), self.source.to(states.device)
        return batch.index_copy(0, source, states.flatten(0, 1)[target]).unflatten(0, self.shape)

    def visible(self) -> Tensor:
        """`(rows, 1, width, width)`, whether a token sees another: those of its own caption."""
        return (self.caption_ids[:, :, None] == self.caption_ids[:, None, :])[:, None]

    def block_mask(self) -> Any:
        """The same as FlexAttention takes it."""
        # Not every torch that runs the other implementations has it.
        from torch.nn.attention.flex_attention import create_block_mask

        ids = self.caption_ids

        def same_caption(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return ids[row, query] == ids[row, key]

        return create_block_mask(same_caption, self.num_rows, None, self.width, self.width, device=ids.device)

    def sequence_arguments(self) -> dict[str, Any]:
        """Where the captions of a single row end, as flash attention takes it for sequences without padding."""
        ends = torch.tensor(self.ends, dtype=torch.int32, device=self.caption_ids.device)
        lengths = {"max_length_q": self.longest, "max_length_k": self.longest}
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, **lengths}


__all__ = ["PackedBatch", "assign_rows"]
