"""Tars: their files, and the rows of webdataset tars from any row on; never fewer because a tar is cut or damaged."""

from __future__ import annotations

import functools
import io
import os
import posixpath
import tarfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

from llm2clip.data.formats import SourceError, file_format
from llm2clip.utils.files import READ_SIZE
from llm2clip.utils.remote_path import open_once

# What reading a damaged tar raises.
DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError)


class FilePart(NamedTuple):
    """A file within an uncompressed archive.

    Attributes:
        path: The archive.
        start, size: Its bytes in it.
    """

    path: Path
    start: int
    size: int

    def read(self) -> bytes:
        """Read it.

        Raises:
            SourceError: The archive is shorter than it was when it was listed.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            content = file.read(self.size)
        if len(content) != self.size:
            raise SourceError(f"{self.path} ends before byte {self.start + self.size:,}.")
        return content


class _Entry(tarfile.TarInfo):
    """An entry of a tar. Only zeros are its end: `tarfile` takes a damaged or missing header for it too."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> Any:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            while block := archive.fileobj.read(READ_SIZE):
                if any(block):
                    raise tarfile.ReadError("a block of zeros ends it, but more follows") from None
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it ends without the mark of its end") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a header is damaged ({error})") from error


def _open_tar(file: Any, mode: str) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode=mode, tarinfo=_Entry)  # type: ignore[call-overload]


def _fault(path: str | Path, kind: str, last: str | None, error: Exception) -> SourceError:
    """Return the error of a tar that cannot be read to its end; `last` is the last member that was found."""
    # Where it tries several compressions, tarfile has a line for each.
    reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
    where = "at its beginning" if last is None else f"after {last}"
    return SourceError(f"{path} is not {kind}, or is damaged or cut short {where}: {reason}.")


def list_tar(path: Path) -> Iterator[tuple[str, FilePart]]:
    """List the files of an uncompressed tar in their order: names, and where their bytes are.

    Raises:
        SourceError: It is not an uncompressed tar, is damaged or cut short.
    """
    last = None
    try:
        with path.open("rb") as file, _open_tar(file, "r:") as archive:
            for member in archive:
                last = member.name
                if member.isfile():
                    yield member.name, FilePart(path, member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise _fault(path, "an uncompressed tar", last, error) from error


def tar_rows(
    path: str, columns: Collection[str], start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows of a webdataset tar, of any compression that `tarfile` knows, with their numbers.

    They are those that `datasets` makes of it, with `columns` alone; one that a row lacks is None. Of a local file,
    the bytes of the rows before are not even read: its headers are read once, for the offsets of its rows.

    Args:
        path: Path or URL.
        columns: The columns to read.
        start, stop: The first row, and the one after the last; by default all rows.

    Raises:
        SourceError: It is not a tar, is damaged or cut short, has fewer rows, or a value is not of the form of its
            column.
    """
    first = offset = 0
    if start and "://" not in path:
        state = os.stat(path)
        offsets = _row_offsets(path, state.st_size, state.st_mtime_ns)
        if offsets is not None and start < len(offsets):
            first, offset = start, int(offsets[start])
    with _opened(path) as file:
        mode = _mode(file)
        if offset:
            file.seek(offset)
            mode = "r:"
        for number, row in enumerate(_grouped(path, file, mode, columns, start - first), first):
            if number >= start:
                yield number, _decoded(path, row, columns)
            if number + 1 == stop:
                return
    if stop is not None:
        raise fewer_rows(path, stop)


def fewer_rows(path: str, stop: int) -> SourceError:
    """Return the error of a file that ends before row `stop`."""
    return SourceError(f"{path} has no row {stop - 1}: it has fewer rows than were counted. Was it replaced?")


@functools.lru_cache(maxsize=256)
def _row_offsets(path: str, size: int, time: int) -> np.ndarray | None:
    """Return the first byte of each row of a local tar, (rows,) int64; None if it cannot be entered there.

    Args:
        size, time: Of the file, which may be replaced.
    """
    try:
        with _opened(path) as file:
            return np.array([row.offset for row in _grouped(path, file, "r:", ())])
    except SourceError:  # it is compressed, or reading it says what is wrong
        return None


def count_tar_rows(path: str) -> int:
    """Count the rows of a webdataset tar, from the headers of its members.

    Raises:
        SourceError: It is not a tar, or is damaged or cut short.
    """
    with _opened(path) as file:
        return sum(1 for _ in _grouped(path, file, _mode(file), ()))


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
    """The key of a row, its first byte in the tar, and names and contents of its members."""

    key: str
    offset: int
    members: list[tuple[str, bytes]]


def _grouped(path: str, file: IO[bytes], mode: str, columns: Collection[str], unread: int = 0) -> Iterator[_Row]:
    """Yield the rows of a tar; `members` are those in `columns`, none of the first `unread` rows."""
    row, current, last = -1, None, None
    try:
        with _open_tar(file, mode) as archive:
            while (member := archive.next()) is not None:
                # Otherwise tarfile keeps all of them.
                cast(Any, archive).members.clear()
                last = member.name
                if not member.isreg() or posixpath.basename(member.name).startswith((".", "__")):
                    continue
                key, field = base_plus_ext(member.name)
                if key is None:
                    continue
                if current is None or key != current.key:
                    if current is not None:
                        yield current
                    row, current = row + 1, _Row(key, member.offset, [])
                if field in columns and row >= unread:
                    current.members.append((member.name, _content(archive, member)))
    except DAMAGED as error:
        raise _fault(path, "a tar", last, error) from error
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
        raise tarfile.ReadError("unexpected end of data")
    return content


def _decoded(path: str, row: _Row, columns: Collection[str]) -> dict[str, Any]:
    files = [(name, io.BytesIO(content)) for name, content in row.members]
    try:
        example: dict[str, Any] = next(iter(WebDataset._get_pipeline_from_tar(path, iter(files))), {})
    except (ValueError, *DAMAGED) as error:  # JSON that is none, damaged compression, two members of one name
        raise SourceError(f"the row {row.key} of {path} cannot be read: {error or type(error).__name__}") from error
    example |= {"__key__": row.key, "__url__": path}
    return {column: example.get(column) for column in columns}
