"""Images of archives and arrays, made into encoded bytes when they are asked for rather than all at once."""

from __future__ import annotations

import math
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from PIL import Image

from llm2clip.data import decode_image
from llm2clip.evaluation.benchmarks.base import BenchmarkError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


class EncodedImages(Sequence[bytes]):
    """A sequence of encoded images; [`BenchmarkImages`] takes it like a list of bytes. Subclasses define `encoded`."""

    def encoded(self, row: int) -> bytes:
        """Make the bytes of one image."""
        raise NotImplementedError

    def head(self, row: int, size: int) -> bytes:
        """Return what tells an image from others without all of its bytes, for checksums of large sets.

        Args:
            size: How many of its first bytes count, where reading all takes long.
        """
        return self.encoded(row)

    @overload
    def __getitem__(self, row: int) -> bytes: ...

    @overload
    def __getitem__(self, row: slice) -> list[bytes]: ...

    def __getitem__(self, row: int | slice) -> bytes | list[bytes]:
        if isinstance(row, slice):
            return [self.encoded(number) for number in range(len(self))[row]]
        return self.encoded(row)

    def __iter__(self) -> Iterator[bytes]:
        return (self.encoded(row) for row in range(len(self)))


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
            BenchmarkError: The archive is shorter than it was when it was listed.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            content = file.read(self.size)
        if len(content) != self.size:
            raise BenchmarkError(f"{self.path} ends before byte {self.start + self.size:,}.")
        return content


def list_tar(path: Path) -> Iterator[tuple[str, FilePart]]:
    """List the files of an uncompressed tar in their order: names, and where their bytes are.

    Raises:
        BenchmarkError: It is not an uncompressed tar, or is cut short.
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
        raise BenchmarkError(f"{path} is not an uncompressed tar, or is damaged in {last}: {error}.") from error
    # A block of zeros ends a tar. tarfile accepts one that stops before it, or within a header.
    if path.stat().st_size < end + tarfile.BLOCKSIZE or any(FilePart(path, end, tarfile.BLOCKSIZE).read()):
        raise BenchmarkError(f"{path} is cut short after {last}.")


class ArchivedImages(EncodedImages):
    """Images within archives, read one at a time."""

    def __init__(self, parts: Sequence[FilePart]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def encoded(self, row: int) -> bytes:
        return self.parts[row].read()

    def head(self, row: int, size: int) -> bytes:
        path, start, whole = self.parts[row]
        return b"%d " % whole + FilePart(path, start, min(size, whole)).read()


class PixelImages(EncodedImages):
    """Images of an array: uint8 `(images, height, width)` grey, or `(images, height, width, 3)` RGB."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def encoded(self, row: int) -> bytes:
        return as_pnm(self.pixels[row])


class CroppedFiles(EncodedImages):
    """Image files without a border of `border` pixels."""

    def __init__(self, paths: Sequence[Path], border: int) -> None:
        self.paths = paths
        self.border = border

    def __len__(self) -> int:
        return len(self.paths)

    def head(self, row: int, size: int) -> bytes:
        whole = self.paths[row].stat().st_size
        return b"%d %d " % (self.border, whole) + FilePart(self.paths[row], 0, min(size, whole)).read()

    def encoded(self, row: int) -> bytes:
        image: Image.Image = decode_image(self.paths[row], str(self.paths[row]))
        width, height = image.size
        return as_pnm(np.asarray(image.crop((self.border, self.border, width - self.border, height - self.border))))


def as_pnm(pixels: Any) -> bytes:
    """Encode uint8 pixels, `(height, width)` or `(height, width, 3)`, as PGM or PPM: a header, then the pixels."""
    kind = b"P5" if pixels.ndim == 2 else b"P6"
    return b"%s %d %d 255\n" % (kind, pixels.shape[1], pixels.shape[0]) + pixels.tobytes()
