from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2clip.data import CaptionSource, distinct_captions
from llm2clip.files import shared_files
from llm2clip.files.manifests import MANIFEST_CHECKSUM, with_checksum
from llm2clip.store import (
    EmbeddingCache,
    MissingCaptionError,
    Store,
    StoreDamagedError,
    StoreError,
    StoreIncompleteError,
    StoreMismatchError,
)
from llm2clip.store.store import EXPONENTS, INTEGERS, KeyIndex, caption_keys
from tests.damage import flip
from tests.llm2clip.data.conftest import CONCEPTS

from .encoder import WIDTH, build, embed

TEXTS = [f"caption number {number}" for number in range(37)]


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    build(tmp_path / "cache", TEXTS)
    return tmp_path / "cache"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2), ("float32", 0)])
def test_lookup_returns_each_captions_own_embedding(tmp_path: Path, dtype: str, tolerance: float) -> None:
    texts = distinct_captions(CaptionSource(CONCEPTS, split="test", caption_columns=["caption", "keywords"]))
    build(tmp_path, texts, dtype=dtype, shard_size=100, embed_size=64)
    cache = EmbeddingCache.open(tmp_path)
    assert len(cache) == len(texts) == cache.manifest.rows
    asked = random.Random(0).choices(texts, k=500)
    found = cache.lookup(asked)
    torch.testing.assert_close(found, embed(asked), atol=tolerance, rtol=tolerance)
    assert torch.equal(found, embed(asked).to(getattr(torch, dtype)).float())
    assert cache.lookup([]).shape == (0, WIDTH)
    exact = [texts[3], texts[3].upper() + "!", texts[3] + " ", "other"]
    assert cache.contains(exact).tolist() == [True, False, False, False]


def test_error_about_missing_captions_quotes_some(cache_folder: Path) -> None:
    absent = [f"absent {number} " + "x" * 200 for number in range(50)]
    with pytest.raises(MissingCaptionError, match=r"lacks 50 of 51 captions, such as 'absent 0 x+'.*llm2clip embed"):
        EmbeddingCache.open(cache_folder).lookup([TEXTS[0], *absent])


@pytest.mark.parametrize("shard_size", [10, 100], ids=["several shards", "one shard"])
def test_rows_of_absent_keys_are_not_read(tmp_path: Path, shard_size: int) -> None:
    build(tmp_path, TEXTS, shard_size=shard_size)
    store = Store.open(tmp_path)
    rows = store.find(caption_keys([TEXTS[3], "absent", TEXTS[20], "absent too"]))
    with pytest.raises(KeyError, match="2 of 4 keys have no row"):
        store.read(rows)
    assert store.read(rows[::2]).shape == (2, WIDTH)


def _not_finite(shard: Path) -> None:
    tensors = load_file(shard)
    tensors["rows"][6, 2] = float("nan")
    save_file(tensors, shard)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_shard_is_named_and_mended_by_embedding_again(cache_folder: Path, damage: str) -> None:
    shard, names = cache_folder / "shard-00001.safetensors", sorted(path.name for path in cache_folder.glob("[!.]*"))
    whole = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(whole[:-10] if damage == "truncated" else bytes([*whole[:-1], whole[-1] ^ 1]))
    with pytest.raises(
        StoreDamagedError, match=rf"shard-00001\.safetensors .*{damage.replace('flipped', 'checksum')}"
    ):
        EmbeddingCache.open(cache_folder)
    build(cache_folder, TEXTS)
    assert shard.read_bytes() == whole
    EmbeddingCache.open(cache_folder)
    assert sorted(path.name for path in cache_folder.glob("[!.]*")) == names


def test_a_changed_manifest_is_an_error(cache_folder: Path) -> None:
    path = cache_folder / "index.manifest"
    path.write_text(path.read_text().replace('"truncated": 0', '"truncated": 1'))
    with pytest.raises(StoreDamagedError, match=r"delete index\.manifest"):
        EmbeddingCache.open(cache_folder)
    path.unlink()
    build(cache_folder, TEXTS)
    EmbeddingCache.open(cache_folder)


