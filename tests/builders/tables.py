"""Small tables in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets


def write_table(path: Path, columns: dict[str, Any]) -> str:
    """Write a table in the format that the ending says, and its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(columns)
    getattr(table, {".parquet": "to_parquet", ".json": "to_json", ".csv": "to_csv"}[path.suffix])(str(path))
    return str(path)
