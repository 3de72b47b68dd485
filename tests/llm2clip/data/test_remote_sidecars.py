"""Sidecars of remote shards, and remote sidecars: the same files as local ones, read back the same."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import fsspec
import pytest

from llm2clip import cli
from llm2clip.data import CaptionSource, sidecars
from llm2clip.data.shards import ShardedSource, source_size
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.encoders.embed import EmbedConfig, run
from llm2clip.encoders.embed_shards import embed_shards, list_jobs
from llm2clip.files.remote_path import AnyPath, local_copy, open_path
from llm2clip.store import StoreManifest
from llm2clip.store.store import stored_manifest
from llm2clip.verification import verify
from tests.llm2clip.data.streams import write_tars
from tests.llm2clip.encoders.shards import Counting, embed, embedding, write_groups, write_shards
from tests.llm2clip.store import encoder


@pytest.fixture
def bucket() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def embed_at(source: CaptionSource, folder: str, calls: Counting | None = None, part_captions: int = 100) -> int:
    """Embed a source; return how many shards were done before."""
    jobs = list_jobs([source], folder, part_captions=part_captions)
    return embed_shards(jobs, embedding(calls), show_progress_bar=False).done_before


def contents(folder: str | Path) -> dict[str, bytes]:
    files, root = fsspec.core.url_to_fs(str(folder))
    return {path.removeprefix(root): files.cat_file(path) for path in files.find(root)}


def test_remote_sidecars_are_those_of_a_folder(bucket: str, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "data" / "inner", 3)
    source.path = str(tmp_path / "data" / "*" / "*.parquet")
    embed(source, tmp_path / "local")
    assert embed_at(source, bucket) == 0
    assert contents(bucket) == contents(tmp_path / "local")
    calls = Counting()
    fsspec.filesystem("memory").rm("/bucket/inner/1.emb.manifest")
    with pytest.raises(verify.DamagedError, match="1 faults in "):
        verify.run(verify.VerifyConfig(folder=bucket))
    assert embed_at(source, bucket, calls) == 2
    assert "dog 1" in calls.texts
    assert "dog 0" not in calls.texts
    assert verify.run(verify.VerifyConfig(folder=bucket)) == {"num_shards": 3, "num_captions": 9}
    assert stored_manifest(bucket).fingerprint == "finger-a"
    shards = ShardedSource(source).shards
    remote, local = (SourceSidecars(folder, shards) for folder in (bucket, tmp_path / "local"))
    assert remote.check(["caption"]) == local.check(["caption"])
    texts = ["everywhere", "a long dog 2"]
    assert remote.open(2).lookup(texts).equal(local.open(2).lookup(texts))


def test_a_sidecar_that_is_still_read_is_not_downloaded_again(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, copied = write_shards(tmp_path / "data", 2), Counter[str]()
    embed_at(source, bucket)

    def counted(path: AnyPath) -> AbstractContextManager[Path]:
        copied[path.name] += 1
        return local_copy(path)

    monkeypatch.setattr("llm2clip.data.sidecars.local_copy", counted)
    sidecars = SourceSidecars(bucket, ShardedSource(source).shards)
    first = sidecars.open(0)
    for _ in range(2):
        sidecars.open(1)  # which nobody reads any more
    assert sidecars.open(0) is first
    assert copied == {"0.emb.safetensors": 1, "1.emb.safetensors": 2}


def test_a_manifest_appears_after_its_sidecar(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_shards(tmp_path / "data", 1)

    def fails(self: object, local: str, path: str, **options: object) -> None:
        raise OSError("the connection is lost")

    embed_at(source, bucket)
    write_groups(tmp_path / "data" / "0.parquet", [3])
    source.caption_columns = ["caption"]
    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "put_file", fails)
        with pytest.raises(OSError, match="the connection is lost"):
            embed_at(source, bucket)
    assert list(contents(bucket)) == ["/0.emb.safetensors"]
    assert embed_at(source, bucket) == 0
    assert verify.run(verify.VerifyConfig(folder=bucket)) == {"num_shards": 1, "num_captions": 3}


def test_the_sizes_of_shards_are_asked_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_shards(tmp_path, 4)
    embed(source, None)
    together = threading.Barrier(4)

    def size(path: str) -> int:
        together.wait(10)
        return source_size(path)

    monkeypatch.setattr(sidecars, "source_size", size)
    assert SourceSidecars(tmp_path, ShardedSource(source).shards).check(["caption"])[1] == [3] * 4


@pytest.mark.parametrize(("name", "column", "count"), [("00000.tar", "txt", 1), ("large.parquet", "caption", 3)])
def test_remote_shards_are_embedded_and_resumed(
    name: str, column: str, count: int, bucket: str, tmp_path: Path
) -> None:
    """Parquet in parts."""
    data, out = tmp_path / "data", tmp_path / "out"
    write_tars(data, 1)
    write_groups(data / "large.parquet", [3, 3, 3])
    fsspec.filesystem("memory").put(str(data), "/bucket/", recursive=True)
    remote, local = (
        CaptionSource(f"{place}/{name}", caption_columns=[column], streaming=True)
        for place in (f"{bucket}/data", data)
    )
    assert embed_at(remote, str(out), part_captions=3) == 0
    embed_at(local, str(tmp_path / "local"), part_captions=3)
    rows = [path for path in contents(out) if path.endswith(".safetensors")]
    assert len(rows) == count
    assert [contents(out)[path] for path in rows] == [contents(tmp_path / "local")[path] for path in rows]
    assert embed_at(remote, str(out), part_captions=3) == count
    assert verify.run(verify.VerifyConfig(folder=str(out)))["num_shards"] == count
    manifest = StoreManifest.read(next(out.glob("*.manifest")))
    assert manifest.source is not None
    assert manifest.source.bytes == (data / name).stat().st_size
    found = SourceSidecars(out, ShardedSource(remote).shards).open(0)
    for text in ["caption 0 0"] if count == 1 else ["cat 1", "cat 7", "everywhere"]:
        assert found.lookup([text], dtype=None).equal(encoder.embed([text]).half())
    with pytest.raises(ValueError, match="is remote; set output_dir"):
        list_jobs([remote], None)
    with pytest.raises(ValueError, match="cannot be written; set output_dir"):
        list_jobs([remote], "http://127.0.0.1/sidecars")


def test_commands_are_refused_as_places(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="is a command, which is never run"):
        open_path("pipe:rm x")
    settings = ["--text-model-name-or-path", "x", "--sources", '[{"path": "pipe:curl x", "streaming": true}]']
    assert cli.main(["embed", "--output-dir", "memory://x", *settings]) == 2
    assert "'pipe:curl x' is a command, which is never run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a cache is a local folder"):
        run(EmbedConfig(output_dir="memory://x", sources=[{"path": "x"}], text_model_name_or_path="x"))