def test_lookup_checks_rows_of_an_unverified_cache(cache_folder: Path) -> None:
    _not_finite(cache_folder / "shard-00001.safetensors")
    cache = EmbeddingCache.open(cache_folder, verify=False)
    cache.lookup(TEXTS[:16])
    with pytest.raises(StoreDamagedError, match=r"Row 6 of the shard .*00001"):
        cache.lookup([TEXTS[0], TEXTS[16]])


def test_ranks_share_the_check_of_shards(cache_folder: Path) -> None:
    _not_finite(cache_folder / "shard-00001.safetensors")
    cache = EmbeddingCache.open(cache_folder, verify=False)
    cache.require_unchanged(rank=0, world_size=2)
    with pytest.raises(StoreDamagedError, match=r"shard-00001\.safetensors has changed"):
        cache.require_unchanged(rank=1, world_size=2)


def test_a_shard_is_read_for_its_checksum_once_until_it_changes(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    EmbeddingCache.open(cache_folder)
    shared_files._checksums.cache_clear()  # as in another process
    with monkeypatch.context() as patch:
        patch.setattr("llm2clip.files.shared_files.sha256", None)
        EmbeddingCache.open(cache_folder)
    shard = cache_folder / "shard-00002.safetensors"
    before = shard.stat()
    with flip(shard, -1):
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(StoreDamagedError, match=r"00002\.safetensors has changed"):
            EmbeddingCache.open(cache_folder)


def _edit(folder: Path, **fields: Any) -> None:
    """Change fields of the manifest, and its checksum with them."""
    manifest = {**json.loads((folder / "index.manifest").read_text()), **fields}
    del manifest[MANIFEST_CHECKSUM]
    (folder / "index.manifest").write_text(json.dumps(with_checksum(manifest)))


def test_caches_of_others_are_refused(cache_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not an embedding cache"):
        EmbeddingCache.open(tmp_path / "nothing")
    for fields, error, message in (
        ({"format_version": 2}, StoreError, r"version 2, .* reads .* version 1"),
        ({"format_version": 1, "kind": "features"}, StoreMismatchError, "image feature cache, not embedding cache"),
        ({"format": "something else"}, StoreError, "has format 'something else'"),
    ):
        _edit(cache_folder, **fields)
        with pytest.raises(error, match=message):
            EmbeddingCache.open(cache_folder)
    (cache_folder / "index.manifest").unlink()
    with pytest.raises(StoreIncompleteError, match="its build was interrupted"):
        EmbeddingCache.open(cache_folder)


def test_pickled_cache_maps_the_files_again(cache_folder: Path) -> None:
    cache = EmbeddingCache.open(cache_folder)
    sent = pickle.dumps(cache)
    assert len(sent) < 3000
    assert torch.equal(pickle.loads(sent).lookup(TEXTS), cache.lookup(TEXTS))


def test_opening_a_cache_does_not_read_its_shards(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    rows, width = 2000, 4096
    texts = [str(number) for number in range(rows)]
    options = {"width": width, "shard_size": 500, "embed_size": 500}
    build(tmp_path, texts, lambda texts: torch.ones(len(texts), width), **options)
    before = psutil.Process().memory_info().rss
    cache = EmbeddingCache.open(tmp_path, verify=False)
    assert psutil.Process().memory_info().rss - before < rows * width  # half of what the embeddings take
    assert torch.equal(cache.lookup(["1999", "0"]), torch.ones(2, width))


def test_keys_with_equal_first_halves_are_told_apart() -> None:
    keys = np.array([[7, 2], [5, 1], [7, 1], [7, -3]])
    index = KeyIndex.of(keys)
    assert index.find(keys).tolist() == [0, 1, 2, 3]
    assert index.find(np.array([[7, 9], [6, 1], [8, 1]])).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rows_that_are_not_finite_are_found_by_their_bits(dtype: torch.dtype) -> None:
    integer, mask = INTEGERS[dtype.itemsize], EXPONENTS[str(dtype).removeprefix("torch.")]
    limits, inf = torch.finfo(dtype), torch.inf
    values = [0.0, -0.0, limits.max, limits.min, limits.tiny, -limits.smallest_normal / 2, inf, -inf, torch.nan]
    bits = torch.tensor(values, dtype=dtype).view(integer).numpy()
    assert ((bits & mask) == mask).tolist() == [False] * 6 + [True] * 3
