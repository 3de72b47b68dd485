"""The files of sidecars: none is taken for another one, whichever runs write them and die."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
import torch

from llm2clip.data import CaptionSource
from llm2clip.data.shards import ShardedSource, SourceShard
from llm2clip.data.sidecars import SidecarFolder, SourceSidecars
from llm2clip.encoders.embed_shards import ShardCounts, ShardEmbedder, list_jobs
from llm2clip.store.manifest import StoreMismatchError
from tests.llm2clip.encoders.shards import Counting, description, embed, shard_of, write_shards
from tests.llm2clip.store import encoder
from tests.processes import run_python
from tests.tars import write_tar


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
        StoreMismatchError, match=r"0\.emb\.manifest belongs to 0\.\w+, and 0\.tar would have the same"
    ):
        SidecarFolder(tmp_path).is_embedded(shard, description(), ["caption"])


def test_two_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    sources = [write_shards(tmp_path / name, 1) for name in ("a", "b")]
    shards = ShardEmbedder(Counting(), description())
    with pytest.raises(ValueError, match=r"two shards would have the sidecar .*0\.emb\.safetensors"):
        list_jobs(sources, str(tmp_path / "out"))
    assert shards.run(list_jobs(sources, None), show_progress_bar=False).shards == 2
    assert SidecarFolder(tmp_path / "a").rows_path(shard_of(sources[0], 0)).is_file()


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "data", 2), tmp_path / "out"
    script = """
import os, sys
from pathlib import Path
from llm2clip.utils.files import temporary_name
os.mkdir(sys.argv[1])
for name in ("0.emb.safetensors", "1.emb.manifest", "2.emb.manifest"):
    temporary_name(Path(sys.argv[1], name)).write_bytes(b"half")
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


def test_two_runs_at_once_compute_a_shard_once(tmp_path: Path) -> None:
    """The encoders of the two runs differ in their last bits, as on a GPU: checksums of the one fit no other."""
    source, out = write_shards(tmp_path / "data", 2), tmp_path / "out"
    begun, texts = threading.Event(), list[list[str]]()

    def run(factor: float) -> ShardCounts:
        def slowly(batch: list[str]) -> tuple[torch.Tensor, int]:
            begun.set()
            time.sleep(0.3)
            texts.append(batch)
            return encoder.embed(batch) * factor, 0

        return ShardEmbedder(slowly, description()).run(list_jobs([source], str(out)), show_progress_bar=False)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, 1.01)
        begun.wait(20)
        second = pool.submit(run, 1.0)
        counts = [first.result(), second.result()]
    assert len(texts) == sum(one.shards - one.done_before for one in counts) == 2
    assert sorted(path.name for path in out.iterdir()) == [
        f"{number}.emb.{ending}" for number in range(2) for ending in ("manifest", "safetensors")
    ]
    SourceSidecars(out, ShardedSource(source).shards).open(0)


def test_content_that_changed_with_its_old_size_and_time_is_embedded_again(tmp_path: Path) -> None:
    path, out = tmp_path / "data" / "0.tar", tmp_path / "out"
    source = CaptionSource(str(path), caption_columns=["txt"], streaming=True)
    write_tar(path, [("0.txt", b"a dog")])
    embed(source, out)
    before, size = path.stat().st_mtime_ns, path.stat().st_size
    write_tar(path, [("0.txt", b"a cat")])
    os.utime(path, ns=(before, before))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before, size)
    calls = Counting()
    assert embed(source, out, calls).done_before == 0
    assert calls.texts == ["a cat"]


def test_a_shard_without_rows_is_embedded(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "data", 2), tmp_path / "out"
    table = datasets.Dataset.from_parquet(str(tmp_path / "data" / "0.parquet"))
    table.select(range(0)).to_parquet(tmp_path / "data" / "0.parquet")
    assert embed(source, out).failed == []
    assert embed(source, out).done_before == 2
    assert SourceSidecars(out, ShardedSource(source).shards).check(["caption"]).row_counts == [0, 3]
