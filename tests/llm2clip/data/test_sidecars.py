"""Sidecars beside their shards: what they contain, which do not fit, and whichever runs write them and die."""

from __future__ import annotations

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from llm2clip.data import CaptionSource
from llm2clip.data.shards import ShardedSource, SourceShard, read_checksum, source_checksum
from llm2clip.data.sidecars import SidecarFolder, SourceSidecars
from llm2clip.encoders.embed_shards import EmbedCounts, embed_shards, list_jobs
from llm2clip.files.atomic import sha256, temporary_name
from llm2clip.store import MissingCaptionError, StoreDamagedError, StoreManifest, StoreMismatchError
from llm2clip.store.store import has_sidecars
from llm2clip.verification import verify
from tests.builders.tables import write_table
from tests.damage import flip
from tests.llm2clip.encoders.shards import Counting, description, embed, embedding, write_shards
from tests.llm2clip.store import encoder
from tests.tars import write_tar


def test_a_sidecar_has_the_distinct_captions_of_its_shard(tmp_path: Path) -> None:
    source, calls = write_shards(tmp_path / "data"), Counting()
    assert embed(source, None, calls) == EmbedCounts(4, 0, 12, 4, 0, [])
    dogs = [f"{a}dog {n}" for n in range(4) for a in ("", "a long ")]
    assert sorted(calls.texts) == sorted(4 * ["everywhere"] + dogs)
    sidecars = SourceSidecars(tmp_path / "data", ShardedSource(source).shards)
    encoder_of_all, row_counts = sidecars.check(["caption", "other"])
    assert (encoder_of_all.identity, row_counts) == (description().identity, [3, 3, 3, 3])
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
    assert (file.rows, file.bytes) == (3, path.stat().st_size)
    assert file.checksum == source_checksum(str(path), ["caption", "other"])
    assert has_sidecars(tmp_path)


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


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_sidecars_in_the_folder_of_a_source_are_not_its_data(kind: str, tmp_path: Path) -> None:
    for number in range(2):
        write_table(tmp_path / f"{number}.{kind}", {"caption": [f"dog {number}"]})
    source = CaptionSource(str(tmp_path), streaming=True)
    assert embed(source, None).done_before == 0
    assert embed(source, None) == EmbedCounts(2, 2, 0, 0, 0, [])
    namesake = SourceShard(0, str(tmp_path / "0.tar"), "0.tar")
    with pytest.raises(StoreMismatchError, match=r"belongs to 0\.\w+, and 0\.tar would have the same"):
        SidecarFolder(tmp_path).is_embedded(namesake, description(), ["caption"])


def test_two_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    sources = [write_shards(tmp_path / name, 1) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"two shards would have the sidecar .*0\.emb\.safetensors"):
        list_jobs(sources, str(tmp_path / "out"))
    assert embed_shards(list_jobs(sources, None), embedding(), show_progress_bar=False).shards == 2


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "data", 2), tmp_path / "out"
    out.mkdir()
    left = [temporary_name(out / name) for name in ("0.emb.safetensors", "1.emb.manifest", "2.emb.manifest")]
    for path in (*left, *(out / f".{number}.emb.lock" for number in range(3))):
        path.write_bytes(b"half")
    embed(source, out)
    assert sorted(path.name for path in out.glob(".*")) == sorted([left[2].name, ".2.emb.lock"])  # of another shard


def test_two_runs_at_once_compute_a_shard_once(tmp_path: Path) -> None:
    """The encoders of the two runs differ in their last bits, as on a GPU: checksums of the one fit no other."""
    source, out = write_shards(tmp_path / "data", 2), tmp_path / "out"
    begun, texts = threading.Event(), list[list[str]]()

    def run(factor: float) -> EmbedCounts:
        def slowly(batch: list[str]) -> tuple[torch.Tensor, int]:
            begun.set()
            time.sleep(0.3)
            texts.append(batch)
            return encoder.embed(batch) * factor, 0

        return embed(source, out, slowly)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, 1.01)
        begun.wait(20)
        counts = [pool.submit(run, 1.0).result(), first.result()]
    assert len(texts) == sum(one.shards - one.done_before for one in counts) == 2
    assert len(list(out.iterdir())) == 4
    SourceSidecars(out, ShardedSource(source).shards).open(0)


