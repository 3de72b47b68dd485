"""The image files of a folder, with what identifies an unchanged file between two runs."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from llm2clip.data import DEFAULT_MAX_PIXELS, DamagedImageError, decode_image
from llm2clip.data.transforms import Decoder
from llm2clip.search.index_manifest import Embed
from llm2clip.search.index_rows import ID, KEY
from llm2clip.search.row_digests import BINARY, DTYPE, digest, row_digests

# Captions of an image folder, by file name.
METADATA_FILES = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
ROWS_AT_ONCE = 4096
LINK = "it is a link to a folder, and links are not followed; index the folder separately, or move it here"
SCHEMA = {
    KEY: pa.string(),
    "folder": pa.string(),
    "extension": pa.string(),
    "size": pa.int64(),
    "mtime_ns": pa.int64(),
    ID: BINARY,
}


class FolderFiles:
    """Some files of a folder, by relative path."""

    def __init__(self, folder: Path, keys: Sequence[str], max_pixels: int) -> None:
        self.folder = folder
        self.keys = keys
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        """Return the relative path of a row's file."""
        return self.keys[row]

    def decode(self, row: int, decode: Decoder = decode_image) -> Any:
        """Decode the image of a row with `decode`, by default to a PIL image in RGB.

        Raises:
            DamagedImageError: The file cannot be read; the message contains the reason.
        """
        key = self.keys[row]
        try:
            # Opened rather than read: a folder may also contain videos of many gigabytes.
            with open(self.folder / key, "rb") as file:
                return decode(file, key, self.max_pixels)
        except OSError as error:
            raise DamagedImageError(key, f"it cannot be read: {error.strerror}") from error


class FolderImages:
    """The files of a folder and its subfolders, by relative path.

    Hidden files and folders are left out, and the files of captions of an image folder. Links to folders are reported
    as failures, because following them can leave the folder or never end. A file counts as unchanged if its path, size
    and modification time are the same.

    Args:
        exclude: Subfolders to leave out, such as the index itself.
        max_pixels: Largest image to decode, width x height.

    Attributes:
        source: Where the images are, for the manifest.
        columns: Columns that describe a row, with their types.
        metadata_columns: None.
        failures: Why a path is not among the rows, by path; complete after `batches`.

    Raises:
        FileNotFoundError: The folder does not exist.
    """

    embed: Embed = "image"
    # A file that moved is embedded again.
    reuses_content = False

    def __init__(self, folder: str | Path, exclude: Sequence[Path] = (), max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}.")
        self.source = {"kind": "folder", "path": str(self.folder)}
        self.columns = dict(SCHEMA)
        self.metadata_columns: list[str] = []
        self.max_pixels = max_pixels
        self.failures: dict[str, str] = {}
        self._excluded = {path.resolve() for path in exclude}

    def __len__(self) -> int:
        """Count the files; walks through the folder."""
        return sum(1 for _ in self._files())

    def total(self) -> int:
        """Count the files; walks through the folder."""
        return len(self)

    def batches(self) -> Iterator[pa.Table]:
        """Walk through the folder in a fixed order; return the columns that describe the files, some at a time."""
        self.failures.clear()
        rows: list[tuple[str, int, int]] = []
        for path in self._files():
            if (row := self._describe(path)) is not None:
                rows.append(row)
            if len(rows) == ROWS_AT_ONCE:
                yield self._table(rows)
                rows = []
        if rows:
            yield self._table(rows)

    def choose(self, rows: pa.Table) -> FolderFiles:
        """Return the files of some rows."""
        return FolderFiles(self.folder, rows[KEY].to_pylist(), self.max_pixels)

    @staticmethod
    def contents(rows: pa.Table | pa.RecordBatch) -> np.ndarray:
        """Return digests of what a row is counted by: the path."""
        return np.array([digest(key.encode()) for key in rows[KEY].to_pylist()], DTYPE)

    @staticmethod
    def content_columns() -> list[str]:
        """Return the columns that `contents` reads."""
        return [KEY]

    def _table(self, rows: Sequence[tuple[str, int, int]]) -> pa.Table:
        keys, sizes, mtimes = zip(*rows, strict=True)
        paths = [PurePosixPath(key) for key in keys]
        folders = [path.parent.as_posix() for path in paths]
        extensions = [path.suffix[1:].lower() for path in paths]
        columns = [keys, folders, extensions, sizes, mtimes]
        arrays = [pa.array(values, kind) for values, kind in zip(columns, self.columns.values(), strict=False)]
        return pa.table([*arrays, row_digests([keys, sizes, mtimes])], list(self.columns))

    def _files(self) -> Iterator[Path]:
        for parent, folders, files in os.walk(self.folder, onerror=self._add_unreadable_folder):
            place = Path(parent)
            folders[:] = sorted(
                name for name in folders if not name.startswith(".") and place / name not in self._excluded
            )
            for name in filter(lambda name: (place / name).is_symlink(), folders):
                self.failures[self._printable(place / name)] = LINK
            for name in sorted(files):
                if not name.startswith(".") and name not in METADATA_FILES:
                    yield place / name

    def _add_unreadable_folder(self, error: OSError) -> None:
        self.failures[self._printable(error.filename)] = f"the folder cannot be read: {error.strerror}"

    def _printable(self, path: str | Path) -> str:
        """Return the relative path, with invalid UTF-8 replaced."""
        return os.path.relpath(path, self.folder).encode(errors="replace").decode()

    def _describe(self, path: Path) -> tuple[str, int, int] | None:
        """Return relative path, size and modification time of a file; None, and a failure, if it cannot be used."""
        key = path.relative_to(self.folder).as_posix()
        printable = self._printable(path)
        try:
            status = path.stat()
        except OSError as error:
            self.failures[printable] = f"it cannot be read: {error.strerror}"
            return None
        if printable != key:
            self.failures[printable] = "its name is not valid UTF-8; rename it"
        elif not stat.S_ISREG(status.st_mode):
            self.failures[key] = "it is not a regular file"
        elif status.st_size == 0:
            self.failures[key] = "it is empty (zero bytes)"
        else:
            return key, status.st_size, status.st_mtime_ns
        return None
