"""The files of an uncompressed tar, and whether it is whole."""

from __future__ import annotations

import math
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llm2clip.data.sources import SourceError


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


def list_tar(path: Path) -> Iterator[tuple[str, FilePart]]:
    """List the files of an uncompressed tar in their order: names, and where their bytes are.

    Raises:
        SourceError: It is not an uncompressed tar, or is cut short.
    """
    last, end = "its beginning", 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                last = member.name
                if member.isfile():
                    yield member.name, FilePart(path, member.offset_data, member.size)
                    end = member.offset_data + math.ceil(member.size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except (tarfile.TarError, EOFError) as error:
        raise SourceError(f"{path} is not an uncompressed tar, or is damaged in {last}: {error}.") from error
    # A block of zeros ends a tar. tarfile accepts one that stops before it, or within a header.
    if path.stat().st_size < end + tarfile.BLOCKSIZE or any(FilePart(path, end, tarfile.BLOCKSIZE).read()):
        raise SourceError(f"{path} is cut short after {last}.")
