"""Embedding shard by shard, large parquet files in parts: every caption once, and only where no valid sidecar is."""

from __future__ import annotations

import itertools
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save

from llm2clip.data import CaptionSource
from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.encoders import embed_shards
from llm2clip.encoders.embed_shards import parse_part
from llm2clip.store import StoreManifest
from llm2clip.store.manifest import MissingCaptionError, StoreMismatchError
from llm2clip.verification import verify
from tests.builders.tables import write_table
from tests.damage import flip
from tests.llm2clip.encoders.shards import Counting, embed, write_groups, write_shards
from tests.llm2clip.store import encoder
from tests.tars import write_tar


def test_only_shards_without_a_valid_sidecar_are_embedded(tmp_path: Path) -> None:
    source, out, calls = write_shards(tmp_path / "data"), tmp_path / "out", Counting()
    embed(source, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
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


def test_shards_of_two_sources_with_equal_names_do_not_share_a_sidecar(tmp_path: Path) -> None:
    """Nor where their sizes are equal and the second is older than the sidecar of the first."""
    out, calls = tmp_path / "out", Counting()
    cats, dogs, moved = (tmp_path / name / "0.tar" for name in ("cats", "dogs", "moved"))
    sources = [CaptionSource(str(path), caption_columns=["txt"], streaming=True) for path in (cats, dogs, moved)]
    for path in (dogs, cats):
        write_tar(path, [("0.txt", f"one of {path.parent.name}".encode())])
    embed(sources[0], out)
    before = (out / "0.emb.safetensors").read_bytes()
    with pytest.raises(StoreMismatchError, match=r"0\.emb\.manifest belongs to .*cats/0\.tar, and .*dogs/0\.tar"):
        embed(sources[1], out)
    assert (out / "0.emb.safetensors").read_bytes() == before
    cats.parent.rename(moved.parent)  # which keeps its sidecars
    assert embed(sources[2], out, calls).done_before == 1
    assert not calls.texts


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
    source, out, whole = write_shards(tmp_path / "data", 9), tmp_path / "out", tmp_path / "whole"
    calls = Counting()
    for part, rank in itertools.product(range(2), range(2)):
        assert embed(source, out, calls, part=(part, 2), rank=rank, world_size=2).done_before == 0
    embed(source, whole)
    assert len(calls.texts) == 27
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_a_shard_that_cannot_be_embedded_does_not_stop_the_others(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "data", 3), tmp_path / "out"
    (tmp_path / "data" / "2.parquet").write_bytes(b"PAR1 and no more")

    def broken(texts: list[str]) -> tuple[torch.Tensor, int]:
        return encoder.embed(texts) * (torch.nan if "dog 1" in texts else 1), 0

    counts = embed(source, out, broken)
    assert len(counts.failed) == 2
    assert "1.parquet: " in counts.failed[0]
    assert "the caption 'everywhere', the caption 'dog 1'" in counts.failed[0]
    assert "2.parquet" in counts.failed[1]
    assert sorted(path.name for path in out.iterdir()) == ["0.emb.manifest", "0.emb.safetensors"]


@pytest.mark.parametrize("text", ["8/8", "1", "a/b", "1/0"])
def test_a_slice_is_checked(text: str) -> None:
    with pytest.raises(ValueError, match=r"0 <= i < n, such as 0/8"):
        parse_part(text)


def test_a_large_parquet_file_is_embedded_in_parts(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    captions = write_groups(data / "large.parquet", [3, 3, 3, 9, 2])
    write_groups(data / "small.parquet", [2, 2])
    write_groups(data / "single.parquet", [9])
    source = CaptionSource(str(data), streaming=True)
    embed(source, out, part_captions=6)
    starts = (0, 6, 9, 15, 18, 20)
    parts = [f"large.{start:08}-{stop:08}" for start, stop in itertools.pairwise(starts)]
    single = [f"single.{start:08}-{stop:08}" for start, stop in ((0, 6), (6, 9))]
    names = sorted(path.name.removesuffix(".emb.manifest") for path in out.glob("*.manifest"))
    assert names == [*parts, *single, "small"]
    assert embed(source, out, part_captions=6).done_before == 8
    shards = ShardedSource(source).shards
    sidecars = SourceSidecars(out, shards)
    assert sidecars.check(["caption"])[1] == [20, 9, 4]
    embed(source, tmp_path / "whole", part_captions=100)
    opened, whole = sidecars.open(0), SourceSidecars(tmp_path / "whole", shards).open(0)
    assert opened.lookup(captions).equal(whole.lookup(captions))
    with pytest.raises(MissingCaptionError, match="'none'"):
        opened.lookup(["none"])
    # A lost part is embedded again, alone, and meanwhile missed.
    (out / f"{parts[1]}.emb.manifest").unlink()
    with pytest.raises(MissingCaptionError, match=r"large\.parquet lacks rows 6 to 8"):
        sidecars.check(["caption"])
    calls = Counting()
    assert embed(source, out, calls, part_captions=6).done_before == 7
    assert calls.texts == list(dict.fromkeys(captions[6:9]))
    # With other parts, what is embedded stays, and the rest of the file is cut.
    (out / f"{parts[2]}.emb.manifest").unlink()
    assert embed(source, out, part_captions=4).done_before == 7
    assert SourceSidecars(out, shards).check(["caption"])[1] == [20, 9, 4]
    write_groups(data / "large.parquet", [3, 3, 3, 9, 3])
    with pytest.raises(ValueError, match=r"large.00000000-00000006.* with 20 rows, which has 21 now"):
        embed(source, out, part_captions=6)
    write_groups(data / "large.parquet", [3, 3, 3, 9, 2])
    # What was embedded whole stays whole.
    assert embed(source, tmp_path / "whole", part_captions=6).done_before == 3


def test_parts_are_bounded_in_captions_of_lists_and_columns(tmp_path: Path) -> None:
    """By what the footer says of each row group: here 5 texts of a row, or 2, in a list and in a field."""
    rows = [{"caption": [f"{row} {text}" for text in range(4 if row < 40 else 1)], "record": {"long": f"long {row}"}}
            for row in range(60)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=40)
    source = CaptionSource(str(tmp_path / "a.parquet"), caption_columns=["caption", "record.long"], streaming=True)
    out = tmp_path / "out"
    counts = embed(source, out, part_captions=50)
    assert counts.captions == 40 * 5 + 20 * 2
    embed(source, tmp_path / "by bytes", part_bytes=10**3)
    assert len(list((tmp_path / "by bytes").glob("*.manifest"))) > 2
    manifests = [StoreManifest.read(path) for path in sorted(out.glob("*.manifest"))]
    assert [manifest.rows for manifest in manifests] == [50] * 4 + [40]
    assert SourceSidecars(out, ShardedSource(source).shards).check(source.caption_columns)[1] == [60]


def test_a_killed_run_computes_no_more_than_a_part_of_a_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts are bounded in bytes: long captions are few."""
    monkeypatch.setattr(embed_shards, "EMBED_SIZE", 4)
    captions = [f"{row}{' long' * 200}" for row in range(64)]
    table = {"caption": captions, "picture": [b"x" * 5000] * 64}
    source = CaptionSource(write_table(tmp_path / "data" / "a.parquet", table), streaming=True)
    out, done = tmp_path / "out", list[str]()

    def dying(texts: list[str]) -> tuple[torch.Tensor, int]:
        if len(done) == 20:
            raise KeyboardInterrupt
        done.extend(texts)
        return Counting()(texts)

    with pytest.raises(KeyboardInterrupt):
        embed(source, out, dying, part_bytes=2**13)
    calls = Counting()
    counts = embed(source, out, calls, part_bytes=2**13)
    assert (counts.failed, counts.done_before) == ([], 2)
    assert (done, calls.texts) == (captions[:20], captions[2 * 64 // counts.shards :])
    embed(source, tmp_path / "whole", part_bytes=2**13)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also among those that are copied; the file is that of safetensors itself."""
    monkeypatch.setattr(embed_shards, "EMBED_SIZE", 1000)
    texts, out = [f"text {row}" for row in range(10_000)], tmp_path / "out"
    source = CaptionSource(write_table(tmp_path / "a.parquet", {"caption": texts}), streaming=True)
    written: list[int] = []

    class Watching(Counting):
        def __call__(self, texts: list[str]) -> tuple[torch.Tensor, int]:
            written.extend(path.stat().st_size for path in out.glob(".*.tmp"))
            return super().__call__(texts)

    embed(source, out, Watching())
    size = (out / "a.emb.safetensors").stat().st_size
    assert len(written) == 10
    assert all(done >= size * (call - 1) / 10 for call, done in enumerate(written))
    stored = load_file(out / "a.emb.safetensors")
    assert (out / "a.emb.safetensors").read_bytes() == save(stored)
    half = {"caption": [f"text {row}" if row % 3 else f"new {row}" for row in range(10_000)]}
    other = CaptionSource(write_table(tmp_path / "b.parquet", half), streaming=True)
    reused = SourceSidecars(out, ShardedSource(source).shards).open(0)
    calls = Counting()
    counts = embed(other, tmp_path / "other", calls, reused=reused)
    assert (counts.reused, len(calls.texts)) == (6666, 3334)
    rows = SourceSidecars(tmp_path / "other", ShardedSource(other).shards).open(0).lookup(half["caption"])
    assert torch.allclose(rows.float(), encoder.embed(half["caption"]), atol=2e-3)


def test_verify_knows_the_parts_of_a_file(tmp_path: Path) -> None:
    write_groups(tmp_path / "large.parquet", [3, 3, 3])
    embed(CaptionSource(str(tmp_path), streaming=True), None, part_captions=3)
    assert verify.run(verify.VerifyConfig(folder=str(tmp_path))) == {"num_shards": 3, "num_captions": 9}
    (tmp_path / "large.00000003-00000006.emb.manifest").unlink()
    with flip(tmp_path / "large.parquet", 10), pytest.raises(verify.DamagedError, match="2 faults in "):
        verify.run(verify.VerifyConfig(folder=str(tmp_path)))
