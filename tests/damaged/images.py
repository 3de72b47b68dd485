"""Hostile and damaged images, and files that are none."""

from __future__ import annotations

import gzip
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from tests.damage import mutated
from tests.modeling_llm2clip.awkward_images import awkward_images, picture

# `either`: damaged bytes may still be an image.
Outcome = Literal["image", "refused", "either"]


class BadImage(NamedTuple):
    """A file, and whether it is an image."""

    name: str
    content: bytes
    outcome: Outcome


def _encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG without rows, with a header of one's own."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [_chunk(b"IHDR", header), *more, _chunk(b"IDAT", zlib.compress(b"")), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def hostile() -> dict[str, bytes]:
    """What has to be refused: headers that claim more than any memory, texts that unpack to gigabytes, other files."""
    bmp, gif, jpeg = (bytearray(_encoded(picture().quantize(4).convert(mode), kind)) for mode, kind in FORMATS)
    bmp[18:26] = struct.pack("<ii", 2**30, 2**30)
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65535, 65535)
    text = zlib.compress(bytes(64 << 20))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", _encoded(picture(), "PNG"))
    return {
        "wide.png": _png(200_000, 200_000),
        "nothing.png": _png(0, 0),
        "text.png": _png(28, 28, _chunk(b"zTXt", b"comment\0\0" + text)),
        "profile.png": _png(28, 28, _chunk(b"iCCP", b"profile\0\0" + text)),
        "huge.bmp": bytes(bmp),
        "huge.gif": bytes(gif),
        "huge.jpg": bytes(jpeg),
        "huge.ppm": b"P6 1000000000 1000000000 255\n",
        "huge.tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65535, 65535, 24, 0),
        "empty.png": b"",
        "page.png": b"<!doctype html><html><body>404 Not Found</body></html>",
        "vector.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "archive.png": archive.getvalue(),
        "compressed.jpg": gzip.compress(_encoded(picture(), "JPEG"), mtime=0),
        "document.png": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n",
        "pickle.png": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        # Pillow hands EPS files to Ghostscript.
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run showpage\n",
        "signature.png": b"\x89PNG\r\n\x1a\n",
        "endless.tiff": b"II*\0\x08\0\0\0\x01\0\x00\x01\x03\0\xff\xff\xff\xff\x08\0\0\0\x08\0\0\0",
        "floats.tiff": _encoded(Image.new("F", (9, 9)), "TIFF"),
    }


FORMATS = (("RGB", "BMP"), ("P", "GIF"), ("RGB", "JPEG"))


def _damaged() -> Iterator[BadImage]:
    """Images of all formats and modes, each as it is, cut, and damaged six times."""
    generator = random.Random(1)
    for name, content in awkward_images().items():
        yield BadImage(name, content, "image")
        yield BadImage(f"start_{name}", content[:12], "refused")
        for number in range(6):
            yield BadImage(f"damaged_{number}_{name}", mutated(content, generator), "either")


def write(folder: Path) -> list[BadImage]:
    """Write all of them into a new folder; each name is there once."""
    images = [*_damaged(), *(BadImage(f"hostile_{name}", content, "refused") for name, content in hostile().items())]
    folder.mkdir()
    for image in images:
        (folder / image.name).write_bytes(image.content)
    return images
