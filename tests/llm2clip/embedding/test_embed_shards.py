"""Embedding shard by shard: every caption of a shard, once, beside it, and only where no valid sidecar is."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llm2clip.data import CaptionSource
from llm2clip.data.shards import ShardedSource, SourceShard
from llm2clip.data.sources import SourceError
from llm2clip.embedding import CacheManifest, EmbeddingCache, verify
from llm2clip.embedding.cache_files import CacheDamagedError, CacheMismatchError, MissingCaptionError
from llm2clip.embedding.embed_shards import ShardCounts, ShardEmbedder, list_jobs, parse_part
from llm2clip.embedding.sidecar_files import SidecarFolder, SidecarManifest
from llm2clip.embedding.sidecars import Sidecar, SourceSidecars, is_sidecar_folder, stored_encoder
from llm2clip.utils.files import sha256
from tests.llm2clip.data.test_streams import write_tars
from tests.llm2clip.embedding import encoder
from tests.processes import run_python


class Counting:
    """The encoder of the cache's tests, which counts what it embeds."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, int]:
        self.texts += texts
        return encoder.embed(texts), sum("long" in text for text in texts)


def description(**fields: Any) -> CacheManifest:
    settings: dict[str, Any] = {
        "fingerprint": "finger-a", "text_model_name": "tiny", "hidden_size": encoder.WIDTH, "pooling": "mean",
        "prompt_prefix": "user: ", "prompt_suffix": "<eot>", "max_length": 64,
    }  # fmt: skip
    return CacheManifest(**{**settings, **fields})


