"""Rows of tars: by number without reading the others, and never fewer because a tar is damaged."""

from __future__ import annotations

import gzip
import io
import itertools
import random
import re
import tarfile
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llm2clip.data.formats import SourceError
from llm2clip.data.tars import count_tar_rows, tar_rows
from llm2clip.evaluation.benchmarks.encoded_images import list_tar
from tests.tars import write_tar

# Blocks of a file in `numbers`: its header and its content.
FILE = 2 * tarfile.BLOCKSIZE


def numbers(path: Path) -> Path:
    """A tar of five rows."""
    return write_tar(path, [(f"{row}.txt", b"%d" % row) for row in range(5)])


def read_all(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in tar_rows(str(path), ["txt"])]


def read_stream(path: Path) -> list[dict[str, Any]]:
    """From a file that can only be read from its beginning to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm2clip.data.tars._mode", lambda file: "r|*")
        return read_all(path)


READERS: list[Callable[[Path], Any]] = [read_all, read_stream, lambda path: [None] * count_tar_rows(str(path))]


# What is done to the bytes of `numbers`, and what is said of it.
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "between files": (lambda content: content[: 2 * FILE], "cut short after 1.txt: "),
    "in a file": (lambda content: content[: 3 * FILE - 100], "cut short after 2.txt: "),
    "before the end": (lambda content: content[: 5 * FILE], "cut short after 4.txt: "),
    "in the first header": (lambda content: content[:100], "cut short at its beginning: "),
    "header": (lambda content: content[: 2 * FILE] + b"x" + content[2 * FILE + 1 :], "a header is damaged"),
    "zeros": (lambda content: content[: 2 * FILE] + bytes(FILE) + content[3 * FILE :], "but more follows"),
}


@pytest.mark.parametrize("read", [*READERS, lambda path: list(list_tar(path))], ids=["rows", "pipe", "count", "list"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tar_has_no_end(read: Callable[[Path], Any], damage: str, tmp_path: Path) -> None:
    """As a page that was never written, or a tar that another one was appended to."""
    path = numbers(tmp_path / "a.tar")
    assert len(read(path)) == 5
    change, fault = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SourceError, match=rf"a\.tar .*{re.escape(fault)}") as raised:
        read(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("read", READERS)
def test_a_cut_or_damaged_compressed_tar_is_named(read: Callable[[Path], Any], tmp_path: Path) -> None:
    """Large enough that the damage lies beyond what is read at once."""
    noise = [random.Random(row).randbytes(50_000).hex().encode() for row in range(5)]
    path = write_tar(tmp_path / "a.tar.gz", [(f"{row}.txt", data) for row, data in enumerate(noise)], "w:gz")
    whole = path.read_bytes()
    middle = len(whole) // 2
    for content in (whole[:middle], whole[:middle] + bytes(64) + whole[middle + 64 :]):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=r"a\.tar\.gz .*is damaged or cut short "):
            read(path)


@pytest.mark.parametrize(("name", "content"), [("1.json", b"{half"), ("1.json.gz", gzip.compress(b"{}" * 99)[:20])])
def test_a_row_that_cannot_be_decoded_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.txt", b"a"), (name, content)])
    with pytest.raises(SourceError, match=r"the row 1 of .*a\.tar cannot be read"):
        list(tar_rows(str(path), ["txt", name[2:]]))


class Counted(io.BytesIO):
    read_bytes = 0

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        Counted.read_bytes += len(found)
        return found


def test_the_bytes_of_rows_before_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, rows = b"x" * 50_000, 20
    content = write_tar(tmp_path / "a.tar", [(f"{row}.jpg", data) for row in range(rows)]).read_bytes()
    monkeypatch.setattr("llm2clip.data.tars._opened", lambda path: Counted(content))
    found = dict(tar_rows(str(tmp_path / "a.tar"), ["jpg"], range(rows - 2, rows)))
    assert found == {number: {"jpg": data} for number in (rows - 2, rows - 1)}
    assert Counted.read_bytes < 3 * len(data)


@pytest.mark.parametrize("kind", ["pax", "gnu", "gz"])
def test_a_tar_is_entered_at_any_row(kind: str, tmp_path: Path) -> None:
    """Also where names have headers of their own."""
    path, count = tmp_path / "a.tar", 12
    form = tarfile.GNU_FORMAT if kind == "gnu" else tarfile.PAX_FORMAT
    with tarfile.open(path, "w:gz" if kind == "gz" else "w", format=form) as tar:
        for row, ending in itertools.product(range(count), ("txt", "json")):
            member = tarfile.TarInfo(f"{row:03}-{'é' * 60 * (row % 3)}.{ending}")
            content = f"{row} {ending}".encode() if ending == "txt" else b"{}"
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    expected = list(tar_rows(str(path), ["txt", "__key__"]))
    assert len(expected) == count
    for start in range(count):
        assert list(tar_rows(str(path), ["txt", "__key__"], range(start, count))) == expected[start:]


def test_a_web_server_without_ranges_is_read_from_the_beginning(tmp_path: Path) -> None:
    """More than a block of fsspec, 5 MiB."""
    write_tar(tmp_path / "a.tar", [(f"{row}.jpg", bytes([row]) * (3 << 20)) for row in range(4)])
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = tar_rows(f"http://127.0.0.1:{server.server_port}/a.tar", ["jpg"], range(2, 4))
        assert [(number, row["jpg"][:2]) for number, row in found] == [(2, b"\x02\x02"), (3, b"\x03\x03")]
        server.shutdown()
