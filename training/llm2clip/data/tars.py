"""Rows of webdataset tars from any row on; never fewer because a tar is cut or damaged."""

from __future__ import annotations

import functools
import io
import itertools
import os
import posixpath
import tarfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import fsspec
import numpy as np
from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

from llm2clip.data.formats import SourceError, file_format
from llm2clip.files.remote_path import protocols
from llm2clip.files.shared_files import shared_file

READ_SIZE = 1 << 22  # bytes
# What reading a damaged tar raises.
DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError)


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


def open_tar(file: Any, mode: str) -> tarfile.TarFile:
    """Open a tar, of which a damaged or missing header is an error; see `tarfile.open` for the mode."""
    return tarfile.open(fileobj=file, mode=mode, tarinfo=_Entry)  # type: ignore[call-overload]


def tar_fault(path: str | Path, kind: str, last: str | None, error: Exception) -> SourceError:
    """Return the error of a tar that cannot be read to its end; `last` is the last member that was found."""
    # Where it tries several compressions, tarfile has a line for each.
    reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
    where = "at its beginning" if last is None else f"after {last}"
    return SourceError(f"{path} is not {kind}, or is damaged or cut short {where}: {reason}.")


def tar_rows(
    path: str, columns: Collection[str], rows: Iterable[int] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows of a webdataset tar, of any compression that `tarfile` knows, with their numbers.

    They are those that `datasets` makes of it, with `columns` alone; one that a row lacks is None. Of other rows, the
    bytes are not read where the file can be entered anywhere: of a local tar, its headers are read once for that.

    Args:
        path: Path or URL.
        columns: The columns to read.
        rows: Numbers of the rows, ascending; the next one is asked for when the one before has been used. By default
            all rows.

    Raises:
        SourceError: It is not a tar, is damaged or cut short, has fewer rows, or a value is not of the form of its
            column.
    """
    numbers = None if rows is None else iter(rows)
    first = 0 if numbers is None else next(numbers, None)
    if first is None:
        return
    if numbers is not None:
        numbers = itertools.chain([first], numbers)
    offsets = row_offsets(path) if first and "://" not in path else None
    with _opened(path) as file:
        for number, row in _grouped(path, file, columns, numbers, offsets):
            yield number, _decoded(path, row, columns)


def fewer_rows(path: str, stop: int) -> SourceError:
    """Return the error of a file that ends before row `stop`."""
    return SourceError(f"{path} has no row {stop - 1}: it has fewer rows than were counted. Was it replaced?")


def row_offsets(path: str) -> np.ndarray | None:
    """Return the first byte of each row of a local tar, (rows,) int64; None if it cannot be entered there.

    Its headers are read once on this machine, as long as the file stays as it is.
    """
    state = os.stat(path)
    times = state.st_mtime_ns, state.st_ctime_ns
    return _row_offsets(os.path.abspath(path), state.st_size, state.st_ino, *times)


@functools.lru_cache(maxsize=256)
def _row_offsets(path: str, *state: int) -> np.ndarray | None:
    def write(offsets: Path) -> None:
        with _opened(path) as file, offsets.open("wb") as written:
            np.save(written, np.array([row.offset for _, row in _grouped(path, file, (), mode="r:")], dtype=np.int64))

    try:
        return cast(np.ndarray, np.load(shared_file("tar-rows", {"path": path, "state": state}, write)))
    except SourceError:  # it is compressed, or reading it says what is wrong
        return None


def count_tar_rows(path: str) -> int:
    """Count the rows of a webdataset tar, from the headers of its members.

    Raises:
        SourceError: It is not a tar, or is damaged or cut short.
    """
    with _opened(path) as file:
        return sum(1 for _ in _grouped(path, file, ()))


def refuse_damaged_tars(files: Iterable[str]) -> None:
    """Read the headers of local webdataset tars, of which `datasets` takes what comes before a damage for the whole.

    Raises:
        SourceError: A tar is damaged or cut short; the message names it.
    """
    for file in files:
        if "://" not in file and file_format(file) == ".tar":
            count_tar_rows(file)


def skip_empty_tars(files: list[str]) -> list[str]:
    """Return webdataset tars from the first one that has rows on: `datasets` takes the columns from the first tar.

    Raises:
        SourceError: None has rows, or one is damaged.
    """
    for number, file in enumerate(files):
        if next(tar_rows(file, ()), None) is not None:
            return files[number:]
    raise SourceError(f"{', '.join(files[:3])}{' and so on' if files[3:] else ''}: no tar of the data has a row.")


def _opened(path: str) -> Any:
    """Open a local or remote file for one reading from its beginning to its end."""
    if "://" not in path:
        return open(path, "rb")
    files, name = fsspec.core.url_to_fs(path)
    # These then stream one answer instead of asking for each block.
    streamed = {"block_size": 0} if {"http", "https", "hf"} & set(protocols(files)) else {}
    return files.open(name, "rb", **streamed)


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


def _grouped(
    path: str,
    file: IO[bytes],
    columns: Collection[str],
    rows: Iterator[int] | None = None,
    offsets: np.ndarray | None = None,
    mode: str = "",
) -> Iterator[tuple[int, _Row]]:
    """Yield `rows` of a tar, by default all, with their numbers; `members` are those in `columns`.

    Args:
        offsets: Where the rows begin, if the tar can be entered there.
        mode: Of `tarfile`, by default what the file allows.
    """
    every = itertools.count() if rows is None else rows
    wanted = next(every, None)
    number, current, last = -1, None, None
    mode = mode or ("r:" if offsets is not None else _mode(file))
    if offsets is not None and wanted and wanted < len(offsets):
        file.seek(int(offsets[wanted]))
        number = wanted - 1
    try:
        with open_tar(file, mode) as opened:
            archive = cast(Any, opened)
            while wanted is not None and (member := archive.next()) is not None:
                # Otherwise tarfile keeps all of them.
                archive.members.clear()
                last = member.name
                if not member.isreg() or posixpath.basename(member.name).startswith((".", "__")):
                    continue
                key, field = base_plus_ext(member.name)
                if key is None:
                    continue
                if current is None or key != current.key:
                    if current is not None and number == wanted:
                        yield number, current
                        if (wanted := next(every, None)) is None:
                            return
                    number, current = number + 1, _Row(key, member.offset, [])
                    if offsets is not None and number < wanted < len(offsets):
                        archive.offset, number, current = int(offsets[wanted]), wanted - 1, None
                        continue
                if field in columns and number == wanted:
                    current.members.append((member.name, _content(archive, member)))
    except DAMAGED as error:
        raise tar_fault(path, "a tar", last, error) from error
    if current is not None and number == wanted:
        yield number, current
        wanted = next(every, None)
    if rows is not None and wanted is not None:
        raise fewer_rows(path, wanted + 1)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.issparse():
        return cast(IO[bytes], archive.extractfile(member)).read()
    # For a plain file, this takes a third of the time.
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
