"""Embedding shard by shard: every caption of a shard, once, beside it, and only where no valid sidecar is."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest
import torch

from llm2clip.data import CaptionSource
from llm2clip.data.opened_table import SourceError
from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.encoders.embed_shards import ShardEmbedder, list_jobs, parse_part
from llm2clip.store import EmbeddingCache
from llm2clip.store.manifest import MissingCaptionError, StoreManifest, StoreMismatchError
from tests.llm2clip.data.test_streams import write_tars
from tests.llm2clip.encoders.shards import Counting, description, embed, write_shards
from tests.llm2clip.store import encoder
from tests.tars import write_tar


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
    assert SourceSidecars(out, ShardedSource(source).shards).open(3).contains(["changed"]).all()


def test_a_shard_that_changed_is_embedded_again_also_where_its_size_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a tar with other captions, which ends at a multiple of ten kilobytes."""
    path, out, calls = tmp_path / "data" / "0.tar", tmp_path / "out", Counting()
    write_tar(path, [("0.txt", b"a dog"), ("1.txt", b"a cat")])
    source = CaptionSource(str(path), caption_columns=["txt"], streaming=True)
    embed(source, out)
    size, later = path.stat().st_size, (out / "0.emb.manifest").stat().st_mtime_ns + 10**9
    write_tar(path, [("0.txt", b"a dog"), ("1.txt", b"a pig")])
    os.utime(path, ns=(later, later))
    assert path.stat().st_size == size
    assert embed(source, out, calls).done_before == 0
    assert calls.texts == ["a dog", "a pig"]
    # Copied, it is newer and the same: that is read once.
    os.utime(out / "0.emb.manifest", ns=(1, 1))
    os.utime(path, ns=(2, 2))
    for _ in range(2):
        assert embed(source, out).done_before == 1
        monkeypatch.setattr("llm2clip.data.sidecars.source_checksum", None)


def test_shards_of_two_sources_with_equal_names_do_not_share_a_sidecar(tmp_path: Path) -> None:
    """Nor where their sizes are equal and the second is older than the sidecar of the first."""
    out, calls, paths = tmp_path / "out", Counting(), [tmp_path / name / "0.tar" for name in ("cats", "dogs")]
    for path in reversed(paths):
        path.parent.mkdir()
        write_tar(path, [("0.txt", f"one of {path.parent.name}".encode())])
    embed(texts(paths[0]), out)
    before = (out / "0.emb.safetensors").read_bytes()
    with pytest.raises(StoreMismatchError, match=r"0\.emb\.manifest belongs to .*cats/0\.tar, and .*dogs/0\.tar"):
        embed(texts(paths[1]), out)
    assert (out / "0.emb.safetensors").read_bytes() == before
    paths[0].parent.rename(tmp_path / "moved")  # which keeps its sidecars
    assert embed(texts(tmp_path / "moved" / "0.tar"), out, calls).done_before == 1
    moved = StoreManifest.read(out / "0.emb.manifest").source
    assert moved is not None
    assert moved.path == str(tmp_path / "moved" / "0.tar")
    assert not calls.texts


def texts(path: Path) -> CaptionSource:
    return CaptionSource(str(path), caption_columns=["txt"], streaming=True)


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
    made_by = description(text_model="tiny-encoder")
    calls = Counting()
    counts = embed(source, tmp_path / "out", calls, made_by=made_by, reused=cache)
    assert (counts.captions, counts.reused) == (6, 3)
    assert sorted(calls.texts) == ["a long dog 0", "a long dog 1", "dog 0"]
    opened = SourceSidecars(tmp_path / "out", ShardedSource(source).shards).open(1)
    for text, factor in (("everywhere", 2), ("dog 1", 2), ("a long dog 1", 1)):
        torch.testing.assert_close(opened.lookup([text]), factor * encoder.embed([text]), atol=2e-3, rtol=2e-3)
    with pytest.raises(StoreMismatchError, match="has max_length 64, but this run has 63"):
        embed(source, tmp_path / "x", made_by=description(max_length=63), reused=cache)


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


@pytest.mark.parametrize("text", ["8/8", "1", "a/b", "-1/2", "1/0"])
def test_a_slice_is_checked(text: str) -> None:
    assert parse_part("7/8") == (7, 8)
    with pytest.raises(ValueError, match=r"shard_slice must be i/n with 0 <= i < n, such as 0/8"):
        parse_part(text)
