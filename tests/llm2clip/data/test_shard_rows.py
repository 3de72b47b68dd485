"""Rows of files by number: those that `datasets` gives, without reading the others."""

from __future__ import annotations

import io
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest

from llm2clip.data import CaptionSource, StreamingCaptionImageDataset
from llm2clip.data.numbered_tar_rows import numbered_tar_rows
from llm2clip.data.shard_rows import ShardRows, can_count, count_rows
from llm2clip.data.sources import SourceError, open_source, select_source, source_columns, used_columns
from tests.llm2clip.data.conftest import ROWS


def opened(source: CaptionSource) -> tuple[ShardRows, str | None]:
    table = open_source(source)
    columns = source_columns(source, table.table)
    return ShardRows(select_source(source, table), used_columns(columns, table.table), table.files), columns.image


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
    for file in range(shards.num_files):
        every = plain(shards.read_all(file), image)
        assert plain(shards.read(file, range(len(every))), image) == every
        assert plain(shards.read(file, iter([len(every) - 1])), image) == every[-1:]
        with pytest.raises(SourceError, match=f"has no row {len(every)}: it has"):
            list(shards.read(file, [0, len(every)]))


def test_parquet_with_paths_and_row_groups(tmp_path: Path, made: Path) -> None:
    table = datasets.Dataset.from_parquet(str(made / "bytes.parquet"))
    table.to_parquet(tmp_path / "groups.parquet", batch_size=4)
    shards, image = opened(CaptionSource(str(tmp_path / "groups.parquet"), streaming=True))
    every = plain(shards.read_all(0), image)
    assert plain(shards.read(0, [1, 3, 4, 5]), image) == [every[row] for row in (1, 3, 4, 5)]
    (tmp_path / "pictures").mkdir()
    paths = {"image": ["0.png"], "caption": ["a"]}
    datasets.Dataset.from_dict(paths).to_parquet(tmp_path / "pictures" / "paths.parquet")
    shards, _ = opened(CaptionSource(str(tmp_path / "pictures" / "paths.parquet"), streaming=True))
    assert list(shards.read(0, [0])) == [(0, {"image": str(tmp_path / "pictures" / "0.png"), "caption": "a"})]


def test_rows_are_counted_without_reading_them(made: Path, tmp_path: Path) -> None:
    counted = [made / "bytes.parquet", made / "webdataset" / "00000.tar"]
    assert [count_rows(str(path)) for path in counted] == [ROWS, ROWS // 2]
    others = [str(made / "csv" / "data.csv"), "memory://a.tar", str(tmp_path / "a.tar.gz")]
    assert not any(map(can_count, others))


class Counted(io.BytesIO):
    """A file that knows how many bytes were read of it."""

    read_bytes = 0

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        Counted.read_bytes += len(found)
        return found


def test_the_bytes_of_rows_before_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, rows = b"x" * 50_000, 20
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for row in range(rows):
            entry = tarfile.TarInfo(f"{row}.jpg")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    content = (tmp_path / "a.tar").read_bytes()
    monkeypatch.setattr("llm2clip.data.numbered_tar_rows._opened", lambda path: Counted(content))
    found = dict(numbered_tar_rows("a.tar", ["jpg"], [rows - 2, rows - 1]))
    assert found == {number: {"jpg": data} for number in (rows - 2, rows - 1)}
    assert Counted.read_bytes < 3 * len(data)


def test_tars_that_are_no_tars_or_cut_short_are_named(tmp_path: Path, made: Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(SourceError, match=r"no\.tar is not a tar, or is damaged at its beginning"):
        list(numbered_tar_rows(str(tmp_path / "no.tar"), ["json"], [0]))
    path = made / "webdataset" / "00000.tar"
    with tarfile.open(path) as archive:
        member = archive.getmembers()[-2]
    for end, fault in (
        (member.offset_data + 5, "is not a tar, or is damaged after"),
        (member.offset + 5, "has no row 2"),
    ):
        (tmp_path / "cut.tar").write_bytes(path.read_bytes()[:end])
        with pytest.raises(SourceError, match=rf"cut\.tar {fault}"):
            list(numbered_tar_rows(str(tmp_path / "cut.tar"), ["png", "json"], range(3)))


def test_remote_tars_are_read(made: Path) -> None:
    path = made / "webdataset" / "00001.tar"
    with fsspec.open("memory://remote/00001.tar", "wb") as file:
        file.write(path.read_bytes())
    expected = list(numbered_tar_rows(str(path), ["json", "png", "__key__"], [1, 2]))
    assert list(numbered_tar_rows("memory://remote/00001.tar", ["json", "png", "__key__"], [1, 2])) == expected


def test_a_web_server_without_ranges_is_read_from_the_beginning(tmp_path: Path) -> None:
    """More than a block of fsspec, 5 MiB."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for row in range(4):
            entry = tarfile.TarInfo(f"{row}.jpg")
            entry.size = 3 << 20
            archive.addfile(entry, io.BytesIO(bytes([row]) * entry.size))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = numbered_tar_rows(f"http://127.0.0.1:{server.server_port}/a.tar", ["jpg"], [1, 3])
        assert [(number, row["jpg"][:2]) for number, row in found] == [(1, b"\x01\x01"), (3, b"\x03\x03")]
        server.shutdown()


def test_numbers_are_texts_where_the_first_rows_have_texts(tmp_path: Path) -> None:
    """As `embed` reads them."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for row, caption in enumerate(['"a"', '"b"', '"c"', '"d"', '"e"', "7"]):
            data = f'{{"caption": {caption}}}'.encode()
            entry = tarfile.TarInfo(f"{row}.json")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    source = CaptionSource(str(tmp_path), caption_columns=["json.caption"], streaming=True)
    stream = StreamingCaptionImageDataset(source, None, training=False, row_counts=[6])
    assert [sample["caption"] for sample in stream] == ["a", "b", "c", "d", "e", "7"]
