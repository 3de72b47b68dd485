"""Large parquet files are embedded in parts of whole row groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.data import CaptionSource
from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars, row_range
from llm2clip.store import manifest
from llm2clip.store.manifest import MissingCaptionError, StoreManifest
from llm2clip.verification import verify
from tests.llm2clip.encoders.shards import Counting, embed, write_groups


def test_a_large_parquet_file_is_embedded_in_parts(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    captions = write_groups(data / "large.parquet", [3, 3, 3, 9, 2])
    write_groups(data / "small.parquet", [2, 2])
    write_groups(data / "single.parquet", [9])
    source = CaptionSource(str(data), streaming=True)
    embed(source, out, part_rows=6)
    names = sorted(path.name.removesuffix(".emb.manifest") for path in out.glob("*.manifest"))
    parts = [
        f"large.{rows}"
        for rows in ("00000000-00000006", "00000006-00000009", "00000009-00000018", "00000018-00000020")
    ]
    assert names == [*parts, "single", "small"]
    assert embed(source, out, part_rows=6).done_before == 6
    shards = ShardedSource(source).shards
    sidecars = SourceSidecars(out, shards)
    assert sidecars.check(["caption"]).row_counts == [20, 9, 4]
    opened = sidecars.open(0)
    embed(source, tmp_path / "whole", part_rows=100)
    whole = SourceSidecars(tmp_path / "whole", shards).open(0)
    for text in [*captions, *reversed(captions)]:
        assert opened.lookup([text], dtype=None).equal(whole.lookup([text], dtype=None))
    assert opened.lookup(captions).equal(whole.lookup(captions))
    for each in (opened, whole):
        with pytest.raises(MissingCaptionError, match="'none'"):
            each.lookup(["none"])
    manifests = [StoreManifest.read(out / f"{part}.emb.manifest") for part in parts]
    assert [row_range(manifest) for manifest in manifests] == [(0, 6, 20), (6, 9, 20), (9, 18, 20), (18, 20, 20)]
    # A lost part is embedded again, alone, and meanwhile missed.
    (out / f"{parts[1]}.emb.manifest").unlink()
    with pytest.raises(MissingCaptionError, match=r"large\.parquet lacks rows 6 to 8"):
        sidecars.check(["caption"])
    calls = Counting()
    assert embed(source, out, calls, part_rows=6).done_before == 5
    assert calls.texts == list(dict.fromkeys(captions[6:9]))
    with pytest.raises(ValueError, match=r"large.00000000-00000006.* is of a part that .* is not cut into now"):
        embed(source, out, part_rows=9)
    # What was embedded whole stays whole.
    assert embed(source, tmp_path / "whole", part_rows=6).done_before == 3


def test_a_manifest_is_read_once_to_check_and_once_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_groups(tmp_path / "large.parquet", [3, 3, 3])
    write_groups(tmp_path / "small.parquet", [2])
    source = CaptionSource(str(tmp_path), streaming=True)
    embed(source, None, part_rows=3)
    sidecars = SourceSidecars(tmp_path, ShardedSource(source).shards)
    opened: list[str] = []
    read = manifest.read_json
    monkeypatch.setattr(manifest, "read_json", lambda path: (read(path), opened.append(path.name))[0])
    names = ["large.00000000-00000003", "large.00000003-00000006", "large.00000006-00000009", "small"]
    sidecars.check(["caption"])
    assert sorted(opened) == [f"{name}.emb.manifest" for name in names]
    opened.clear()
    sidecars.open(0)
    assert sorted(opened) == [f"{name}.emb.manifest" for name in names[:3]]


def test_verify_knows_the_parts_of_a_file(tmp_path: Path) -> None:
    write_groups(tmp_path / "large.parquet", [3, 3, 3])
    embed(CaptionSource(str(tmp_path), streaming=True), None, part_rows=3)
    assert verify.run(verify.VerifyConfig(folder=str(tmp_path))) == {"num_shards": 3, "num_captions": 9}
    path = tmp_path / "large.parquet"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    (tmp_path / "large.00000003-00000006.emb.manifest").unlink()
    with pytest.raises(verify.DamagedError, match="4 faults in "):
        verify.run(verify.VerifyConfig(folder=str(tmp_path)))
