"""Damaged images, and files that are none."""

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

from tests.modeling_llm2clip.awkward_images import awkward_images, picture

# `either`: damaged bytes may still be an image. Then every door has the same answer.
Outcome = Literal["image", "refused", "either"]


class BadImage(NamedTuple):
    """A file, and whether it is an image."""

    name: str
    content: bytes
    outcome: Outcome


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes, depth: int = 8, color: int = 2, rows: bytes = b"") -> bytes:
    """A PNG with a header of one's own."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bombs() -> dict[str, bytes]:
    """Headers that claim more pixels than anybody has memory for, and texts that unpack to gigabytes."""
    bmp = bytearray(encoded(picture(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 2**30, 2**30)
    gif = bytearray(encoded(picture().quantize(4), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    jpeg = bytearray(encoded(picture(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65535, 65535)
    text = zlib.compress(bytes(64 << 20))
    return {
        "wide.png": png(200_000, 200_000),
        "tall.png": png(1, 2**31 - 1),
        "nothing.png": png(0, 0),
        "flat.png": png(28, 0),
        "text.png": png(28, 28, chunk(b"zTXt", b"comment\0\0" + text)),
        "profile.png": png(28, 28, chunk(b"iCCP", b"profile\0\0" + text)),
        "depth.png": png(28, 28, depth=77),
        "color.png": png(28, 28, color=99),
        "empty_rows.png": png(28, 28),
        "huge.bmp": bytes(bmp),
        "huge.gif": bytes(gif),
        "huge.jpg": bytes(jpeg),
        "huge.ppm": b"P6 1000000000 1000000000 255\n",
        "huge.tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65535, 65535, 24, 0),
        "negative.bmp": bytes(bmp[:18]) + struct.pack("<ii", -5, -5) + bytes(bmp[26:]),
    }


def strangers() -> dict[str, bytes]:
    """Files that are no images, some with the name of one."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", encoded(picture(), "PNG"))
    generator = random.Random(0)
    return {
        "empty.png": b"",
        "one_byte.jpg": b"\xff",
        "text.jpg": b"this is a text",
        "page.png": b"<!doctype html><html><body>404 Not Found</body></html>",
        "vector.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "object.json": b'{"error": "not found"}',
        "archive.png": archive.getvalue(),
        "compressed.jpg": gzip.compress(encoded(picture(), "JPEG"), mtime=0),
        "video.jpg": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(400),
        "document.png": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n",
        "pickle.png": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run showpage\n",
        "zeros.png": bytes(4096),
        "ones.jpg": b"\xff" * 4096,
        "signature.png": b"\x89PNG\r\n\x1a\n",
        "signature.jpg": b"\xff\xd8\xff",
        "signature.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        "signature.tiff": b"II*\0\x08\0\0\0",
        "endless.tiff": b"II*\0\x08\0\0\0\x01\0\x00\x01\x03\0\xff\xff\xff\xff\x08\0\0\0\x08\0\0\0",
        "floats.tiff": encoded(Image.new("F", (9, 9)), "TIFF"),
        **{f"noise_{number}.png": generator.randbytes(2000) for number in range(5)},
    }


def damaged() -> Iterator[BadImage]:
    """Images of all formats and modes, cut, overwritten and flipped."""
    generator = random.Random(1)
    for name, content in awkward_images().items():
        yield BadImage(name, content, "image")
        size = len(content)
        yield BadImage(f"start_{name}", content[:12], "refused")
        yield BadImage(f"half_{name}", content[: size // 2], "either")
        yield BadImage(
            f"zeros_{name}", content[: size // 2] + bytes(min(512, size // 2)) + content[size // 2 + 512 :], "either"
        )
        for number in range(3):
            flipped = bytearray(content)
            for _ in range(1 + number):
                flipped[generator.randrange(size)] ^= 1 << generator.randrange(8)
            yield BadImage(f"flipped_{number}_{name}", bytes(flipped), "either")
        if name.endswith(".jpg"):
            yield BadImage(f"tail_{name}", content + bytes(100), "image")


def corpus() -> list[BadImage]:
    """All of them; each name once."""
    refused = {**bombs(), **strangers()}
    return [*damaged(), *(BadImage(f"refused_{name}", content, "refused") for name, content in refused.items())]


def write(folder: Path) -> list[BadImage]:
    """Write all of them into a new folder."""
    folder.mkdir()
    images = corpus()
    for image in images:
        (folder / image.name).write_bytes(image.content)
    return images
