"""Rows of webdataset tars: all of them, or some by number, without reading the others."""

from __future__ import annotations

import io
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from lzma import LZMAError
from typing import IO, Any, Protocol, cast

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
    for key, members in _grouped(path, file, "r|*", columns, lambda row: True):
        yield _decoded(path, key, members, columns)


def numbered_tar_rows(
    path: str, columns: Collection[str], wanted: Iterable[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows of [`tar_rows`] with their numbers; of a local file, the bytes of the others are not even read.

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
    with _opened(path) as file:
        for row, (key, members) in enumerate(_grouped(path, file, _mode(file), columns, lambda row: row == number)):
            if row == number:
                yield row, _decoded(path, key, members, columns)
                if (number := next(numbers, None)) is None:
                    return
    raise SourceError(f"{path} has no row {number}: it has fewer rows than were counted. Was it replaced?")


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


def _grouped(
    path: str, file: Readable, mode: str, columns: Collection[str], is_wanted: Callable[[int], bool]
) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Yield the key of each row and, of wanted rows, the names and contents of its members in `columns`."""
    row, key, last, members = -1, None, None, list[tuple[str, bytes]]()
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
                if found != key:
                    if key is not None:
                        yield key, members
                    row, key, members = row + 1, found, []
                if field in columns and is_wanted(row):
                    members.append((member.name, _content(archive, member)))
    except DAMAGED as error:
        raise tar_fault(path, "a tar", last, error) from error
    if key is not None:
        yield key, members


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


def _decoded(path: str, key: str, members: list[tuple[str, bytes]], columns: Collection[str]) -> dict[str, Any]:
    files = [(name, io.BytesIO(content)) for name, content in members]
    try:
        example: dict[str, Any] = next(iter(WebDataset._get_pipeline_from_tar(path, iter(files))), {})
    except (ValueError, *DAMAGED) as error:  # JSON that is none, damaged compression, two members of one name
        raise SourceError(f"the row {key} of {path} cannot be read: {error or type(error).__name__}") from error
    example |= {"__key__": key, "__url__": path}
    return {column: example.get(column) for column in columns}
