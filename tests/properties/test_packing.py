"""Batches and packed rows hold every caption once, and keep their limits."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_llm2clip.modeling_llm2clip_decoder import PackedBatch, assign_rows
from modeling_llm2clip.modeling_llm2clip_utils import token_batches
from tests.properties.inputs import quick

LENGTHS = st.lists(st.integers(0, 70), max_size=60)


@quick(200)
@given(LENGTHS, st.integers(1, 300), st.none() | st.integers(1, 8))
def test_batches_hold_every_caption_once_within_their_limits(
    lengths: list[int], max_tokens: int, max_captions: int | None
) -> None:
    batches = token_batches(lengths, max_tokens, max_captions)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert len(batch) == 1 or padded <= max_tokens
        assert max_captions is None or len(batch) <= max_captions
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths, reverse=True)


@quick(200)
@given(LENGTHS.flatmap(lambda lengths: st.tuples(st.just(lengths), st.integers(max([1, *lengths]), 200))))
def test_rows_hold_every_token_once(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    rows, starts, count = assign_rows(lengths, capacity)
    tokens = [
        (row, start + token)
        for row, start, length in zip(rows, starts, lengths, strict=True)
        for token in range(length)
    ]
    assert len(set(tokens)) == len(tokens) == sum(lengths)
    assert all(0 <= row < count and token < capacity for row, token in tokens)
    assert set(range(count)) <= set(rows)
    filled = [sum(length for length, own in zip(lengths, rows, strict=True) if own == row) for row in range(count)]
    assert sum(2 * tokens <= capacity for tokens in filled) <= 1, "two half-empty rows could be one"


@quick(60)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.booleans(), st.booleans())
def test_what_is_packed_comes_back(lengths: list[int], left: bool, single_row: bool) -> None:
    width = max(lengths)
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    mask = (real.flip(1) if left else real).long()
    packed = PackedBatch(mask, mask.cumsum(1), single_row)
    values = torch.arange(1, mask.numel() + 1).view(*mask.shape, 1).float()
    rows = packed.pack(values)
    assert rows.shape[1] == (sum(lengths) if single_row else width)
    torch.testing.assert_close(packed.unpack(rows), values * mask[..., None], atol=0, rtol=0)
    # A token sees those of its own caption, and no others.
    caption = packed.pack(torch.arange(1, len(lengths) + 1)[:, None].expand_as(mask)[..., None])[..., 0]
    assert packed.visible()[:, 0].equal(caption[:, :, None] == caption[:, None, :])
    assert packed.position_ids[caption > 0].sum() == sum(length * (length - 1) // 2 for length in lengths)