def write_shards(folder: Path, count: int = 4) -> CaptionSource:
    """Parquet files with three rows each, one of which every file has, one without a caption, and one with two."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rows = {"caption": ["everywhere", None, f"dog {number}"], "other": ["", None, f"a long dog {number}"]}
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{number}.parquet")
    return CaptionSource(str(folder / "*.parquet"), caption_columns=["caption", "other"], streaming=True)


def embed(source: CaptionSource, folder: Path | None, calls: Counting | None = None, **options: Any) -> ShardCounts:
    shards = ShardEmbedder(calls or Counting(), options.pop("made_by", description()), options.pop("reused", None))
    rank, world_size = options.pop("rank", 0), options.pop("world_size", 1)
    jobs = list_jobs([source], folder and str(folder), **options)
    return shards.run(jobs[rank::world_size], show_progress_bar=False)


def shard_of(source: CaptionSource, number: int) -> SourceShard:
    return ShardedSource(source).shards[number]


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
            found = opened.lookup(text)
            assert found is not None
            torch.testing.assert_close(found.float(), encoder.embed([text])[0], atol=2e-3, rtol=2e-3)
        assert opened.lookup(f"dog {number + 1}") is None
    path = tmp_path / "data" / "2.parquet"
    manifest = SidecarManifest.read(tmp_path / "data" / "2.emb.manifest")
    rows = tmp_path / "data" / "2.emb.safetensors"
    assert (manifest.rows, manifest.captions, manifest.truncated) == (3, 3, 1)
    assert (manifest.source_bytes, manifest.source_checksum) == (path.stat().st_size, f"sha256:{sha256(path)}")
    assert (manifest.bytes, manifest.checksum) == (rows.stat().st_size, sha256(rows))
    assert is_sidecar_folder(tmp_path)
    assert stored_encoder(tmp_path).fingerprint == "finger-a"


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_sidecars_in_the_folder_of_a_source_are_not_its_data(kind: str, tmp_path: Path) -> None:
    for number in range(2):
        rows = datasets.Dataset.from_dict({"caption": [f"dog {number}"]})
        getattr(rows, f"to_{kind}")(tmp_path / f"{number}.{kind}")
    source = CaptionSource(str(tmp_path), streaming=True)
    assert embed(source, None).done_before == 0
    assert embed(source, None) == ShardCounts(2, 2, 0, 0, 0, [])
    (tmp_path / "0.tar").write_bytes((tmp_path / f"0.{kind}").read_bytes())
    namesake = CaptionSource(str(tmp_path / "0.tar"), streaming=True)
    shard = SourceShard(0, namesake.path, "0.tar")
    with pytest.raises(
        CacheMismatchError, match=r"0\.emb\.manifest belongs to 0\.\w+, and 0\.tar would have the same"
    ):
        SidecarFolder(tmp_path).is_embedded(shard, description(), ["caption"])


def test_only_shards_without_a_valid_sidecar_are_embedded(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "data"), tmp_path / "out"
    embed(source, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    calls = Counting()
    assert embed(source, out, calls).done_before == 4
    assert not calls.texts
    (out / "0.emb.manifest").unlink()  # killed between the sidecar and its manifest
    (out / "1.emb.manifest").write_text("{")
    with (out / "2.emb.safetensors").open("ab") as file:
        file.truncate(100)
    write_shards(tmp_path / "data", 5)  # the data has grown
    counts = embed(source, out, calls)
    assert (counts.shards, counts.done_before) == (5, 1)
    assert {text for text in calls.texts if text != "everywhere"} == {
        f"{a}dog {number}" for number in (0, 1, 2, 4) for a in ("", "a long ")
    }
    assert {name: (out / name).read_bytes() for name in before} == before
    datasets.Dataset.from_dict({"caption": ["changed"], "other": [None]}).to_parquet(tmp_path / "data" / "3.parquet")
    assert embed(source, out).done_before == 4
    assert Sidecar(
        out / "3.emb.safetensors", SidecarManifest.read(out / "3.emb.manifest")
    ).lookup("changed") is not None  # fmt: skip


def test_an_added_column_is_embedded(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "data", 1), tmp_path / "out"
    source.caption_columns = ["caption"]
    embed(source, out)
    source.caption_columns = ["caption", "other"]
    with pytest.raises(MissingCaptionError, match=r"that of 0\.parquet lacks the column other"):
        SourceSidecars(out, ShardedSource(source).shards).check(["caption", "other"])
    assert embed(source, out).done_before == 0
    source.caption_columns = ["other"]
    assert embed(source, out).done_before == 1


def test_parts_and_processes_share_the_shards(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "data", 9), tmp_path / "out"
    whole, texts = tmp_path / "whole", []
    for part in range(2):
        for rank in range(2):
            calls = Counting()
            counts = embed(source, out, calls, part=(part, 2), rank=rank, world_size=2)
            assert counts.done_before == 0
            texts += calls.texts
    embed(source, whole)
    assert len(texts) == 27
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in out.iterdir():
        assert path.read_bytes() == (whole / path.name).read_bytes()


def test_embeddings_of_a_cache_are_copied(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "data", 2)
    encoder.build(tmp_path / "cache", ["everywhere", "dog 1"], lambda texts: 2 * encoder.embed(texts), shard_size=1)
    cache = EmbeddingCache.open(tmp_path / "cache")
    made_by = description(text_model_name="tiny-encoder")
    calls = Counting()
    counts = embed(source, tmp_path / "out", calls, made_by=made_by, reused=cache)
    assert (counts.captions, counts.reused) == (6, 3)
    assert sorted(calls.texts) == ["a long dog 0", "a long dog 1", "dog 0"]
    opened = SourceSidecars(tmp_path / "out", ShardedSource(source).shards).open(1)
    for text, factor in (("everywhere", 2), ("dog 1", 2), ("a long dog 1", 1)):
        torch.testing.assert_close(
            opened.lookup(text), (factor * encoder.embed([text])[0]).half(), atol=2e-3, rtol=2e-3
        )
    with pytest.raises(CacheMismatchError, match="has max_length 64, but this run has 63"):
        embed(source, tmp_path / "x", made_by=description(max_length=63), reused=cache)


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


def test_a_shard_that_cannot_be_embedded_does_not_stop_the_others(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "data", 3), tmp_path / "out"

    def broken(texts: list[str]) -> tuple[torch.Tensor, int]:
        rows = encoder.embed(texts)
        if "dog 1" in texts:
            rows[0] = float("nan")
        return rows, 0

    counts = ShardEmbedder(broken, description()).run(list_jobs([source], str(out)), show_progress_bar=False)
    assert len(counts.failed) == 1
    assert "1.parquet: The embedding of the caption 'everywhere' is not finite" in counts.failed[0]
    assert sorted(path.name for path in out.glob("*.manifest")) == ["0.emb.manifest", "2.emb.manifest"]
    assert not list(out.glob(".*"))


def test_a_tar_that_is_cut_short_is_no_shard(tmp_path: Path) -> None:
    """What is left of it can be read: a file less, or only the mark of its end."""
    source = write_tars(tmp_path / "tars", 3)
    for number, size in ((1, 2048), (2, 3072)):
        with (tmp_path / "tars" / f"{number:05}.tar").open("rb+") as file:
            file.truncate(size)
    counts = embed(source, tmp_path / "out")
    assert [fault.rpartition("/")[2] for fault in counts.failed] == [
        "00001.tar is cut short after s1r1.txt.",
        "00002.tar is cut short after s2r2.txt.",
    ]
    assert [path.name for path in (tmp_path / "out").glob("*.manifest")] == ["00000.emb.manifest"]
    with (tmp_path / "tars" / "00000.tar").open("rb+") as file:
        file.truncate(2560)
    with pytest.raises(SourceError, match=r"Reading .* failed: ReadError: unexpected end of data"):
        embed(source, tmp_path / "out")


def test_two_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    sources = [write_shards(tmp_path / name, 1) for name in ("a", "b")]
    shards = ShardEmbedder(Counting(), description())
    with pytest.raises(ValueError, match=r"two shards would have the sidecar .*0\.emb\.safetensors"):
        list_jobs(sources, str(tmp_path / "out"))
    assert shards.run(list_jobs(sources, None), show_progress_bar=False).shards == 2
    assert SidecarFolder(tmp_path / "a").rows_path(shard_of(sources[0], 0)).is_file()


def write_groups(path: Path, groups: list[int]) -> list[str]:
    """A parquet file with row groups of these sizes; some captions are in all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    captions = [f"cat {row}" if row % 4 else "everywhere" for row in range(sum(groups))]
    table = pa.table({"caption": captions, "picture": [b"x" * 50] * len(captions)})
    with pq.ParquetWriter(path, table.schema) as writer:
        for start, count in zip(itertools.accumulate([0, *groups]), groups, strict=False):
            writer.write_table(table.slice(start, count))
    return captions