def test_content_that_changed_with_its_old_size_and_time_is_embedded_again(tmp_path: Path) -> None:
    path, out, calls = tmp_path / "data" / "0.tar", tmp_path / "out", Counting()
    source = CaptionSource(str(path), caption_columns=["txt"], streaming=True)
    write_tar(path, [("0.txt", b"a dog")])
    embed(source, out)
    before = path.stat()
    write_tar(path, [("0.txt", b"a cat")])
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert embed(source, out, calls).done_before == 0
    assert calls.texts == ["a cat"]


def test_a_shard_without_rows_is_embedded(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "data", 2), tmp_path / "out"
    table = datasets.Dataset.from_parquet(str(tmp_path / "data" / "0.parquet"))
    table.select(range(0)).to_parquet(tmp_path / "data" / "0.parquet")
    assert embed(source, out).failed == []
    assert embed(source, out).done_before == 2
    assert SourceSidecars(out, ShardedSource(source).shards).check(["caption"])[1] == [0, 3]


def bytes_read() -> int:
    """What this process has read so far, of any file."""
    return int(Path("/proc/self/io").read_text().split()[1])


def write_pictures(path: Path, size: int, caption: str = "a dog", rows: int = 60) -> CaptionSource:
    files = [(f"{row}.{end}", x) for row in range(rows) for end, x in (("jpg", b"x" * size), ("txt", b"cat %d" % row))]
    write_tar(path, [*files[:-1], (files[-1][0], caption.encode())])
    return CaptionSource(str(path), caption_columns=["txt"], streaming=True)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts what is read")
def test_the_pictures_of_a_tar_are_not_read_to_embed_its_captions(tmp_path: Path) -> None:
    """But for those of its first rows, by which `datasets` finds the columns."""
    embed(write_pictures(tmp_path / "warm.tar", 10), tmp_path / "out")
    source = write_pictures(tmp_path / "data" / "0.tar", 200_000)
    size, begin = (tmp_path / "data" / "0.tar").stat().st_size, bytes_read()
    assert embed(source, tmp_path / "out").captions == 60
    assert bytes_read() - begin < size / 4
    begin = bytes_read()
    os.utime(tmp_path / "data" / "0.tar")
    assert embed(source, tmp_path / "out").done_before == 1
    assert verify.run(verify.VerifyConfig(folder=str(tmp_path / "out")))["num_captions"] > 60
    assert bytes_read() - begin < size / 2


def test_other_pictures_are_no_reason_to_embed_captions_again(tmp_path: Path) -> None:
    path, out, calls = tmp_path / "data" / "0.tar", tmp_path / "out", Counting()
    source = write_pictures(path, 1000)
    embed(source, out)
    write_pictures(path, 5000)
    shards = ShardedSource(source).shards
    with pytest.raises(MissingCaptionError, match=r"0\.tar has .* bytes, .* when it was embedded.*llm2clip embed"):
        SourceSidecars(out, shards).check(["txt"])
    assert verify.run(verify.VerifyConfig(folder=str(out)))["num_captions"] == 60
    assert embed(source, out, calls).done_before == 1
    assert not calls.texts
    assert SourceSidecars(out, shards).check(["txt"])[1] == [60]
    write_pictures(path, 5000, "a cat")  # as long as before
    with pytest.raises(verify.DamagedError, match="1 faults in "):
        verify.run(verify.VerifyConfig(folder=str(out)))
    assert embed(source, out, calls).done_before == 0
    assert calls.texts.count("a cat") == 1


def test_the_captions_of_a_file_that_has_moved_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed(write_pictures(tmp_path / "one" / "0.tar", 10), tmp_path / "out")
    (tmp_path / "one").rename(tmp_path / "two")
    source, read = CaptionSource(str(tmp_path / "two" / "0.tar"), caption_columns=["txt"], streaming=True), list[Any]()

    def counted(*arguments: Any) -> str | None:
        read.append(arguments)
        return read_checksum(*arguments)

    monkeypatch.setattr("llm2clip.data.shards.read_checksum", counted)
    for _ in range(3):
        assert embed(source, tmp_path / "out").done_before == 1
    assert len(read) == 1
