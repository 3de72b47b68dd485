"""Finding the rows of keys, many and one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm2clip.store.captions import caption_key, caption_keys
from llm2clip.store.key_index import KeyIndex
from llm2clip.store.store import EXPONENTS, INTEGERS


def test_one_key_is_found_where_many_are() -> None:
    texts = [f"caption {number}" for number in range(200)]
    index = KeyIndex.of(caption_keys(texts[:150]))
    rows = index.find(caption_keys(texts))
    assert rows.tolist() == [*range(150), *[-1] * 50]
    assert [index.find_one(*caption_key(text)) for text in texts] == rows.tolist()


def test_keys_with_equal_first_halves_are_told_apart() -> None:
    keys = np.array([[7, 2], [5, 1], [7, 1], [7, -3]])
    index = KeyIndex.of(keys)
    assert [index.find_one(*key) for key in keys.tolist()] == [0, 1, 2, 3]
    assert index.find(keys).tolist() == [0, 1, 2, 3]
    assert [index.find_one(7, 9), index.find_one(6, 1), index.find_one(8, 1)] == [-1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rows_that_are_not_finite_are_found_by_their_bits(dtype: torch.dtype) -> None:
    integer, mask = INTEGERS[dtype.itemsize], EXPONENTS[str(dtype).removeprefix("torch.")]
    limits = torch.finfo(dtype)
    finite = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, -limits.smallest_normal / 2], dtype=dtype)
    assert not ((finite.view(integer).numpy() & mask) == mask).any()
    others = torch.tensor([float("inf"), -float("inf"), float("nan"), -float("nan")], dtype=dtype)
    assert ((others.view(integer).numpy() & mask) == mask).all()
