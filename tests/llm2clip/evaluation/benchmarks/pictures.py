"""Small pictures for samples of benchmarks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip.evaluation.data import BenchmarkImages
from modeling_llm2clip.image_decoding_llm2clip import decode_image


def picture(shade: int, kind: str = "png", size: tuple[int, int] = (3, 2)) -> bytes:
    """Encode a picture of one colour, `(shade, 0, 255 - shade)`."""
    stream = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 255 - shade)).save(
        stream, kind, **({"lossless": True} if kind == "webp" else {})
    )
    return stream.getvalue()


def write_picture(path: Path, shade: int = 0, **options: Any) -> Path:
    """Write a PNG under any name: decoders go by content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(shade, **options))
    return path


def shade_of(images: BenchmarkImages, row: int) -> int:
    """Decode an image as an evaluation does, and return the shade by which it was made."""
    return images.decode(row, decode_image).getpixel((0, 0))[0]


def shades(images: BenchmarkImages) -> list[int]:
    """Decode all images; see [`shade_of`]."""
    return [shade_of(images, row) for row in range(len(images))]
