"""Atomic writes: a file appears complete or not at all. Reads that name the damaged file."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llm2clip.files.library_errors import wrap_write_errors

if TYPE_CHECKING:
    from llm2clip.files.remote_path import AnyPath

# What killed processes leave: files of `atomic_path`, and those that safetensors has not finished.
UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.tmp|\.tmp\w{6}")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path whose file replaces `path` when the block ends, and is removed when the block raises.

    The error of a full disk names the file. The content and the rename reach the disk before the call returns, so that
    a crash leaves either the old file or the new one; a killed process leaves a file `.*.tmp`, see [`leftovers`]. The
    folder of `path` is created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with wrap_write_errors(path):
            yield temporary
            flush_file(temporary)
            temporary.replace(path)
            flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return a path beside `path` for what is renamed to it; another one in each call, since two runs may write it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def leftovers(path: Path) -> list[Path]:
    """Find what killed processes left while they wrote a file or folder, which nobody else writes now."""
    return [left for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp") if UNFINISHED.fullmatch(left.name)]


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left in a folder that nobody else writes into now."""
    for path in folder.glob(".*tmp*"):
        if path.is_file() and UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Check that a folder can be written or made, before what is to be written costs hours; nothing is made.

    Raises:
        NotADirectoryError: A file is in its place, or in that of a folder above it.
        PermissionError: It is read-only.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder} cannot be a folder, because {existing} is a file.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{existing} is read-only, so that nothing can be written to {folder}.")


def flush_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    # Windows flushes only what is open for writing, and elsewhere a file may be read-only.
    with path.open("rb+" if os.name == "nt" else "rb") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can do that."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """[`atomic_path`] as an open file; `options` are those of `open`, such as `encoding`."""
    with atomic_path(path) as temporary, open(temporary, mode, **options) as file:
        yield file


def write_text(path: str | AnyPath, text: str) -> None:
    """Write a text file in UTF-8: see [`atomic_file`]; an object store replaces a file in one step too."""
    if not isinstance(path, (str, Path)):
        path.write_text(text)
        return
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path: str | AnyPath, value: Any) -> None:
    """Write JSON, see [`write_text`]."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | AnyPath) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file does not contain a JSON object; the message names the file.
    """
    try:
        fields = json.loads((Path(path) if isinstance(path, str) else path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} does not contain a JSON object.")
    return fields


def sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """Hash a JSON value; returns 16 hexadecimal digits, which do not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
