"""Images of archives and arrays, made into encoded bytes when they are asked for rather than all at once."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llm2clip.data import decode_image
from llm2clip.data.formats import SourceError
from llm2clip.data.tars import open_tar, tar_fault
from llm2clip.files.atomic import digest_json

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


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


class EncodedImages(Sequence[bytes]):
    """A sequence of encoded images; [`BenchmarkImages`] takes it like a list of bytes."""

    def head(self, row: int, size: int) -> bytes:
        """Return what tells an image from others without all of its bytes, for checksums of large sets.

        Args:
            size: How many of its first bytes count, where reading all takes long.
        """
        return bytes(self[row])

    def origin(self) -> str | None:
        """Identify the images without reading them, by the files that they are made of; None of those in memory."""
        return None


class ArchivedImages(EncodedImages):
    """Images within archives, read one at a time."""

    def __init__(self, parts: Sequence[FilePart]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, row: Any) -> Any:
        return self.parts[row].read()

    def head(self, row: int, size: int) -> bytes:
        path, start, whole = self.parts[row]
        return b"%d " % whole + FilePart(path, start, min(size, whole)).read()

    def origin(self) -> str | None:
        paths = dict.fromkeys(part.path for part in self.parts)
        numbers = {path: number for number, path in enumerate(paths)}
        places = [(numbers[part.path], part.start, part.size) for part in self.parts]
        return digest_json([files_origin([*paths]), places])


class PixelImages(EncodedImages):
    """Images of an array: uint8 `(images, height, width)` grey, or `(images, height, width, 3)` RGB."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: Any) -> Any:
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

    def origin(self) -> str | None:
        return digest_json([self.border, files_origin(self.paths)])

    def __getitem__(self, row: Any) -> Any:
        image: Image.Image = decode_image(self.paths[row], str(self.paths[row]))
        width, height = image.size
        return as_pnm(np.asarray(image.crop((self.border, self.border, width - self.border, height - self.border))))


def files_origin(paths: Sequence[Path]) -> str:
    """Identify the content of files by their paths, sizes and times; reads none."""
    states: list[Any] = []
    for path in paths:
        state = path.stat() if path.is_file() else None
        states.append([str(path.absolute()), state and [state.st_size, state.st_mtime_ns, state.st_ctime_ns]])
    return digest_json(states)


def as_pnm(pixels: Any) -> bytes:
    """Encode uint8 pixels, `(height, width)` or `(height, width, 3)`, as PGM or PPM: a header, then the pixels."""
    kind = b"P5" if pixels.ndim == 2 else b"P6"
    return b"%s %d %d 255\n" % (kind, pixels.shape[1], pixels.shape[0]) + pixels.tobytes()
