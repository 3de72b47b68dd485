"""Rows of webdataset tars: all of them, or some by number, without reading the others."""

from __future__ import annotations

import functools
import io
import os
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from lzma import LZMAError
from typing import IO, Any, NamedTuple, Protocol, cast

import numpy as np
from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

from llm2clip.data.opened_table import SourceError, file_format
from llm2clip.data.tars import UNEXPECTED_END, open_tar, tar_fault
from llm2clip.utils.remote_path import open_once

# What reading a damaged tar raises.
DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError)


class Readable(Protocol):
    """A file that is read from its beginning to its end."""

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes."""


def tar_rows(path: str, file: Readable, columns: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield all rows of a webdataset tar, of any compression that `tarfile` knows.

    They are those that `datasets` makes of it, with `columns` alone; one that a row lacks is None.

    Args:
        path: Path or URL, for messages and the column `__url__`.
        file: The open tar, which is read from its beginning.

    Raises:
        SourceError: It is not a tar, is damaged or cut short, or a value is not of the form of its column.
    """
    for row in _grouped(path, file, "r|*", columns, lambda number: True):
        yield _decoded(path, row, columns)


def numbered_tar_rows(
    path: str, columns: Collection[str], wanted: Iterable[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows of [`tar_rows`] with their numbers; of a local file, the bytes of the others are not even read.

    The headers of a plain local file are read once, for the places of its rows.

    Args:
        path: Path or URL.
        columns: The columns to read.
        wanted: Numbers of the rows, in ascending order.

    Raises:
        SourceError: See [`tar_rows`], or it has fewer rows.
    """
    numbers = iter(wanted)
    number = next(numbers, None)
    if number is None:
        return
    first = start = 0
    if number and "://" not in path:
        state = os.stat(path)
        places = _row_places(path, state.st_size, state.st_mtime_ns)
        if places is not None and number < len(places):
            first, start = number, int(places[number])
    with _opened(path) as file:
        mode = _mode(file)
        if start:
            file.seek(start)
            mode = "r:"
        rows = _grouped(path, file, mode, columns, lambda row: row + first == number)
        for row, found in enumerate(rows, first):
            if row == number:
                yield row, _decoded(path, found, columns)
                if (number := next(numbers, None)) is None:
                    return
    raise SourceError(f"{path} has no row {number}: it has fewer rows than were counted. Was it replaced?")


@functools.lru_cache(maxsize=256)
def _row_places(path: str, size: int, time: int) -> np.ndarray | None:
    """Return the first byte of each row of a local tar, (rows,) int64; None if it cannot be entered there.

    Args:
        size, time: Of the file, which may be replaced.
    """
    try:
        with _opened(path) as file:
            return np.array([row.place for row in _grouped(path, file, "r:", (), lambda number: False, alone=True)])
    except SourceError:  # it is compressed, or reading it says what is wrong
        return None


def count_tar_rows(path: str) -> int:
    """Count the rows of a webdataset tar, from the headers of its members.

    Raises:
        SourceError: It is not a tar, or is damaged or cut short.
    """
    with _opened(path) as file:
        return sum(1 for _ in _grouped(path, file, _mode(file), (), lambda row: False))


def refuse_damaged_tars(files: Iterable[str]) -> None:
    """Read the headers of local webdataset tars, of which `datasets` takes what comes before a damage for the whole.

    Raises:
        SourceError: A tar is damaged or cut short; the message names it.
    """
    for file in files:
        if "://" not in file and file_format(file) == ".tar":
            count_tar_rows(file)


def _opened(path: str) -> Any:
    return open_once(path) if "://" in path else open(path, "rb")


def _mode(file: IO[bytes]) -> str:
    """Return the mode of `tarfile` for a file that can be read from any place, or for another one.

    The answer of a web server cannot, whatever it says.
    """
    try:
        return "r:*" if file.seek(1) and file.seek(0) == 0 else "r|*"
    except (OSError, ValueError):
        return "r|*"


class _Row(NamedTuple):
    """The key of a row, its first byte in the tar, and names and contents of its members, if it is wanted."""

    key: str
    place: int
    members: list[tuple[str, bytes]]


def _grouped(
    path: str,
    file: Readable,
    mode: str,
    columns: Collection[str],
    is_wanted: Callable[[int], bool],
    alone: bool = False,
) -> Iterator[_Row]:
    """Yield the rows of a tar; `members` are those in `columns`.

    Args:
        alone: Raise SourceError if members have headers that stand before other members.
    """
    row, current, last = -1, None, None
    try:
        with open_tar(file, mode) as archive:
            while (member := archive.next()) is not None:
                # Otherwise tarfile keeps all of them.
                cast(Any, archive).members.clear()
                last = member.name
                if not member.isreg() or posixpath.basename(member.name).startswith((".", "__")):
                    continue
                found, field = base_plus_ext(member.name)
                if found is None:
                    continue
                if current is None or found != current.key:
                    if current is not None:
                        yield current
                    row, current = row + 1, _Row(found, member.offset, [])
                if field in columns and is_wanted(row):
                    current.members.append((member.name, _content(archive, member)))
            if alone and archive.pax_headers:
                raise tarfile.ReadError("it has headers for all members")
    except DAMAGED as error:
        raise tar_fault(path, "a tar", last, error) from error
    if current is not None:
        yield current


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.issparse():
        return cast(IO[bytes], archive.extractfile(member)).read()
    # Of a plain file this takes a third of the time.
    file = cast(Any, archive).fileobj
    file.seek(member.offset_data)
    content = cast(bytes, file.read(member.size))
    if len(content) < member.size:
        raise tarfile.ReadError(UNEXPECTED_END)
    return content


def _decoded(path: str, row: _Row, columns: Collection[str]) -> dict[str, Any]:
    files = [(name, io.BytesIO(content)) for name, content in row.members]
    try:
        example: dict[str, Any] = next(iter(WebDataset._get_pipeline_from_tar(path, iter(files))), {})
    except (ValueError, *DAMAGED) as error:  # JSON that is none, damaged compression, two members of one name
        raise SourceError(f"the row {row.key} of {path} cannot be read: {error or type(error).__name__}") from error
    example |= {"__key__": row.key, "__url__": path}
    return {column: example.get(column) for column in columns}
