"""The rows of two caches side by side."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm2clip.store import EmbeddingCache, PairedCache
from llm2clip.store.shards import ShardFile
from llm2clip.store.store import caption_keys
from tests.llm2clip.store.encoder import build, embed

TEXTS = [f"caption {number}" for number in range(25)]


def paired(folder: Path, **second: Any) -> PairedCache:
    build(folder / "a", TEXTS)
    second = {"fingerprint": "finger-b", **second}
    build(folder / "b", TEXTS[::-1], lambda texts: embed(texts)[:, :5] * 3, width=5, **second)
    return PairedCache.of_folders([folder / "a", folder / "b"])


def test_the_rows_of_two_caches_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = paired(tmp_path)
    monkeypatch.setattr(ShardFile, "keys", None)  # those of all rows are not read
    asked = TEXTS[7:12]
    expected = torch.cat([F.normalize(embed(asked), dim=-1), F.normalize(embed(asked)[:, :5], dim=-1)], dim=-1)
    torch.testing.assert_close(both.lookup(asked), expected, atol=1e-3, rtol=0)
    assert both.width == 13
    assert pickle.loads(pickle.dumps(both)).lookup(asked).equal(both.lookup(asked))
    assert both.contains([*asked, "no caption"]).tolist() == [*[True] * 5, False]
    with pytest.raises(KeyError, match="1 of 6 keys have no row"):
        both.read(both.find(caption_keys([*asked, "no caption"])))
    with pytest.raises(KeyError, match="lacks 1 of 1 captions"):
        both.rows(["no caption"])


@pytest.mark.parametrize("changed", ["fingerprint", "tokenizer_fingerprint", "prompt_prefix", "order"])
def test_two_caches_are_known_by_both_their_encoders_and_their_order(changed: str, tmp_path: Path) -> None:
    both = paired(tmp_path / "one")
    assert both.manifest.fingerprint == paired(tmp_path / "same").manifest.fingerprint
    if changed == "order":
        others = PairedCache(*both.caches[::-1])
    else:
        others = paired(tmp_path / "other", **{changed: "another"})
    assert others.manifest.fingerprint != both.manifest.fingerprint


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_caches_is_refused(count: int, tmp_path: Path) -> None:
    build(tmp_path, TEXTS)
    with pytest.raises(ValueError, match=f"^{count} embedding caches are given, .*; give two"):
        PairedCache.of_folders([tmp_path] * count)


def test_both_caches_are_checked(tmp_path: Path) -> None:
    both = paired(tmp_path)
    [*_, shard] = sorted((tmp_path / "b").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is truncated"):
        both.require_unchanged()
    assert isinstance(both, EmbeddingCache)
