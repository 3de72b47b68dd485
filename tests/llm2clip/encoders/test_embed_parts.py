"""Large parquet files are embedded in parts of whole row groups."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from llm2clip.data import CaptionSource
from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.store.manifest import MissingCaptionError
from llm2clip.verification import verify
from tests.damage import flip
from tests.llm2clip.encoders.shards import Counting, embed, write_groups


def test_a_large_parquet_file_is_embedded_in_parts(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    captions = write_groups(data / "large.parquet", [3, 3, 3, 9, 2])
    write_groups(data / "small.parquet", [2, 2])
    write_groups(data / "single.parquet", [9])
    source = CaptionSource(str(data), streaming=True)
    embed(source, out, part_rows=6)
    starts = (0, 6, 9, 18, 20)
    parts = [f"large.{start:08}-{stop:08}" for start, stop in itertools.pairwise(starts)]
    names = sorted(path.name.removesuffix(".emb.manifest") for path in out.glob("*.manifest"))
    assert names == [*parts, "single", "small"]
    assert embed(source, out, part_rows=6).done_before == 6
    shards = ShardedSource(source).shards
    sidecars = SourceSidecars(out, shards)
    assert sidecars.check(["caption"]).row_counts == [20, 9, 4]
    embed(source, tmp_path / "whole", part_rows=100)
    opened, whole = sidecars.open(0), SourceSidecars(tmp_path / "whole", shards).open(0)
    assert opened.lookup(captions).equal(whole.lookup(captions))
    with pytest.raises(MissingCaptionError, match="'none'"):
        opened.lookup(["none"])
    # A lost part is embedded again, alone, and meanwhile missed.
    (out / f"{parts[1]}.emb.manifest").unlink()
    with pytest.raises(MissingCaptionError, match=r"large\.parquet lacks rows 6 to 8"):
        sidecars.check(["caption"])
    calls = Counting()
    assert embed(source, out, calls, part_rows=6).done_before == 5
    assert calls.texts == list(dict.fromkeys(captions[6:9]))
    with pytest.raises(ValueError, match=r"large.00000000-00000006.* is not cut into now"):
        embed(source, out, part_rows=9)
    # What was embedded whole stays whole.
    assert embed(source, tmp_path / "whole", part_rows=6).done_before == 3


def test_verify_knows_the_parts_of_a_file(tmp_path: Path) -> None:
    write_groups(tmp_path / "large.parquet", [3, 3, 3])
    embed(CaptionSource(str(tmp_path), streaming=True), None, part_rows=3)
    assert verify.run(verify.VerifyConfig(folder=str(tmp_path))) == {"num_shards": 3, "num_captions": 9}
    (tmp_path / "large.00000003-00000006.emb.manifest").unlink()
    with flip(tmp_path / "large.parquet", 10), pytest.raises(verify.DamagedError, match="4 faults in "):
        verify.run(verify.VerifyConfig(folder=str(tmp_path)))
