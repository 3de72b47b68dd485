"""The files of sidecars: none is taken for another one, whichever runs write them and die."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import datasets
import pytest
import torch

from llm2clip.data import CaptionSource
from llm2clip.data.shards import SourceShard
from llm2clip.embedding.cache_files import CacheMismatchError
from llm2clip.embedding.embed_shards import ShardCounts, ShardEmbedder, list_jobs
from llm2clip.embedding.sidecar_files import SidecarFolder, SidecarManifest
from llm2clip.utils.files import sha256
from tests.llm2clip.embedding import encoder
from tests.llm2clip.embedding.shards import Counting, description, embed, shard_of, write_shards
from tests.processes import run_python


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
