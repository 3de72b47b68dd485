"""The images of a folder or of a data set, with what identifies an unchanged image between two runs."""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Hashable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow as pa
from PIL import Image

from llm2clip.data import DEFAULT_MAX_PIXELS, DamagedImageError, decode_image
from llm2clip.data.sources import (
    AUTOMATIC_KEY_COLUMNS,
    WEBDATASET_IMAGE_COLUMNS,
    keep_encoded,
    open_table,
    require_columns,
    table_columns,
)
from llm2clip.data.transforms import Decoder
from llm2clip.utils.progress import progress_bar

CAPTION_COLUMNS = ("caption", "txt", "text")
DATA_SUFFIXES = {".parquet", ".tar", ".arrow"}
SAVED_DATASETS = ("dataset_info.json", "dataset_dict.json")
# Captions of an image folder, by file name.
METADATA_FILES = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
READ_ROWS = 256
LINK = "it is a link to a folder, and links are not followed; index the folder separately, or move it here"


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
        keys: Relative paths of the files.
        failures: Why a path is not among the keys, by path.

    Raises:
        FileNotFoundError: The folder does not exist.
    """

    identity = ("key", "size", "mtime_ns")

    def __init__(self, folder: str | Path, exclude: Sequence[Path] = (), max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}.")
        self.source = {"kind": "folder", "path": str(self.folder)}
        self.max_pixels = max_pixels
        self.failures: dict[str, str] = {}
        self.keys: list[str] = []
        self.sizes: list[int] = []
        self.mtimes: list[int] = []
        excluded = {path.resolve() for path in exclude}
        for path in sorted(self._files(excluded), key=lambda path: path.relative_to(self.folder).parts):
            self._add(path)

    def _files(self, excluded: set[Path]) -> Iterable[Path]:
        for parent, folders, files in os.walk(self.folder, onerror=self._add_unreadable_folder):
            place = Path(parent)
            folders[:] = [name for name in folders if not name.startswith(".") and place / name not in excluded]
            for name in filter(lambda name: (place / name).is_symlink(), folders):
                self.failures[self._printable(place / name)] = LINK
            yield from (place / name for name in files if not name.startswith(".") and name not in METADATA_FILES)

    def _add_unreadable_folder(self, error: OSError) -> None:
        self.failures[self._printable(error.filename)] = f"the folder cannot be read: {error.strerror}"

    def _printable(self, path: str | Path) -> str:
        """Return the relative path, with invalid UTF-8 replaced."""
        return os.path.relpath(path, self.folder).encode(errors="replace").decode()

    def _add(self, path: Path) -> None:
        key = path.relative_to(self.folder).as_posix()
        printable = self._printable(path)
        try:
            status = path.stat()
        except OSError as error:
            self.failures[printable] = f"it cannot be read: {error.strerror}"
            return
        if printable != key:
            self.failures[printable] = "its name is not valid UTF-8; rename it"
        elif not stat.S_ISREG(status.st_mode):
            self.failures[key] = "it is not a regular file"
        elif status.st_size == 0:
            self.failures[key] = "it is empty (zero bytes)"
        else:
            self.keys.append(key)
            self.sizes.append(status.st_size)
            self.mtimes.append(status.st_mtime_ns)

    def key(self, row: int) -> str:
        """Return the relative path of a row's file."""
        return self.keys[row]

    def identities(self) -> list[Hashable]:
        """Return what identifies the file of each row; see `identity`."""
        return list(zip(self.keys, self.sizes, self.mtimes, strict=True))

    def columns(self, rows: Sequence[int]) -> pa.Table:
        """Return the columns that the index stores for some rows, except the embeddings."""
        columns: dict[str, list[Any]] = {"key": self.keys, "size": self.sizes, "mtime_ns": self.mtimes}
        return pa.table({name: [values[row] for row in rows] for name, values in columns.items()})

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


