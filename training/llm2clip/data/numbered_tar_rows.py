"""Rows of webdataset tars by number: what is passed over is not read, of a local file not even its bytes."""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Collection, Iterable, Iterator
from typing import IO, Any, cast

from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

from llm2clip.data.sources import SourceError
from llm2clip.utils.remote_path import open_once


def numbered_tar_rows(
    path: str, columns: Collection[str], wanted: Iterable[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows of a webdataset tar with their numbers, whose values are those of its members.

    Args:
        path: Path or URL.
        columns: The columns to read; one that a row lacks is None.
        wanted: Numbers of the rows, in ascending order.

    Raises:
        SourceError: It is not a tar, is damaged, or has fewer rows.
    """
    numbers = iter(wanted)
    number = next(numbers, None)
    if number is None:
        return
    with _opened(path) as file:
        for row, (key, members) in enumerate(_grouped(path, file, columns, lambda row: row == number)):
            if row == number:
                yield row, _decoded(path, key, members, columns)
                if (number := next(numbers, None)) is None:
                    return
    raise SourceError(f"{path} has no row {number}: it has fewer rows than were counted. Was it replaced?")


def count_tar_rows(path: str) -> int:
    """Count the rows of a webdataset tar, from the headers of its members.

    Raises:
        SourceError: It is not a tar, or is damaged.
    """
    with _opened(path) as file:
        return sum(1 for _ in _grouped(path, file, (), lambda row: False))


def _opened(path: str) -> Any:
    return open_once(path) if "://" in path else open(path, "rb")


def _grouped(
    path: str, file: IO[bytes], columns: Collection[str], is_wanted: Any
) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Yield the key of each row and, of wanted rows, the names and contents of its members in `columns`."""
    row, key, members = -1, None, list[tuple[str, bytes]]()
    try:
        with tarfile.open(fileobj=file, mode="r:*" if _seeks(file) else "r|*") as archive:
            while (member := archive.next()) is not None:
                # Otherwise tarfile keeps all of them.
                cast(Any, archive).members.clear()
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
    except (tarfile.TarError, EOFError, OSError) as error:
        after = "at its beginning" if key is None else f"after {key}"
        raise SourceError(f"{path} is not a tar, or is damaged {after}: {type(error).__name__}: {error}") from error
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
        raise tarfile.ReadError("unexpected end of data")
    return content


def _seeks(file: IO[bytes]) -> bool:
    """Tell whether a file can be read from any place, which the answer of a web server cannot, whatever it says."""
    try:
        return bool(file.seek(1)) and file.seek(0) == 0
    except (OSError, ValueError):
        return False


def _decoded(path: str, key: str, members: list[tuple[str, bytes]], columns: Collection[str]) -> dict[str, Any]:
    files = [(name, io.BytesIO(content)) for name, content in members]
    example: dict[str, Any] = next(iter(WebDataset._get_pipeline_from_tar(path, iter(files))), {})
    example |= {"__key__": key, "__url__": path}
    return {column: example.get(column) for column in columns}
