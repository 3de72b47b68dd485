"""Tars that are whole: one that is cut short or damaged is not read to a false end."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llm2clip.data.opened_table import SourceError
from llm2clip.utils.files import READ_SIZE

# What tarfile says where a file in a tar is cut.
UNEXPECTED_END = "unexpected end of data"


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


class CutShortError(tarfile.ReadError):
    """A tar ends without the block of zeros that marks its end."""


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
            raise CutShortError("it ends without the mark of its end") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a header is damaged ({error})") from error


def open_tar(file: Any, mode: str) -> tarfile.TarFile:
    """Open a tar for reading. Iteration raises `tarfile.ReadError` where it is cut short, or a header is damaged.

    Args:
        file: The open file.
        mode: See `tarfile.open`.
    """
    return tarfile.open(fileobj=file, mode=mode, tarinfo=_Entry)  # type: ignore[call-overload]


def tar_fault(path: str | Path, kind: str, last: str | None, error: Exception) -> SourceError:
    """Return the error of a tar that cannot be read to its end.

    Args:
        kind: What it should be, in words.
        last: The last member that was found, if any.
        error: What reading it raised.
    """
    # Where it tries several compressions, tarfile has a line for each.
    reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
    if last is None:
        return SourceError(f"{path} is not {kind}, or is damaged at its beginning: {reason}.")
    if isinstance(error, (CutShortError, EOFError)):
        return SourceError(f"{path} is cut short after {last}.")
    if reason == UNEXPECTED_END:
        return SourceError(f"{path} is cut short in {last}.")
    fault = "cannot be read" if isinstance(error, OSError) else "is damaged"
    return SourceError(f"{path} {fault} after {last}: {reason}.")


def list_tar(path: Path) -> Iterator[tuple[str, FilePart]]:
    """List the files of an uncompressed tar in their order: names, and where their bytes are.

    Raises:
        SourceError: It is not an uncompressed tar, is damaged or cut short.
    """
    last = None
    try:
        with path.open("rb") as file, open_tar(file, "r:") as archive:
            for member in archive:
                last = member.name
                if member.isfile():
                    yield member.name, FilePart(path, member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise tar_fault(path, "an uncompressed tar", last, error) from error
