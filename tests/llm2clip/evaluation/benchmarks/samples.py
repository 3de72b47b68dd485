"""Writing samples of benchmarks in their file formats, with small pictures, and reading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip.evaluation.benchmarks import choose_benchmarks
from llm2clip.evaluation.data import BenchmarkImages
from modeling_llm2clip.image_decoding_llm2clip import decode_image
from tests.pictures import encode

BOM = "\ufeff"


def read(name: str, data: Path) -> Any:
    """Find the files of a benchmark below a folder, as the command does, and read them."""
    (benchmark,) = choose_benchmarks([name], data)
    folder = benchmark.find(data)
    assert folder is not None, benchmark.lacking(data)
    return benchmark.load(folder)


def read_folder(name: str, folder: Path) -> Any:
    """Read a folder as a benchmark does, whatever its name."""
    (benchmark,) = choose_benchmarks([name], folder)
    return benchmark.load(folder)


def write(path: Path, content: str | bytes | Any = b"image") -> Path:
    """Write bytes, a text in UTF-8, or a JSON value; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str | bytes):
        content = json.dumps(content, ensure_ascii=False)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def picture(shade: int, kind: str = "png") -> bytes:
    """Encode a picture of one colour, `(shade, 0, 255 - shade)`."""
    options = {"lossless": True} if kind == "webp" else {}
    return encode(Image.new("RGB", (3, 2), (shade, 0, 255 - shade)), kind, **options)


def shades(images: BenchmarkImages) -> list[int]:
    """Decode images as an evaluation does, and return the shades by which they were made."""
    return [images.decode(row, decode_image).getpixel((0, 0))[0] for row in range(len(images))]


def lines(*rows: Any) -> str:
    """One JSON value per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def xm3600_row(key: str, **captions: list[str]) -> dict[str, Any]:
    texts = {
        language: {"caption": some, "caption/tokenized": ["not this"] * len(some), "caption/tokenized/lowercase": []}
        for language, some in captions.items()
    }
    return {"image/key": key, "image/locale": "sw", **texts}
