"""The formats of data files, by the endings of their names."""

from __future__ import annotations

import os
from typing import Any

# The builder of `datasets`, and its options.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".tar": ("webdataset", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")


class SourceError(ValueError):
    """A source that cannot be read as described."""


def file_format(file: str) -> str:
    """Return the ending of a file's name that says its format, without that of a compression."""
    stem, suffix = os.path.splitext(file.split("?")[0].lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSIONS else suffix