def test_a_large_parquet_file_is_embedded_in_parts(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    captions = write_groups(data / "large.parquet", [3, 3, 3, 9, 2])
    write_groups(data / "small.parquet", [2, 2])
    write_groups(data / "single.parquet", [9])
    source = CaptionSource(str(data), streaming=True)
    embed(source, out, part_rows=6)
    names = sorted(path.name.removesuffix(".emb.manifest") for path in out.glob("*.manifest"))
    parts = ["large.00000-00002", "large.00002-00003", "large.00003-00004", "large.00004-00005"]
    assert names == [*parts, "single", "small"]
    assert embed(source, out, part_rows=6).done_before == 6
    shards = ShardedSource(source).shards
    sidecars = SourceSidecars(out, shards)
    assert sidecars.check(["caption"]).row_counts == [20, 9, 4]
    opened = sidecars.open(0)
    embed(source, tmp_path / "whole", part_rows=100)
    whole = SourceSidecars(tmp_path / "whole", shards).open(0)
    for text in [*captions, *reversed(captions)]:
        assert opened.lookup(text).equal(whole.lookup(text))
    assert opened.lookup("none") is None
    # Each part has its own bytes of the file, and all of these one part.
    manifests = [SidecarManifest.read(out / f"{part}.emb.manifest") for part in parts]
    ranges = [(found.first_byte, found.last_byte) for found in (manifest.row_groups for manifest in manifests)]
    assert [start for start, _ in ranges] + [(data / "large.parquet").stat().st_size] == [
        0, *(stop for _, stop in ranges)
    ]  # fmt: skip
    assert all(start < stop for start, stop in ranges)
    # A lost part is embedded again, alone, and meanwhile missed.
    (out / f"{parts[1]}.emb.manifest").unlink()
    with pytest.raises(MissingCaptionError, match=r"large\.parquet lacks row groups 2 to 2"):
        sidecars.check(["caption"])
    calls = Counting()
    assert embed(source, out, calls, part_rows=6).done_before == 5
    assert calls.texts == list(dict.fromkeys(captions[6:9]))
    with pytest.raises(ValueError, match=r"large\.00000-00002.* is of a part that .* is not cut into now"):
        embed(source, out, part_rows=9)
    # What was embedded whole stays whole.
    assert embed(source, tmp_path / "whole", part_rows=6).done_before == 3


def test_verify_knows_the_parts_of_a_file(tmp_path: Path) -> None:
    write_groups(tmp_path / "large.parquet", [3, 3, 3])
    embed(CaptionSource(str(tmp_path), streaming=True), None, part_rows=3)
    assert verify.run(verify.VerifyConfig(folder=str(tmp_path))) == {"num_shards": 3, "num_captions": 9}
    path = tmp_path / "large.parquet"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    (tmp_path / "large.00001-00002.emb.manifest").unlink()
    with pytest.raises(verify.DamagedError, match="3 faults in the 2 sidecars"):
        verify.run(verify.VerifyConfig(folder=str(tmp_path)))


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "data", 2), tmp_path / "out"
    script = """
import os, sys
from pathlib import Path
from llm2clip.utils.files import temporary_path
for name in ("0.emb.safetensors", "1.emb.manifest", "2.emb.manifest"):
    with temporary_path(Path(sys.argv[1], name)) as path:
        pass
    path.write_bytes(b"half")
os.kill(os.getpid(), 9)
"""
    assert run_python(["-c", script, str(out)], check=False).returncode == -9
    left = sorted(out.iterdir())
    assert [path.suffix for path in left] == 3 * [".tmp"]
    host, living = left[0].name.split(".")[-3], os.getppid()
    kept = [left[2], out / f".0.emb.manifest.{host}.{living}.tmp", out / f".0.emb.manifest.other-{host}.1.tmp"]
    for path in kept[1:]:
        path.touch()
    embed(source, out)
    assert sorted(path for path in out.iterdir() if path.suffix == ".tmp") == sorted(kept)


