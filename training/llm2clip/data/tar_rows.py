"""The rows of a webdataset tar, read once: without its images, and with the checksum of its bytes."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Collection, Iterator
from typing import IO, Any, Protocol

from datasets.filesystems import EXTENSION_TO_COMPRESSION_FS_FILE_CLS
from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

from llm2clip.data.sources import SourceError
from llm2clip.utils.files import READ_SIZE


class HashedReader:
    """Reads a file to its end, and computes the SHA-256 of its bytes.

    Attributes:
        size: Number of bytes that were read.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes."""
        block = self._file.read(size)
        self._digest.update(block)
        self.size += len(block)
        return block

    def checksum(self) -> str:
        """Read the rest, and return the SHA-256 of the file in hexadecimal digits."""
        while self.read(READ_SIZE):
            pass
        return self._digest.hexdigest()


class _Readable(Protocol):
    def read(self, size: int) -> bytes: ...


def tar_rows(path: str, file: _Readable, columns: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a webdataset tar, of any compression that `tarfile` knows.

    They are those that `datasets` makes of it, but only `columns` have their values.

    Args:
        path: Path or URL, for messages.
        file: The open tar, read from its beginning.

    Raises:
        SourceError: The tar is cut short, or a header in it is damaged: `tarfile` takes both for its end.
        tarfile.TarError, EOFError: It cannot be read.
    """
    return WebDataset._get_pipeline_from_tar(path, _members(path, file, columns))


def _members(path: str, file: _Readable, columns: Collection[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the files of a tar as `datasets` does, empty ones in place of those that are not needed."""
    entries: type[_Entry] = type("Entries", (_Entry,), {"at_end": False})
    last = "its beginning"
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=entries) as archive:  # type: ignore[call-overload]
        for member in archive:
            last = member.name
            if member.isreg() and not member.name.rpartition("/")[2].startswith((".", "__")):
                content = archive.extractfile(member) if _is_needed(member.name, columns) else io.BytesIO()
                assert content is not None
                yield member.name, content
            archive.members = []  # it would keep all of them
    if not entries.at_end:
        raise SourceError(f"{path} is cut short after {last}.")


def _is_needed(name: str, columns: Collection[str]) -> bool:
    field = base_plus_ext(name)[1]
    ending = f".{name.rpartition('.')[2].lower()}"
    # What is decoded or decompressed has to be there, or that fails.
    return field in columns or ending in EXTENSION_TO_COMPRESSION_FS_FILE_CLS or ending[1:] in WebDataset.DECODERS


class _Entry(tarfile.TarInfo):
    """An entry of a tar, which notices the block of zeros at the end."""

    at_end = False

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            cls.at_end = True
            raise
