"""Paths of files that may be remote: `pathlib.Path` for local ones, and the part of it that is needed for URLs."""

from __future__ import annotations

import fnmatch
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
from fsspec.registry import known_implementations

READ_ONLY = {"http", "https"}


class RemotePath:
    """The path of a file or folder on a file system of fsspec. Methods are those of `pathlib.Path`.

    Args:
        files: The file system.
        path: The path on it.
    """

    def __init__(self, files: Any, path: str) -> None:
        self.files, self.path = files, path.rstrip("/")

    def __str__(self) -> str:
        return str(self.files.unstrip_protocol(self.path))

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.files, f"{self.path}/{name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __lt__(self, other: RemotePath) -> bool:
        return self.path < other.path

    def __hash__(self) -> int:
        return hash(self.path)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return posixpath.basename(self.path)

    @property
    def suffix(self) -> str:
        """Ending of the name, with its dot."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> RemotePath:
        """The folder."""
        return RemotePath(self.files, posixpath.dirname(self.path))

    def with_name(self, name: str) -> RemotePath:
        """Return the path of another file in the same folder."""
        return self.parent / name

    def is_file(self) -> bool:
        """Tell whether there is such a file."""
        return bool(self.files.isfile(self.path))

    def is_dir(self) -> bool:
        """Tell whether there is such a folder, or files whose paths begin with its path, now."""
        self.files.invalidate_cache()
        return bool(self.files.isdir(self.path))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Read the file."""
        return self.files.cat_file(self.path).decode(encoding)

    def write_text(self, text: str) -> None:
        """Write the file in one piece, in UTF-8."""
        try:
            self.files.pipe_file(self.path, text.encode())
        except FileNotFoundError as error:  # its bucket
            raise FileNotFoundError(f"{self} cannot be written: {error}") from error

    def put(self, local: Path) -> None:
        """Upload a local file in its place."""
        self.files.makedirs(posixpath.dirname(self.path), exist_ok=True)
        self.files.put_file(str(local), self.path)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file."""
        try:
            self.files.rm_file(self.path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what is in the folder, as it is now."""
        self.files.invalidate_cache()
        for path in self.files.ls(self.path, detail=False):
            # An object store may have an empty file for the folder itself.
            if path.rstrip("/") != self.path:
                yield RemotePath(self.files, path)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the files in the folder whose name has this pattern."""
        try:
            yield from (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))
        except FileNotFoundError:
            return

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the files below the folder whose name has this pattern."""
        self.files.invalidate_cache()
        for path in self.files.find(self.path):
            if fnmatch.fnmatchcase(posixpath.basename(path), pattern):
                yield RemotePath(self.files, path)

    def sizes(self) -> dict[str, int]:
        """Return the sizes in bytes of the files below the folder, as they are now, by their paths in it."""
        self.files.invalidate_cache()
        try:
            found = self.files.find(self.path, detail=True)
        except FileNotFoundError:
            return {}
        return {path.removeprefix(f"{self.path}/"): int(entry["size"]) for path, entry in found.items()}


AnyPath: TypeAlias = Path | RemotePath


def open_path(path: str | Path | RemotePath) -> AnyPath:
    """Return the path of a file or folder, which is remote if it is a URL.

    Raises:
        ImportError: The library of such URLs is not installed; the message has the command that installs it.
        ValueError: It is a command (`pipe:`), or a URL of an unknown kind.
    """
    if isinstance(path, (Path, RemotePath)):
        return path
    refuse_pipe(path)
    if "://" not in path:
        return Path(path)
    try:
        files, name = fsspec.core.url_to_fs(path)
    except ImportError as error:
        kind = known_implementations.get(path.partition("://")[0])
        command = f": pip install {kind['class'].partition('.')[0]}" if kind else ""
        raise ImportError(f"{path} cannot be opened: {error}{command}") from error
    return Path(name) if "file" in protocols(files) else RemotePath(files, name)


def refuse_pipe(path: str) -> None:
    """Raise ValueError for a path that is a command, which webdataset would run."""
    if path.startswith("pipe:"):
        raise ValueError(f"{path!r} is a command, which is never run; give the URL that it reads, such as s3://...")


def open_once(path: str) -> Any:
    """Open a local or remote file for one reading from its beginning to its end."""
    files, name = fsspec.core.url_to_fs(path)
    # These then stream one answer instead of asking for each block.
    streamed = {"block_size": 0} if {"http", "https", "hf"} & set(protocols(files)) else {}
    return files.open(name, "rb", **streamed)


def protocols(files: Any) -> tuple[str, ...]:
    """Return the names of a file system of fsspec."""
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


def size_of(path: AnyPath) -> int:
    """Return the size of a file in bytes; FileNotFoundError if there is none."""
    if isinstance(path, Path):
        return path.stat().st_size
    path.files.invalidate_cache(path.path)
    return int(path.files.size(path.path))


@contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """Yield a local file with the content of a file, which is deleted at the end if it is a copy."""
    if isinstance(path, Path):
        yield path
        return
    # Where a file that is mapped into memory cannot be deleted, it stays until the system cleans up.
    with tempfile.TemporaryDirectory(prefix="llm2clip-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder, path.name)
        path.files.get_file(path.path, str(copy))
        yield copy


@contextmanager
def local_file(path: AnyPath) -> Iterator[Path]:
    """Yield the path of a local file that the block writes, and upload it at the end if `path` is remote."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="llm2clip-") as folder:
        file = Path(folder, path.name)
        yield file
        path.put(file)


def remove_tree(path: AnyPath) -> None:
    """Delete a folder, if there is one; of a remote one the files, and not the bucket that they may be in."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    if found := path.sizes():
        path.files.rm([f"{path.path}/{name}" for name in found])


@contextmanager
def wrap_connection_errors(path: AnyPath) -> Iterator[None]:
    """Turn what libraries raise when the store of a remote path cannot be reached into ConnectionError.

    FileNotFoundError, NotADirectoryError and ValueError stay what they are.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, ConnectionError, ValueError):
        raise
    except Exception as error:
        # Each library has its own kinds.
        if isinstance(path, Path):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConnectionError(f"{path} cannot be reached: {reason}") from error
