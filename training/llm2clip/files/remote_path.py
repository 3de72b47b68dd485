"""Paths of files that may be remote: `pathlib.Path` for local ones, and paths of universal-pathlib for URLs."""

from __future__ import annotations

import fnmatch
import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
from fsspec.registry import known_implementations
from upath.extensions import ProxyUPath


class RemotePath(ProxyUPath):
    """The path of a file or folder at a URL, whose methods are those of `pathlib.Path`.

    A file is read and written in one request, so that a reader gets it as it was before or after another run's write.
    In a search, only the pattern is one: a folder's name may have brackets too.
    """

    def read_text(self, encoding: str = "utf-8") -> str:  # type: ignore[override]
        """Read the file."""
        return self.fs.cat_file(self.path).decode(encoding)

    def write_text(self, text: str) -> None:  # type: ignore[override]
        """Write the file, in UTF-8."""
        try:
            self.fs.pipe_file(self.path, text.encode())
        except FileNotFoundError as error:  # its bucket
            raise FileNotFoundError(f"{self} cannot be written: {error}") from error

    def glob(self, pattern: str) -> Iterator[RemotePath]:  # type: ignore[override]
        """Yield what is in the folder and has such a name."""
        with suppress(FileNotFoundError, NotADirectoryError):
            paths = (path.rstrip("/") for path in self.fs.ls(self.path, detail=False))
            # An object store may have an empty file for the folder itself.
            names = [posixpath.basename(path) for path in paths if path != self.path]
            yield from (self / name for name in fnmatch.filter(names, pattern))

    def rglob(self, pattern: str) -> Iterator[RemotePath]:  # type: ignore[override]
        """Yield the files below the folder that have such a name."""
        yield from (self / name for name in self.sizes() if fnmatch.fnmatchcase(posixpath.basename(name), pattern))

    def sizes(self) -> dict[str, int]:
        """Return the sizes in bytes of the files below the folder by their paths in it."""
        try:
            entries = self.fs.find(self.path, detail=True)
        except FileNotFoundError:
            return {}
        return {path.removeprefix(f"{self.path}/"): int(entry["size"]) for path, entry in entries.items()}


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
        # Without the cache of listings, which does not know what other processes write.
        files, name = fsspec.core.url_to_fs(path, use_listings_cache=False)
    except ImportError as error:
        kind = known_implementations.get(path.partition("://")[0])
        command = f": pip install {kind['class'].partition('.')[0]}" if kind else ""
        raise ImportError(f"{path} cannot be opened: {error}{command}") from error
    kinds = protocols(files)
    return Path(name) if "file" in kinds else RemotePath(name.rstrip("/"), protocol=kinds[0], **files.storage_options)


def refuse_pipe(path: str) -> None:
    """Raise ValueError for a path that is a command, which webdataset would run."""
    if path.startswith("pipe:"):
        raise ValueError(f"{path!r} is a command, which is never run; give the URL that it reads, such as s3://...")


def protocols(files: Any) -> tuple[str, ...]:
    """Return the names of a file system of fsspec."""
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


@contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """Yield a local file with the content of a file, which is deleted at the end if it is a copy."""
    if isinstance(path, Path):
        yield path
        return
    # Where a file that is mapped into memory cannot be deleted, it stays until the system cleans up.
    with tempfile.TemporaryDirectory(prefix="llm2clip-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder, path.name)
        path.fs.get_file(path.path, str(copy))
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
        path.fs.makedirs(path.parent.path, exist_ok=True)
        path.fs.put_file(str(file), path.path)
