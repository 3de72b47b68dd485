"""A caption has one key at every door, and no other caption has it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm2clip.data import CaptionSource
from llm2clip.data.captioned_images import caption_id, caption_ids, clean_caption
from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.store import EmbeddingCache
from llm2clip.store.manifest import MissingCaptionError
from llm2clip.store.store import KeyIndex, caption_key, caption_keys
from tests.llm2clip.encoders import shards
from tests.llm2clip.store import encoder
from tests.properties.inputs import CAPTIONS, TEXTS, quick

# First halves that collide, which those of real keys never do.
COLLIDING = st.lists(st.tuples(st.integers(-2, 2), st.integers(-5, 5)), max_size=30)
CLOSE = {"atol": 2e-3, "rtol": 2e-3}


@quick(200)
@given(st.lists(TEXTS, max_size=8))
def test_keys_are_equal_exactly_where_texts_are(texts: list[str]) -> None:
    keys = caption_keys(texts)
    assert (keys.shape, keys.dtype) == ((len(texts), 2), np.int64)
    assert keys.tolist() == [list(caption_key(text)) for text in texts]
    assert caption_ids(texts).tolist() == [caption_id(text) for text in texts]
    for one, first in zip(texts, keys.tolist(), strict=True):
        for other, second in zip(texts, keys.tolist(), strict=True):
            assert (one == other) == (first == second)


@quick(200)
@given(COLLIDING, COLLIDING)
def test_keys_are_found_where_first_halves_collide(
    stored: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    rows = {key: row for row, key in enumerate(dict.fromkeys(stored))}
    index = KeyIndex.of(np.array(list(rows), dtype=np.int64).reshape(-1, 2))
    wanted = [rows.get(key, -1) for key in asked]
    assert index.find(np.array(asked, dtype=np.int64).reshape(-1, 2)).tolist() == wanted
    assert [index.find_one(*key) for key in asked] == wanted


@quick(12)
@given(st.lists(CAPTIONS, min_size=1, max_size=6), CAPTIONS)
def test_caches_and_sidecars_find_the_same_captions(texts: list[str], other: str) -> None:
    clean = list(dict.fromkeys(filter(None, map(clean_caption, texts))))
    rows = encoder.embed(clean)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        encoder.build(folder / "captions", clean)
        datasets.Dataset.from_dict({"caption": texts}).to_parquet(folder / "beside/0.parquet")
        source = CaptionSource(str(folder / "beside/*.parquet"), streaming=True)
        shards.embed(source, None)
        cache, store = EmbeddingCache.open(folder / "captions"), EmbeddingCache.open(folder / "beside")
        beside = SourceSidecars(folder / "beside", ShardedSource(source).shards).open(0)
        found = store.find(caption_keys(clean))
        assert (found >= 0).all()
        for stored in (cache.lookup(clean), beside.lookup(clean), store.read(found).float()):
            torch.testing.assert_close(stored, rows, **CLOSE)
        for place, text in enumerate(clean):
            torch.testing.assert_close(cache.lookup([text]), rows[place : place + 1], **CLOSE)
        is_known = clean_caption(other) in clean
        assert bool(cache.contains([other.strip()])[0]) == is_known
        assert bool(store.find(caption_keys([other.strip()]))[0] >= 0) == is_known
        if not is_known:
            for opened in (cache, beside):
                with pytest.raises(MissingCaptionError):
                    opened.lookup([other.strip()])
