"""The files of a source: their names, wherever the data lies, their rows by number, and their captions."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from llm2clip.data import CaptionSource, load_source
from llm2clip.data.formats import SourceError
from llm2clip.data.rows import column_texts
from llm2clip.data.shards import ShardedSource, name_shards
from tests.builders.tables import write_table
from tests.llm2clip.data.streams import write_tars


def test_names_are_relative_to_the_folder_of_the_source(tmp_path: Path) -> None:
    def names(source: str, files: list[str]) -> list[str]:
        return [shard.name for shard in name_shards(source, files)]

    files = [str(tmp_path / "a" / "0.tar"), str(tmp_path / "b" / "0.tar")]
    assert names(str(tmp_path), files) == names(str(tmp_path / "*" / "*.tar"), files) == ["a/0.tar", "b/0.tar"]
    assert names(str(tmp_path / "a" / "*.tar"), files[:1]) == names(files[0], files[:1]) == ["0.tar"]
    url, hub = "memory://bucket/data", "hf://datasets/owner/set@1"
    assert names(f"{url}/*/{{}}*.tar", [f"{url}/a/0.tar", f"{url}/b/1.tar"]) == ["a/0.tar", "b/1.tar"]
    assert names("owner/set", [f"{hub}/x/0.tar", f"{hub}/y/0.tar"]) == ["x/0.tar", "y/0.tar"]


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = len(content), 0.5  # a fraction has a header of its own
    archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_captions_of_a_tar_are_those_that_training_reads(mode: str, tmp_path: Path) -> None:
    ending = mode[1:].replace(":", ".")
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar{ending}", mode) as archive:  # type: ignore[call-overload]
            for row in range(8):
                key = f"folder/{'long' * 40 * (row == 3)}{row}"
                add(archive, f"{key}.jpg", b"no picture " * 200)
                if row != 6:
                    add(archive, f"{key}.txt", f" dog {number} {row} é".encode())
                # The first rows leave no field for a later one.
                fields = {"caption": [f"a {row}", None, ""]} if row != 7 else {"caption": ["a 7"], "other": 1}
                add(archive, f"{key}.json", json.dumps(fields).encode())
                add(archive, f"{key}.alt.txt.gz", gzip.compress(b"alt %d" % row))
                add(archive, f"{key}.unused.json.gz", gzip.compress(b"{}"))
                add(archive, f"folder/.{row}.txt", b"hidden")
            archive.addfile(tarfile.TarInfo("empty"))
    columns = ["txt", "json.caption", "alt.txt.gz"]
    source = CaptionSource(str(tmp_path / f"*.tar{ending}"), caption_columns=columns, streaming=True)
    opened, table = ShardedSource(source), load_source(source)
    assert len(opened.shards) == 2
    for shard in opened.shards:
        rows = list(table.shard(2, shard.number))
        trained = [text for row in rows for column in columns for text in column_texts(row, column)]
        captions, file = opened.read(shard)
        assert file.rows == len(rows) == 8
        assert captions == list(dict.fromkeys(trained))
        assert {f"dog {shard.number} 3 é", "a 5", "alt 2", "a 7"} <= set(captions)


@pytest.mark.parametrize("kind", ["json.gz", "parquet"])
def test_a_damaged_file_cannot_be_read(kind: str, tmp_path: Path) -> None:
    texts = [f"caption {row} {hashlib.sha256(bytes([row])).hexdigest()}" for row in range(200)]
    for path in (tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"):
        if kind == "parquet":
            write_table(path, {"txt": texts})
        else:
            path.write_bytes(gzip.compress("\n".join(json.dumps({"txt": text}) for text in texts).encode()))
    opened = ShardedSource(CaptionSource(str(tmp_path / f"*.{kind}"), caption_columns=["txt"], streaming=True))
    whole = path.read_bytes()
    middle = len(whole) // 2
    for content in (whole[:middle], whole[:middle] + bytes(64) + whole[middle + 64 :]):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=rf"b\.{kind}"):
            opened.read(opened.shards[1])
    path.write_bytes(whole)
    assert opened.read(opened.shards[1])[1].rows == 200


def test_other_sources_are_refused(tmp_path: Path) -> None:
    streamed = write_tars(tmp_path, 2)
    for source in (replace(streamed, streaming=False), replace(streamed, max_samples=1)):
        with pytest.raises(SourceError, match=r"set streaming: true|leave max_samples unset"):
            _ = ShardedSource(source).shards
    with pytest.raises(SourceError, match="has no column 'text'"):
        ShardedSource(replace(streamed, caption_columns=["text"]))


@pytest.mark.parametrize("form", ["saved", "imagefolder"])
def test_what_is_no_list_of_files_is_not_streamed(form: str, made: Path) -> None:
    with pytest.raises(SourceError, match="leave streaming unset"):
        ShardedSource(CaptionSource(str(made / form), streaming=True))


def opened(source: CaptionSource) -> tuple[ShardedSource, str | None]:
    files = ShardedSource(source, with_images=True)
    return files, files.columns.image


def plain(rows: Any, image: str | None) -> list[tuple[int, dict[str, Any]]]:
    """Rows with images as bytes."""
    found = []
    for number, row in rows:
        value = row[str(image)]
        content = value["bytes"] or Path(value["path"]).read_bytes() if isinstance(value, dict) else value
        found.append((number, {**row, str(image): content}))
    return found


@pytest.mark.parametrize(
    ("form", "columns"),
    [
        ("webdataset", ["json.caption", "json.nested.long"]),
        ("bytes.parquet", ["caption"]),
        ("csv/data.jsonl", ["caption"]),
    ],
)
def test_rows_by_number_are_those_of_datasets(form: str, columns: list[str], made: Path) -> None:
    shards, image = opened(CaptionSource(str(made / form), caption_columns=columns, streaming=True))
    for file in range(len(shards.files)):
        every = plain(shards.all_rows(file), image)
        assert every
        assert plain(shards.rows(file), image) == every
        assert plain(shards.rows(file, range(len(every) - 1, len(every))), image) == every[-1:]
        with pytest.raises(SourceError, match=f"has no row {len(every)}: it has"):
            list(shards.rows(file, range(len(every) + 1)))


def test_parquet_with_paths_and_row_groups(tmp_path: Path, made: Path) -> None:
    table = datasets.Dataset.from_parquet(str(made / "bytes.parquet"))
    table.to_parquet(tmp_path / "groups.parquet", batch_size=4)
    shards, image = opened(CaptionSource(str(tmp_path / "groups.parquet"), streaming=True))
    every = plain(shards.all_rows(0), image)
    for start, stop in itertools.combinations_with_replacement(range(len(every) + 1), 2):
        assert plain(shards.rows(0, range(start, stop)), image) == every[start:stop]
    path = write_table(tmp_path / "pictures" / "paths.parquet", {"image": ["0.png"], "caption": ["a"]})
    shards, _ = opened(CaptionSource(path, streaming=True))
    assert list(shards.rows(0, [0])) == [(0, {"image": str(tmp_path / "pictures" / "0.png"), "caption": "a"})]
