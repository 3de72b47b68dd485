"""Writing samples of benchmarks in their file formats, and reading them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.benchmarks.data import RetrievalData

BOM = "\ufeff"


def read(name: str, data: Path) -> Any:
    """Find the files of a benchmark below a folder, as the command does, and read them."""
    benchmark = all_benchmarks()[name]
    folder = benchmark.find(data)
    assert folder is not None
    return benchmark.read(folder)


def write(path: Path, content: str | bytes | Any = b"image") -> Path:
    """Write bytes, a text in UTF-8, or a JSON value; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str | bytes):
        content = json.dumps(content, ensure_ascii=False)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """Write one JSON value per line."""
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def pairs(data: RetrievalData, folder: Path) -> list[tuple[str, str]]:
    """Path of the own image of each text, relative to a folder, and the text."""
    paths = [str(Path(data.images.images[owner]).relative_to(folder)) for owner in data.owners.tolist()]
    return list(zip(paths, data.texts, strict=True))
