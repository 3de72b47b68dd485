"""Sidecars beside their shards: what they contain, and which do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llm2clip.data.shards import ShardedSource
from llm2clip.embedding.cache_files import CacheDamagedError, CacheMismatchError, MissingCaptionError
from llm2clip.embedding.embed_shards import ShardCounts
from llm2clip.embedding.sidecar_files import SidecarManifest
from llm2clip.embedding.sidecars import Sidecar, SourceSidecars, is_sidecar_folder, stored_encoder
from llm2clip.utils.files import sha256
from tests.llm2clip.embedding import encoder
from tests.llm2clip.embedding.shards import Counting, description, embed, write_shards


def test_a_sidecar_has_the_distinct_captions_of_its_shard(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "data")
    calls = Counting()
    assert embed(source, None, calls) == ShardCounts(4, 0, 12, 4, 0, [])
    assert sorted(calls.texts) == sorted(
        4 * ["everywhere"] + [f"{a}dog {n}" for n in range(4) for a in ("", "a long ")]
    )
    sidecars = SourceSidecars(tmp_path / "data", ShardedSource(source).shards)
    checked = sidecars.check(["caption", "other"])
    assert (checked.encoder.identity(), checked.row_counts) == (description().identity(), [3, 3, 3, 3])
    for number in range(4):
        opened = sidecars.open(number)
        for text in ("everywhere", f"dog {number}", f"a long dog {number}"):
            torch.testing.assert_close(opened.lookup([text]), encoder.embed([text]), atol=2e-3, rtol=2e-3)
        with pytest.raises(MissingCaptionError, match=rf"lacks 1 of 1 captions, such as 'dog {number + 1}'"):
            opened.lookup([f"dog {number + 1}"])
    path = tmp_path / "data" / "2.parquet"
    manifest = SidecarManifest.read(tmp_path / "data" / "2.emb.manifest")
    rows = tmp_path / "data" / "2.emb.safetensors"
    assert (manifest.rows, manifest.captions, manifest.truncated) == (3, 3, 1)
    assert (manifest.source_bytes, manifest.source_checksum) == (path.stat().st_size, f"sha256:{sha256(path)}")
    assert (manifest.bytes, manifest.checksum) == (rows.stat().st_size, sha256(rows))
    assert is_sidecar_folder(tmp_path)
    assert stored_encoder(tmp_path).fingerprint == "finger-a"


def test_sidecars_of_another_encoder_are_refused(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "data", 2), tmp_path / "out"
    embed(source, out)
    with pytest.raises(CacheMismatchError, match="fingerprint 'finger-a', but this run has fingerprint 'finger-b'"):
        embed(source, out, made_by=description(fingerprint="finger-b"))
    shutil.rmtree(out)
    embed(source, out, part=(0, 2))
    with pytest.raises(MissingCaptionError, match=r"do not fit 1 of 2 shards: 1\.parquet has none"):
        SourceSidecars(out, ShardedSource(source).shards).check(["caption"])
    embed(source, tmp_path / "b", made_by=description(fingerprint="finger-b"), part=(1, 2))
    for path in (tmp_path / "b").iterdir():
        shutil.copy(path, out)
    with pytest.raises(CacheMismatchError, match=r"has fingerprint 'finger-b', but the sidecar of 0\.parquet has"):
        SourceSidecars(out, ShardedSource(source).shards).check(["caption"])


def test_damage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_shards(tmp_path / "data", 1), tmp_path / "out"
    embed(source, out)
    path = out / "0.emb.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    sidecars = SourceSidecars(out, ShardedSource(source).shards)
    monkeypatch.setattr("llm2clip.embedding.sidecars.SAMPLED", 1)
    with pytest.raises(CacheDamagedError, match="is not what its manifest describes: delete it and run"):
        sidecars.open(0)
    monkeypatch.undo()
    compared = []
    for epoch in range(64):
        try:
            SourceSidecars(out, sidecars.shards).open(0, epoch)
        except CacheDamagedError:
            compared.append(epoch)
    assert 1 <= len(compared) <= 12
    path.write_bytes(content[:-2])
    with pytest.raises(CacheDamagedError, match="is truncated"):
        Sidecar(path, SidecarManifest.read(out / "0.emb.manifest"))
    fields = json.loads((out / "0.emb.manifest").read_text())
    (out / "0.emb.manifest").write_text(json.dumps({**fields, "format_version": 2}))
    with pytest.raises(ValueError, match="not the manifest of a sidecar of version 1"):
        sidecars.check(["caption"])
    (out / "0.emb.manifest").write_text(json.dumps({**fields, "encoder": {"pooling": "mean"}}))
    with pytest.raises(CacheDamagedError, match="does not describe an encoder or a part"):
        sidecars.check(["caption"])
