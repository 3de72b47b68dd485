"""Atomic writes: a file appears complete or not at all. Reads that name the damaged file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import files as distribution_files
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llm2clip.utils.library_errors import wrap_write_errors

if TYPE_CHECKING:
    from llm2clip.utils.remote_path import AnyPath

READ_SIZE = 1 << 22
# The name of a temporary file.
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<host>[A-Za-z0-9-]*)\.(?P<process>\d+)\.tmp")
# The name of a file that safetensors has not finished.
UNFINISHED_TENSORS = re.compile(r"\.tmp\w{6}")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path whose file replaces `path` when the block ends, and is removed when the block raises.

    The error of a full disk names the file. The content and the rename reach the disk before the call returns, so that
    a crash leaves either the old file or the new one. A killed process leaves files `.*.tmp`; see
    [`remove_leftovers`]. The folder of `path` is created.
    """
    path = Path(path)
    with temporary_path(path) as temporary:
        yield temporary
        replace(temporary, path)


@contextmanager
def temporary_path(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, whose folder is created; at the end of the block, what is left there is removed.

    Its name contains host and process: two processes that write the same file do not mix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with wrap_write_errors(path):
            yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return the path beside `path` that this process writes before it renames it; see [`leftovers`]."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")


def replace(temporary: Path, path: Path) -> None:
    """Rename a file to `path`, which it replaces, when its content is on the disk; the name is there at the end."""
    flush_file(temporary)
    temporary.replace(path)
    flush_folder(path.parent)


def remove_leftovers(paths: Iterable[Path], patience: float = 0.0) -> list[Path]:
    """Remove the files that killed processes left while they wrote `paths`, and return them; see [`leftovers`]."""
    removed = []
    for path in leftovers(paths, patience):
        path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def leftovers(paths: Iterable[Path], patience: float = 0.0) -> Iterator[Path]:
    """Find what killed processes of this machine left while they wrote `paths`, by its temporary name.

    Nothing is found where the system cannot tell whether a process lives.

    Args:
        patience: Seconds in which a process that still lives may end.
    """
    deadline = time.monotonic() + patience
    if os.name != "posix":
        return
    names: dict[Path, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(path.name)
    for folder, written in names.items():
        found = [name for name in os.listdir(folder) if name.endswith(".tmp")] if folder.is_dir() else []
        for name in found:
            part = LEFTOVER.fullmatch(name)
            if not part or part["name"] not in written or part["host"] != _host():
                continue
            while (alive := _is_alive(int(part["process"]))) and time.monotonic() < deadline:
                time.sleep(0.05)
            if not alive:
                yield folder / name


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes of this machine left in a folder that nobody else writes into now."""
    found = list(folder.glob(".*tmp*"))
    names = (part["name"] for path in found if (part := LEFTOVER.fullmatch(path.name)))
    remove_leftovers(folder / name for name in names)
    for path in found:
        if UNFINISHED_TENSORS.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return not _has_ended(process)


def _has_ended(process: int) -> bool:
    """Whether a process only waits for its parent to ask how it ended; where the system cannot tell, it has not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in ("Z", "X")


def require_writable(folder: Path) -> None:
    """Check that a folder can be written or made, before what is to be written costs hours; nothing is made.

    Raises:
        NotADirectoryError: A file is in its place, or in that of a folder above it.
        PermissionError: It is read-only.
    """
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{folder} cannot be a folder, because {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} is read-only, so that nothing can be written to {folder}.")


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


def digest_files(files: Iterable[Path]) -> Any:
    """Return the SHA-256 (a `hashlib` object) of the names and contents of files in the given order."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(READ_SIZE):
                digest.update(block)
    return digest


def sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_SIZE):
            digest.update(block)
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    """Hash a JSON value; returns 16 hexadecimal digits, which do not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_license(folder: Path) -> None:
    """Write the license of the code; the license of the weights is stated in the model card."""
    write_text(folder / "LICENSE", code_license())


def code_license() -> str:
    """The text of the license of the code.

    Raises:
        FileNotFoundError: This installation lacks it.
    """
    found = [path for path in distribution_files("llm2clip") or [] if path.name == "LICENSE"]
    if not found:
        raise FileNotFoundError("this installation of llm2clip has no LICENSE file; install it again.")
    return found[0].read_text(encoding="utf-8")
