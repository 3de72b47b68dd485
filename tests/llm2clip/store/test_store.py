from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2clip.data import CaptionSource, distinct_captions
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
from llm2clip.utils import shared_files
from llm2clip.utils.files import sha256
from llm2clip.utils.manifests import MANIFEST_CHECKSUM, with_checksum
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
    cache = EmbeddingCache.open(tmp_path, fingerprint="finger-a")
    assert len(cache) == len(texts) == cache.manifest.rows
    assert cache.width == WIDTH
    asked = random.Random(0).choices(texts, k=500)
    found = cache.lookup(asked)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, embed(asked), atol=tolerance, rtol=tolerance)
    stored = embed(asked).to(getattr(torch, dtype)).float()
    assert torch.equal(found, stored)
    assert cache.lookup([]).shape == (0, WIDTH)
    exact = [texts[3], texts[3].upper() + "!", texts[3] + " ", "other"]
    assert cache.contains(exact).tolist() == [True, False, False, False]


def test_error_about_missing_captions_quotes_some(cache_folder: Path) -> None:
    cache = EmbeddingCache.open(cache_folder)
    absent = [f"absent {number} " + "x" * 200 for number in range(50)]
    with pytest.raises(
        MissingCaptionError, match=r"lacks 50 of 51 captions, such as 'absent 0 x+', 'absent 1"
    ) as caught:
        cache.lookup([TEXTS[0], *absent])
    assert isinstance(caught.value, KeyError)
    assert "llm2clip embed" in str(caught.value)
    assert len(str(caught.value)) < 700
    assert not str(caught.value).startswith('"')


@pytest.mark.parametrize("shard_size", [10, 100], ids=["several shards", "one shard"])
def test_rows_of_absent_keys_are_not_read(tmp_path: Path, shard_size: int) -> None:
    build(tmp_path, TEXTS, shard_size=shard_size)
    store = Store.open(tmp_path)
    rows = store.find(caption_keys([TEXTS[3], "absent", TEXTS[20], "absent too"]))
    with pytest.raises(KeyError, match="2 of 4 keys have no row in the store"):
        store.read(rows)
    assert store.read(rows[::2]).shape == (2, WIDTH)
    assert store.read(rows[:0]).shape == (0, WIDTH)


def _cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-10])


def _not_finite(shard: Path) -> None:
    tensors = load_file(shard)
    tensors["rows"][6, 2] = float("nan")
    save_file(tensors, shard)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"shard-00001\.safetensors is missing"),
        (_cut, r"shard-00001\.safetensors is truncated: \d+ bytes instead of \d+"),
        (_not_finite, r"shard-00001\.safetensors has changed since it was written: its checksum"),
    ],
)
def test_damaged_shard_is_named_and_can_be_computed_again(
    cache_folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    shard = cache_folder / "shard-00001.safetensors"
    whole = shard.read_bytes()
    damage(shard)
    with pytest.raises(StoreDamagedError, match=message):
        EmbeddingCache.open(cache_folder)
    shard.unlink(missing_ok=True)
    build(cache_folder, TEXTS)
    assert shard.read_bytes() == whole
    EmbeddingCache.open(cache_folder)


@pytest.mark.parametrize("place", [100, 400, -1])
def test_a_flipped_bit_is_found_and_mended_by_embedding_again(
    cache_folder: Path, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    shard = cache_folder / "shard-00001.safetensors"
    whole = shard.read_bytes()
    with flip(shard, place):
        with pytest.raises(StoreDamagedError, match=r"shard-00001\.safetensors"):
            EmbeddingCache.open(cache_folder)
        build(cache_folder, TEXTS)
        assert shard.read_bytes() == whole
        EmbeddingCache.open(cache_folder)
    assert sorted(path.name for path in cache_folder.glob("[!.]*")) == [
        *("index.manifest", "index.safetensors"),
        *(f"shard-0000{number}.{ending}" for number in range(4) for ending in ("manifest", "safetensors")),
    ]


def test_a_changed_manifest_is_an_error(cache_folder: Path) -> None:
    path = cache_folder / "index.manifest"
    path.write_text(path.read_text().replace('"truncated": 0', '"truncated": 1'))
    with pytest.raises(StoreDamagedError, match=r"has changed since it was written; delete index\.manifest"):
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
    read: list[str] = []

    def counting(path: Path) -> str:
        read.append(path.name)
        return sha256(path)

    monkeypatch.setattr("llm2clip.utils.shared_files.sha256", counting)
    EmbeddingCache.open(cache_folder)
    assert sorted(read) == [f"shard-0000{number}.safetensors" for number in range(4)]  # the build has read the index
    EmbeddingCache.open(cache_folder)
    shared_files._checksums.cache_clear()  # as in another process
    EmbeddingCache.open(cache_folder)
    assert len(read) == 4
    shard = cache_folder / "shard-00002.safetensors"
    before = shard.stat()
    with flip(shard, -1):
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(StoreDamagedError, match=r"00002\.safetensors has changed"):
            EmbeddingCache.open(cache_folder)


def _edit(folder: Path, **fields: object) -> None:
    """Change fields of the manifest, and its checksum with them."""
    manifest = {**json.loads((folder / "index.manifest").read_text()), **fields}
    del manifest[MANIFEST_CHECKSUM]
    (folder / "index.manifest").write_text(json.dumps(with_checksum(manifest)))


def test_invalid_manifests_are_refused(cache_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        StoreMismatchError, match=r"made by tiny-encoder with fingerprint finger-a, .* fingerprint other"
    ):
        EmbeddingCache.open(cache_folder, fingerprint="other")
    with pytest.raises(FileNotFoundError, match="not an embedding cache"):
        EmbeddingCache.open(tmp_path / "nothing")
    _edit(cache_folder, format_version=2)
    with pytest.raises(StoreError, match=r"version 2, but this version of llm2clip reads .* version 1"):
        EmbeddingCache.open(cache_folder)
    _edit(cache_folder, format_version=1, kind="features")
    with pytest.raises(StoreMismatchError, match="is of another kind: image feature cache, not embedding cache"):
        EmbeddingCache.open(cache_folder)
    _edit(cache_folder, format="something else")
    with pytest.raises(StoreError, match="has format 'something else'"):
        EmbeddingCache.open(cache_folder)
    (cache_folder / "index.manifest").write_text("{")
    with pytest.raises(StoreDamagedError, match="not valid JSON"):
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
    import psutil

    rows, width = 2000, 4096
    build(
        tmp_path,
        [str(number) for number in range(rows)],
        lambda texts: torch.ones(len(texts), width),
        width=width,
        shard_size=500,
        embed_size=500,
    )
    process = psutil.Process()
    before = process.memory_info().rss, process.num_fds()
    cache = EmbeddingCache.open(tmp_path, verify=False)
    assert process.memory_info().rss - before[0] < rows * width  # half of what the embeddings take
    assert process.num_fds() == before[1]
    assert torch.equal(cache.lookup(["1999", "0"]), torch.ones(2, width))


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
