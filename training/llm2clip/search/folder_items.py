"""What an index is made of, and the images of a folder; see `table_items` for data sets.

A row is described by columns, and `_digest`, that of its image or caption, by which its embedding is stored.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from llm2clip.command_line.processes import worker_count
from llm2clip.data import DEFAULT_MAX_PIXELS, DamagedImageError
from llm2clip.data.heif import prepare_heif
from llm2clip.data.transforms import Decoder
from llm2clip.encoders.images import ImageList
from llm2clip.search.index_manifest import Embed
from llm2clip.search.listing import ROWS_AT_ONCE, Listing, store_keys
from llm2clip.search.store import DIGEST, KEY
from llm2clip.store.store import KeyIndex, caption_keys
from modeling_llm2clip.image_decoding_llm2clip import decoding_errors, open_image

DIGEST_SIZE = 16
BINARY = pa.binary(DIGEST_SIZE)
# Captions of an image folder, by file name.
METADATA_FILES = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
LINK = "it is a link to a folder, and links are not followed; index the folder separately, or move it here"
# Why an image is embedded by the next run.
CHANGED = "it has changed since this run listed it; run the same command again"
# Bytes above which a file has to be an image before it is read to its end: it may be a video.
LARGE = 64 * 2**20
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

    source: dict[str, Any]
    columns: dict[str, pa.DataType]
    metadata_columns: list[str]
    max_pixels: int
    failures: dict[str, str]

    def __len__(self) -> int:
        """Count what can be read: files, or rows of a data set."""
        raise NotImplementedError

    def batches(self, before: Sequence[Listing]) -> Iterator[pa.Table]:
        """Return the columns that describe the rows in a fixed order, some at a time.

        Args:
            before: Earlier lists, from which digests may be taken.
        """
        raise NotImplementedError

    def choose(self, rows: pa.Table) -> Any:
        """Return the images of some rows as an [`ImageSet`], or their captions as a list."""
        raise NotImplementedError

    def identities(self, rows: pa.Table | pa.RecordBatch) -> np.ndarray:
        """Return what tells whether a row of an earlier index is still there, `(n, 2)` int64: its content."""
        return store_keys(rows[DIGEST])

    def unreadable(self) -> np.ndarray:
        """Return the identities of what is there, but cannot be listed."""
        return np.empty((0, 2), np.int64)


class File(NamedTuple):
    """A file of a folder: its relative path, size, and time of its last change."""

    key: str
    size: int
    mtime_ns: int


class FolderFiles(ImageList):
    """Files as they were listed, opened rather than read.

    Args:
        files: What is known of each.
    """

    def __init__(self, folder: Path, files: Sequence[File], max_pixels: int) -> None:
        super().__init__([folder / file.key for file in files], [file.key for file in files], max_pixels)
        self.files = files

    def decode(self, row: int, decode: Decoder) -> Any:
        prepare_heif(self.key(row))
        try:
            with open(self.images[row], "rb") as file:
                now = os.fstat(file.fileno())
                if (now.st_size, now.st_mtime_ns) != self.files[row][1:]:  # its digest is of another content
                    raise DamagedImageError(self.key(row), CHANGED)
                return decode(file, self.key(row), self.max_pixels)
        except OSError as error:
            raise DamagedImageError(self.key(row), f"it cannot be read: {error.strerror}") from error


class _KnownDigests:
    """The digests of files that were hashed before, by path, size and time; 40 bytes a file."""

    def __init__(self, before: Sequence[Listing]) -> None:
        states, digests = [np.empty((0, 2), np.int64)], []
        for listing in before:
            for batch in listing.batches() if {*File._fields} <= {*listing.schema.names} else ():
                states.append(self._states(zip(*(batch[name].to_pylist() for name in File._fields), strict=True)))
                digests.append(np.array(batch[DIGEST].to_pylist(), f"S{DIGEST_SIZE}"))
        self._index = KeyIndex.of(np.concatenate(states))
        self._digests = np.concatenate(digests) if digests else np.empty(0, f"S{DIGEST_SIZE}")

    def find(self, files: Sequence[File]) -> list[bytes | None]:
        rows = self._index.find(self._states(files))
        return [None if row < 0 else self._digests[row].ljust(DIGEST_SIZE, b"\0") for row in rows]

    def _states(self, files: Any) -> np.ndarray:
        return caption_keys(f"{size} {mtime_ns} {key}" for key, size, mtime_ns in files)


class FolderImages(Items):
    """The files of a folder and its subfolders, by relative path; the folder is walked through once.

    Hidden files and folders are left out, and the files of captions of an image folder. Links to folders are reported
    as failures, because following them can leave the folder or never end. A file that is listed with its path, size
    and modification time is not read again.

    Args:
        exclude: Subfolders to leave out, such as the index itself.
        max_pixels: Largest image to decode, width x height.

    Raises:
        FileNotFoundError: The folder does not exist.
    """

    def __init__(self, folder: str | Path, exclude: Sequence[Path] = (), max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}.")
        self.source = {"kind": "folder", "path": str(self.folder)}
        self.columns = {
            KEY: TEXT,
            "folder": TEXT,
            "extension": TEXT,
            "size": NUMBER,
            "mtime_ns": NUMBER,
            DIGEST: BINARY,
        }
        self.metadata_columns, self.max_pixels, self.failures = [], max_pixels, {}
        self._excluded = {path.resolve() for path in exclude}

    def __len__(self) -> int:
        return len(self._files)

    def batches(self, before: Sequence[Listing]) -> Iterator[pa.Table]:
        known = _KnownDigests(before)
        with ThreadPoolExecutor(max(1, worker_count(None))) as pool:
            for start in range(0, len(self._files), ROWS_AT_ONCE):
                files = self._files[start : start + ROWS_AT_ONCE]
                digests = list(pool.map(self._digest, files, known.find(files)))
                files = [file for file, found in zip(files, digests, strict=True) if found is not None]
                paths = [PurePosixPath(file.key) for file in files]
                described = {
                    KEY: [file.key for file in files],
                    "folder": [path.parent.as_posix() for path in paths],
                    "extension": [path.suffix[1:].lower() for path in paths],
                    "size": [file.size for file in files],
                    "mtime_ns": [file.mtime_ns for file in files],
                    DIGEST: [found for found in digests if found is not None],
                }
                yield pa.table(described, pa.schema(list(self.columns.items())))

    def _digest(self, file: File, known: bytes | None) -> bytes | None:
        """Hash a file; None, and a failure, if it cannot be read."""
        if known is not None:
            return known
        try:
            with open(self.folder / file.key, "rb") as opened:
                if file.size > LARGE:
                    prepare_heif(file.key)
                    with decoding_errors(opened, file.key):
                        open_image(opened, self.max_pixels)
                    opened.seek(0)
                return hashlib.file_digest(opened, partial(hashlib.blake2b, digest_size=DIGEST_SIZE)).digest()
        except OSError as error:
            self.failures[file.key] = f"it cannot be read: {error.strerror}"
        except DamagedImageError as error:
            self.failures[file.key] = str(error.reason)
        return None

    def choose(self, rows: pa.Table) -> FolderFiles:
        columns = (rows[name].to_pylist() for name in File._fields)
        return FolderFiles(self.folder, [File(*values) for values in zip(*columns, strict=True)], self.max_pixels)

    def identities(self, rows: pa.Table | pa.RecordBatch) -> np.ndarray:
        """Return what tells whether a row is still there: its path, since the content of a file may change."""
        return caption_keys(rows[KEY].to_pylist())

    def unreadable(self) -> np.ndarray:
        return caption_keys(self.failures)

    @cached_property
    def _files(self) -> list[File]:
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

    def _describe(self, path: Path) -> File | None:
        """Describe a file; None, and a failure, if it cannot be used."""
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
            return File(key, status.st_size, status.st_mtime_ns)
        return None
