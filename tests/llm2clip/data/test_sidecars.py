"""Sidecars beside their shards: what they contain, and which do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.encoders.embed_shards import ShardCounts
from llm2clip.store import MissingCaptionError, StoreDamagedError, StoreManifest, StoreMismatchError
from llm2clip.store.store import lies_beside_shards
from llm2clip.utils.files import sha256
from tests.damage import flip
from tests.llm2clip.encoders.shards import Counting, description, embed, write_shards
from tests.llm2clip.store import encoder


def test_a_sidecar_has_the_distinct_captions_of_its_shard(tmp_path: Path) -> None:
    source, calls = write_shards(tmp_path / "data"), Counting()
    assert embed(source, None, calls) == ShardCounts(4, 0, 12, 4, 0, [])
    dogs = [f"{a}dog {n}" for n in range(4) for a in ("", "a long ")]
    assert sorted(calls.texts) == sorted(4 * ["everywhere"] + dogs)
    sidecars = SourceSidecars(tmp_path / "data", ShardedSource(source).shards)
    checked = sidecars.check(["caption", "other"])
    assert (checked.manifest.identity, checked.row_counts) == (description().identity, [3, 3, 3, 3])
    for number in range(4):
        texts = ["everywhere", f"dog {number}", f"a long dog {number}"]
        torch.testing.assert_close(sidecars.open(number).lookup(texts), encoder.embed(texts), atol=2e-3, rtol=2e-3)
        with pytest.raises(MissingCaptionError, match=rf"'dog {number + 1}'"):
            sidecars.open(number).lookup([f"dog {number + 1}"])
    path, rows = tmp_path / "data" / "2.parquet", tmp_path / "data" / "2.emb.safetensors"
    manifest = StoreManifest.read(tmp_path / "data" / "2.emb.manifest")
    assert (manifest.rows, manifest.counts) == (3, {"truncated": 1, "reused": 0})
    assert (manifest.bytes, manifest.checksum) == (rows.stat().st_size, sha256(rows))
    file = manifest.source
    assert file is not None
    assert (file.rows, file.bytes, file.checksum) == (3, path.stat().st_size, f"sha256:{sha256(path)}")
    assert lies_beside_shards(tmp_path)


def test_sidecars_of_another_encoder_are_refused(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "data", 2), tmp_path / "out"
    embed(source, out, part=(0, 2))
    with pytest.raises(StoreMismatchError, match="'finger-a', but this run has fingerprint 'finger-b'"):
        embed(source, out, made_by=description(fingerprint="finger-b"))
    with pytest.raises(MissingCaptionError, match=r"1\.parquet has none"):
        SourceSidecars(out, ShardedSource(source).shards).check(["caption"])
    embed(source, tmp_path / "b", made_by=description(fingerprint="finger-b"), part=(1, 2))
    for path in (tmp_path / "b").iterdir():
        shutil.copy(path, out)
    with pytest.raises(StoreMismatchError, match=r"has fingerprint 'finger-b', but the sidecar of 0\.parquet has"):
        SourceSidecars(out, ShardedSource(source).shards).check(["caption"])


def test_damage_is_found(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "data", 1), tmp_path / "out"
    embed(source, out)
    path, described = out / "0.emb.safetensors", out / "0.emb.manifest"
    sidecars = SourceSidecars(out, ShardedSource(source).shards)
    with flip(path, -1), pytest.raises(StoreDamagedError, match=r"0\.emb\.safetensors has changed since .* delete it"):
        sidecars.open(0)
    sidecars.open(0)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(StoreDamagedError, match="is truncated"):
        SourceSidecars(out, sidecars.shards).open(0)
    described.write_text(described.read_text().replace('"tiny"', '"another"'))
    with pytest.raises(StoreDamagedError, match=r"0\.emb\.manifest has changed since it was written"):
        sidecars.check(["caption"])