class TableImages:
    """The rows of a data set. An image counts as unchanged if its bytes are the same, in whichever row.

    Args:
        path: See `CaptionSource.path`.
        name: The configuration.
        revision: Branch, tag or commit on the Hub.
        image_column: Column of the images; by default `image`, or `jpg`, `png`, ... of webdataset shards.
        caption_column: Column of the text shown with a result; by default `caption`, `txt` or `text` if it exists.
        max_pixels: Largest image to decode, width x height.

    Attributes:
        source: Where the images are, for the manifest.
        keys: Names of the rows, from a key column or else their numbers.
        captions: Captions of the rows, or None without a caption column.

    Raises:
        FileNotFoundError: The data does not exist.
        SourceError: The data cannot be read, or lacks the split or a column.
    """

    identity = ("hash",)

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        revision: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        opened = open_table(path, name, split, revision)
        have = table_columns(opened.table)
        found = [column for column in ("image", *WEBDATASET_IMAGE_COLUMNS) if column in have]
        self.image_column = image_column or (found[0] if found else "image")
        key_column = next((column for column in AUTOMATIC_KEY_COLUMNS if column in have), None)
        self.caption_column = caption_column or next((column for column in CAPTION_COLUMNS if column in have), None)
        wanted = [column for column in (self.image_column, key_column, self.caption_column) if column is not None]
        require_columns(path, wanted, have, opened.hint)
        table = keep_encoded(opened.select(wanted), self.image_column, opened.folders, path)
        assert isinstance(table, datasets.Dataset)
        is_local = os.path.exists(path) or (glob.has_magic(path) and "://" not in path)
        self.source = {"kind": "dataset", "path": os.path.abspath(path) if is_local else path, "name": name}
        self.source |= {"split": split, "revision": revision, "image_column": self.image_column}
        self.table = table.select_columns([self.image_column])
        self.keys = [str(key) for key in table[key_column]] if key_column else [str(row) for row in range(len(table))]
        self.captions = [_text(value) for value in table[self.caption_column]] if self.caption_column else None
        self.max_pixels = max_pixels
        self.failures: dict[str, str] = {}

    def key(self, row: int) -> str:
        """Return the name of a row."""
        return self.keys[row]

    def identities(self) -> list[Hashable]:
        """Return what identifies the image of each row; see `identity`."""
        return list(self.hashes)

    @cached_property
    def hashes(self) -> list[str]:
        """Hashes of the images; the first access reads all images."""
        hashes: list[str] = []
        with progress_bar("Reading images", len(self.table), "image") as bar:
            for start in range(0, len(self.table), READ_ROWS):
                hashes += [_hash(value) for value in self.table[start : start + READ_ROWS][self.image_column]]
                bar.update(len(hashes))
        return hashes

    def has_image(self, row: int, digest: str | None) -> bool:
        """Return whether the image of a row has this hash; reads that row only."""
        return row < len(self.keys) and _hash(self.table[row][self.image_column]) == digest

    def columns(self, rows: Sequence[int]) -> pa.Table:
        """Return the columns that the index stores for some rows, except the embeddings."""
        columns = {"key": [self.keys[row] for row in rows], "row": rows, "hash": [self.hashes[row] for row in rows]}
        if self.captions is not None:  # all may be None, which has another type
            columns["caption"] = pa.array([self.captions[row] for row in rows], pa.string())
        return pa.table(columns)

    def decode(self, row: int, decode: Decoder = decode_image) -> Any:
        """Decode the image of a row; see `FolderImages.decode`."""
        return decode(self.table[row][self.image_column], self.keys[row], self.max_pixels)


IndexedImages: TypeAlias = FolderImages | TableImages


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, str) else None


def _hash(value: dict[str, Any] | None) -> str:
    """Hash the encoded bytes of an image, or its path if the file is missing."""
    value = value or {}
    data, path = value.get("bytes"), value.get("path") or ""
    if data is None and os.path.isfile(path):
        data = Path(path).read_bytes()
    return hashlib.blake2b(path.encode() if data is None else data, digest_size=16).hexdigest()


def is_dataset(path: str) -> bool:
    """Return whether a path is data for `datasets` rather than a folder of image files.

    A folder is data if `save_to_disk` wrote it, or if it (or its subfolder `data`) contains parquet files, webdataset
    shards or arrow files, and no images.
    """
    place = Path(path).expanduser()
    if not place.is_dir() or any((place / name).is_file() for name in SAVED_DATASETS):
        return True
    files = [file for folder in (place, place / "data") if folder.is_dir() for file in folder.iterdir()]
    suffixes = {file.suffix.lower() for file in files if file.is_file()}
    return bool(suffixes & DATA_SUFFIXES) and not suffixes & set(Image.registered_extensions())
