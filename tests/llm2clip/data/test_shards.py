"""The shards of a source: their names, wherever the data lies, and their captions."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.data import CaptionSource
from llm2clip.data.shards import ShardedSource, name_shards
from llm2clip.data.sources import SourceError
from tests.llm2clip.data.test_streams import PER_TAR, write_tars


def names(source: str, files: list[str]) -> list[str]:
    return [shard.name for shard in name_shards(source, files)]


def test_names_are_relative_to_the_folder_of_the_source(tmp_path: Path) -> None:
    files = [str(tmp_path / "a" / "0.tar"), str(tmp_path / "b" / "0.tar")]
    assert names(str(tmp_path), files) == ["a/0.tar", "b/0.tar"]
    assert names(str(tmp_path / "*" / "*.tar"), files) == ["a/0.tar", "b/0.tar"]
    assert names(str(tmp_path / "a" / "*.tar"), files[:1]) == ["0.tar"]
    assert names(files[0], files[:1]) == ["0.tar"]
    url = "memory://bucket/data"
    assert names(f"{url}/*/{{}}*.tar", [f"{url}/a/0.tar", f"{url}/b/1.tar"]) == ["a/0.tar", "b/1.tar"]
    assert names("owner/set", ["hf://datasets/owner/set@1/x/0.tar", "hf://datasets/owner/set@1/y/0.tar"]) == [
        "x/0.tar",
        "y/0.tar",
    ]


def test_each_shard_has_the_captions_of_its_file(tmp_path: Path) -> None:
    opened = ShardedSource(write_tars(tmp_path, 3))
    assert [shard.name for shard in opened.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    for shard in reversed(opened.shards):
        rows = [captions for batch in opened.captions(shard) for captions in batch]
        assert rows == [[f"caption {shard.number} {row}"] for row in range(PER_TAR)]
    assert ShardedSource(write_tars(tmp_path / "one", 1)).shards[0].name == "00000.tar"


def test_other_sources_are_refused(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", 2)
    path = str(tmp_path / "tars")
    for source in (
        CaptionSource(path, caption_columns=["txt"]),
        CaptionSource(path, caption_columns=["txt"], streaming=True, max_samples=1),
    ):
        with pytest.raises(SourceError, match="set streaming: true, and leave max_samples unset"):
            ShardedSource(source)
    with pytest.raises(SourceError, match="has no column 'text'"):
        ShardedSource(CaptionSource(path, caption_columns=["text"], streaming=True))
