"""Sidecars beside their shards: what they contain, and which do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.encoders.embed_shards import ShardCounts
from llm2clip.store import MissingCaptionError, StoreDamagedError, StoreError, StoreManifest, StoreMismatchError
from llm2clip.store.store import lies_beside_shards, stored_manifest
from llm2clip.utils.files import sha256
from tests.damage import flip
from tests.llm2clip.encoders.shards import Counting, description, embed, write_shards
from tests.llm2clip.store import encoder


def test_a_sidecar_has_the_distinct_captions_of_its_shard(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "data")
    calls = Counting()
    assert embed(source, None, calls) == ShardCounts(4, 0, 12, 4, 0, [])
    assert sorted(calls.texts) == sorted(
        4 * ["everywhere"] + [f"{a}dog {n}" for n in range(4) for a in ("", "a long ")]
    )
    sidecars = SourceSidecars(tmp_path / "data", ShardedSource(source).shards)
    checked = sidecars.check(["caption", "other"])
    assert (checked.manifest.identity, checked.row_counts) == (description().identity, [3, 3, 3, 3])
    for number in range(4):
        opened = sidecars.open(number)
        for text in ("everywhere", f"dog {number}", f"a long dog {number}"):
            torch.testing.assert_close(opened.lookup([text]), encoder.embed([text]), atol=2e-3, rtol=2e-3)
        with pytest.raises(MissingCaptionError, match=rf"lacks 1 of 1 captions, such as 'dog {number + 1}'"):
            opened.lookup([f"dog {number + 1}"])
    path = tmp_path / "data" / "2.parquet"
    manifest = StoreManifest.read(tmp_path / "data" / "2.emb.manifest")
    rows = tmp_path / "data" / "2.emb.safetensors"
    assert (manifest.rows, manifest.counts) == (3, {"truncated": 1, "reused": 0})
    assert (manifest.bytes, manifest.checksum) == (rows.stat().st_size, sha256(rows))
    source_file, size = manifest.source, path.stat().st_size
    assert source_file is not None
    assert (source_file.rows, source_file.bytes, source_file.checksum) == (3, size, f"sha256:{sha256(path)}")
    assert lies_beside_shards(tmp_path)
    assert stored_manifest(tmp_path).fingerprint == "finger-a"


def test_sidecars_of_another_encoder_are_refused(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "data", 2), tmp_path / "out"
    embed(source, out)
    with pytest.raises(StoreMismatchError, match="fingerprint 'finger-a', but this run has fingerprint 'finger-b'"):
        embed(source, out, made_by=description(fingerprint="finger-b"))
    shutil.rmtree(out)
    embed(source, out, part=(0, 2))
    with pytest.raises(MissingCaptionError, match=r"do not fit 1 of 2 shards: 1\.parquet has none"):
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
    fields = json.loads(described.read_text())
    described.write_text(json.dumps({**fields, "format_version": 2}))
    with pytest.raises(StoreError, match="version 2, but this version of llm2clip reads"):
        sidecars.check(["caption"])
    described.write_text(json.dumps({**fields, "encoder": "another"}))
    with pytest.raises(StoreDamagedError, match=r"0\.emb\.manifest has changed since it was written"):
        sidecars.check(["caption"])
