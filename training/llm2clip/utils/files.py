"""Writing files so that a good one is never replaced by half of another, and reading them with clear errors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import files as distribution_files
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


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file holds none; the message names the file.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return fields


def write_licence(folder: Path) -> None:
    """Write the licence of the code beside it; that of the weights stands in the card."""
    found = [path for path in distribution_files("llm2clip") or [] if path.name == "LICENSE"]
    if not found:
        raise FileNotFoundError("this installation of llm2clip lacks its LICENSE file; install it again.")
    write_text(folder / "LICENSE", found[0].read_text(encoding="utf-8"))


@contextmanager
def appearing_folder(
    destination: Path, overwrite: bool = False, marks: tuple[str, ...] = ("config.json",)
) -> Iterator[Path]:
    """A folder that becomes `destination` when all has gone well, and vanishes otherwise.

    Args:
        destination: The folder.
        overwrite: Replace one that exists.
        marks: Files (globs), any of which shows that a folder is one of this kind, so that `overwrite` replaces no
            other.

    Raises:
        FileExistsError: See [`refuse_existing`].
    """
    destination = destination.absolute()
    refuse_existing(destination, overwrite, marks)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as scratch:
        folder = Path(scratch) / destination.name
        folder.mkdir()
        yield folder
        if destination.exists():
            destination.rename(Path(scratch) / "replaced")
        folder.rename(destination)


def refuse_existing(destination: Path, overwrite: bool, marks: tuple[str, ...] = ("config.json",)) -> None:
    """Raise FileExistsError where `destination` exists and may not, or had better not, be replaced."""
    if not destination.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{destination} exists; add --overwrite to replace it, or choose another destination.")
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    if not any(file for mark in marks for file in destination.glob(mark)):
        raise FileExistsError(
            f"{destination} is not replaced, because it holds other things (no {' or '.join(marks)}); choose another "
            "destination."
        )
