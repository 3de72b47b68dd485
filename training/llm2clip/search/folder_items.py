"""What an index is made of, and the images of a folder; see `table_items` for data sets.

A row is described by columns, and `_id`, a digest of them, differs as soon as one of them does. A row whose image or
caption is known from elsewhere in the index keeps its embedding.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from llm2clip.data import DEFAULT_MAX_PIXELS, DamagedImageError
from llm2clip.data.heif import prepare_heif
from llm2clip.data.transforms import Decoder
from llm2clip.encoders.images import ImageList
from llm2clip.search.index_manifest import Embed
from llm2clip.search.store import ID, KEY

DIGEST_SIZE = 16
BINARY, DIGESTS = pa.binary(DIGEST_SIZE), np.dtype(f"S{DIGEST_SIZE}")
ROWS_AT_ONCE = 4096
# Captions of an image folder, by file name.
METADATA_FILES = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
LINK = "it is a link to a folder, and links are not followed; index the folder separately, or move it here"
TEXT, NUMBER = pa.string(), pa.int64()


def digest(value: str) -> bytes:
    """Hash a text."""
    return hashlib.blake2b(value.encode(), digest_size=DIGEST_SIZE).digest()


class Items:
    """What all items share.

    Attributes:
        source: Where they are, for the manifest.
        columns: Columns that describe a row, with their types.
        metadata_columns: Those that the user has named.
        max_pixels: Largest image to decode, width x height.
        failures: Why an item is not among the rows, by its name; complete after `batches`.
    """

    embed: ClassVar[Embed] = "image"
    # What a row is counted by. Rows with equal values have equal embeddings, unless the value is a path.
    content_column: ClassVar[str] = "hash"

    source: dict[str, Any]
    columns: dict[str, pa.DataType]
    metadata_columns: list[str]
    max_pixels: int
    failures: dict[str, str]

    @property
    def reuses_content(self) -> bool:
        """Whether a row that moved keeps its embedding; a file that moved is embedded again."""
        return self.content_column != KEY

    def __len__(self) -> int:
        """Count what can be read: files, or rows of a data set."""
        raise NotImplementedError

    def batches(self) -> Iterator[pa.Table]:
        """Return the columns that describe the rows in a fixed order, some at a time."""
        raise NotImplementedError

    def choose(self, rows: pa.Table) -> Any:
        """Return the images of some rows as an [`ImageSet`], or their captions as a list."""
        raise NotImplementedError

    def contents(self, rows: pa.Table | pa.RecordBatch) -> np.ndarray:
        """Return digests of what rows are counted by, `(n,)`."""
        return np.array([digest(value) for value in rows[self.content_column].to_pylist()], DIGESTS)

    def _with_ids(self, columns: Mapping[str, Sequence[Any]]) -> pa.Table:
        arrays = [pa.array(values, self.columns[name]) for name, values in columns.items()]
        ids = [digest(repr(row)) for row in zip(*columns.values(), strict=True)]
        return pa.table([*arrays, pa.array(ids, self.columns[ID])], list(self.columns))


class FolderFiles(ImageList):
    """Files that are opened rather than read: a folder may also contain videos of many gigabytes."""

    def decode(self, row: int, decode: Decoder) -> Any:
        prepare_heif(self.key(row))
        try:
            with open(self.images[row], "rb") as file:
                return decode(file, self.key(row), self.max_pixels)
        except OSError as error:
            raise DamagedImageError(self.key(row), f"it cannot be read: {error.strerror}") from error


class FolderImages(Items):
    """The files of a folder and its subfolders, by relative path; the folder is walked through once.

    Hidden files and folders are left out, and the files of captions of an image folder. Links to folders are reported
    as failures, because following them can leave the folder or never end. A file counts as unchanged if its path, size
    and modification time are the same.

    Args:
        exclude: Subfolders to leave out, such as the index itself.
        max_pixels: Largest image to decode, width x height.

    Raises:
        FileNotFoundError: The folder does not exist.
    """

    content_column = KEY

    def __init__(self, folder: str | Path, exclude: Sequence[Path] = (), max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}.")
        self.source = {"kind": "folder", "path": str(self.folder)}
        self.columns = {KEY: TEXT, "folder": TEXT, "extension": TEXT, "size": NUMBER, "mtime_ns": NUMBER, ID: BINARY}
        self.metadata_columns, self.max_pixels, self.failures = [], max_pixels, {}
        self._excluded = {path.resolve() for path in exclude}

    def __len__(self) -> int:
        return len(self._files)

    def batches(self) -> Iterator[pa.Table]:
        for start in range(0, len(self._files), ROWS_AT_ONCE):
            keys, sizes, mtimes = zip(*self._files[start : start + ROWS_AT_ONCE], strict=True)
            paths = [PurePosixPath(key) for key in keys]
            folders = [path.parent.as_posix() for path in paths]
            extensions = [path.suffix[1:].lower() for path in paths]
            described = dict(zip(self.columns, [keys, folders, extensions, sizes, mtimes], strict=False))
            yield self._with_ids(described)

    def choose(self, rows: pa.Table) -> FolderFiles:
        keys = rows[KEY].to_pylist()
        return FolderFiles([self.folder / key for key in keys], keys, self.max_pixels)

    @cached_property
    def _files(self) -> list[tuple[str, int, int]]:
        """Path, size and modification time of each file."""
        return [row for row in map(self._describe, self._walk()) if row is not None]

    def _walk(self) -> Iterator[Path]:
        for name, folders, files in os.walk(self.folder, onerror=self._add_unreadable_folder):
            parent = Path(name)
            folders[:] = sorted(
                name for name in folders if not name.startswith(".") and parent / name not in self._excluded
            )
            for name in filter(lambda name: (parent / name).is_symlink(), folders):
                self.failures[self._printable(parent / name)] = LINK
            for name in sorted(files):
                if not name.startswith(".") and name not in METADATA_FILES:
                    yield parent / name

    def _add_unreadable_folder(self, error: OSError) -> None:
        self.failures[self._printable(error.filename)] = f"the folder cannot be read: {error.strerror}"

    def _printable(self, path: str | Path) -> str:
        """Return the relative path, with invalid UTF-8 replaced."""
        return os.path.relpath(path, self.folder).encode(errors="replace").decode()

    def _describe(self, path: Path) -> tuple[str, int, int] | None:
        """Return relative path, size and modification time of a file; None, and a failure, if it cannot be used."""
        key, printable = path.relative_to(self.folder).as_posix(), self._printable(path)
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
