"""Writing files so that a good one is never replaced by half of another."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> None:
    """Write a file under a temporary name and rename it; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, see [`write_text`]."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def appearing_folder(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that becomes `destination` when all has gone well, and vanishes otherwise.

    Raises:
        FileExistsError: The destination exists and `overwrite` is off.
    """
    refuse_existing(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as scratch:
        folder = Path(scratch) / destination.name
        folder.mkdir()
        yield folder
        if destination.is_dir():
            shutil.rmtree(destination)
        else:
            destination.unlink(missing_ok=True)
        folder.rename(destination)


def refuse_existing(destination: Path, overwrite: bool) -> None:
    """Raise FileExistsError where `destination` exists and may not be replaced."""
    if destination.exists() and not overwrite:
        raise FileExistsError(f"{destination} exists; add --overwrite to replace it, or choose another destination.")