def test_runs_over_the_same_shards_leave_one_whole_sidecar_of_each(tmp_path: Path) -> None:
    """The encoders of the two runs differ in their last bits, as on a GPU: checksums of the one fit no other."""
    source, out = write_shards(tmp_path / "data", 2), tmp_path / "out"
    other = [embed(source, tmp_path / "other"), SidecarFolder(tmp_path / "other")][1]

    class Overtaken(SidecarFolder):
        """Another run replaces the sidecar between the two files of this run, and goes on to its manifest or not."""

        overtaken = 0

        def publish(self, shard: SourceShard, temporary: Path, manifest: SidecarManifest) -> bool:
            write = SidecarManifest.write

            def overtaken(own: SidecarManifest, path: Path) -> None:
                if Overtaken.overtaken < 2:
                    Overtaken.overtaken += 1
                    shutil.copy(other.rows_path(shard), self.rows_path(shard))
                write(own, path)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(SidecarManifest, "write", overtaken)
                return super().publish(shard, temporary, manifest)

    def slightly(texts: list[str]) -> tuple[torch.Tensor, int]:
        return encoder.embed(texts) * 1.01, 0

    jobs = [job._replace(target=Overtaken(out)) for job in list_jobs([source], str(out))]
    counts = ShardEmbedder(slightly, description()).run(jobs, show_progress_bar=False)
    assert Overtaken.overtaken == 2
    assert (counts.shards, counts.captions, counts.failed) == (2, 6, [])
    for number in range(2):
        manifest = SidecarManifest.read(out / f"{number}.emb.manifest")
        assert manifest.checksum == sha256(out / f"{number}.emb.safetensors")


@pytest.mark.parametrize("text", ["8/8", "1", "a/b", "-1/2", "1/0"])
def test_a_slice_is_checked(text: str) -> None:
    assert parse_part("7/8") == (7, 8)
    with pytest.raises(ValueError, match=r"shard_slice must be i/n with 0 <= i < n, such as 0/8"):
        parse_part(text)
