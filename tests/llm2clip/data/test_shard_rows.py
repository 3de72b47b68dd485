"""Rows of files by number: those that `datasets` gives, without reading the others."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import datasets
import pytest

from llm2clip.data import CaptionSource
from llm2clip.data.formats import SourceError
from llm2clip.data.shards import ShardedSource
from tests.builders.tables import write_table


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
        ("saved", ["caption"]),
    ],
)
def test_rows_by_number_are_those_of_datasets(form: str, columns: list[str], made: Path) -> None:
    shards, image = opened(CaptionSource(str(made / form), caption_columns=columns, streaming=True))
    assert shards.num_files
    for file in range(shards.num_files):
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
