"""The images of a data set, with what identifies an unchanged image between two runs."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from llm2clip.data import DEFAULT_MAX_PIXELS, decode_image
from llm2clip.data.sources import (
    AUTOMATIC_KEY_COLUMNS,
    WEBDATASET_IMAGE_COLUMNS,
    keep_encoded,
    open_table,
    require_columns,
    table_columns,
)
from llm2clip.data.transforms import Decoder
from llm2clip.search.index_rows import ID, INTERNAL, KEY
from llm2clip.search.row_digests import BINARY, DTYPE, SIZE, row_digests

CAPTION_COLUMNS = ("caption", "txt", "text")
DATA_SUFFIXES = {".parquet", ".tar", ".arrow"}
SAVED_DATASETS = ("dataset_info.json", "dataset_dict.json")
OWN = {KEY: pa.string(), "row": pa.int64(), "hash": pa.string()}
CAPTION = "caption"
READ_ROWS = 256
BATCHES_AT_ONCE = 16


class TableRows:
    """Some rows of a data set."""

    def __init__(self, images: TableImages, rows: Sequence[int]) -> None:
        self.images = images
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, row: int) -> str:
        """Return the name of a row."""
        return self.images.key(self.rows[row])

    def decode(self, row: int, decode: Decoder = decode_image) -> Any:
        """Decode the image of a row; see `FolderFiles.decode`."""
        return self.images.decode(self.rows[row], decode)


class TableImages:
    """The rows of a data set. An image counts as unchanged if its bytes are the same, in whichever row.

    Args:
        path: See `CaptionSource.path`.
        name: The configuration.
        revision: Branch, tag or commit on the Hub.
        image_column: Column of the images; by default `image`, or `jpg`, `png`, ... of webdataset shards.
        caption_column: Column of the text shown with a result; by default `caption`, `txt` or `text` if it exists.
        metadata_columns: Further columns of strings, numbers, truth values or dates to store.
        max_pixels: Largest image to decode, width x height.

    Attributes:
        source: Where the images are, for the manifest.
        columns: Columns that describe a row, with their types.
        failures: Empty; a row always has an image, if a damaged one.

    Raises:
        FileNotFoundError: The data does not exist.
        SourceError: The data cannot be read, or lacks the split or a column.
        ValueError: A metadata column has another type, or a name that the index needs.
    """

    # A row that moved keeps its embedding.
    reuses_content = True

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        revision: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        metadata_columns: Sequence[str] = (),
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        opened = open_table(path, name, split, revision)
        have = table_columns(opened.table)
        found = [column for column in ("image", *WEBDATASET_IMAGE_COLUMNS) if column in have]
        self.image_column = image_column or (found[0] if found else "image")
        self.key_column = next((column for column in AUTOMATIC_KEY_COLUMNS if column in have), None)
        self.caption_column = caption_column or next((column for column in CAPTION_COLUMNS if column in have), None)
        self.metadata_columns = list(metadata_columns)
        named = [self.image_column, self.key_column, self.caption_column, *self.metadata_columns]
        wanted = list(dict.fromkeys(column for column in named if column is not None))
        require_columns(path, wanted, have, opened.hint)
        table = keep_encoded(opened.select(wanted), self.image_column, opened.folders, path)
        assert isinstance(table, datasets.Dataset)
        is_local = os.path.exists(path) or (glob.has_magic(path) and "://" not in path)
        self.source = {"kind": "dataset", "path": os.path.abspath(path) if is_local else path, "name": name}
        self.source |= {"split": split, "revision": revision, "image_column": self.image_column}
        self.table = table.select_columns([self.image_column])
        self._described = table.remove_columns(self.image_column).with_format("arrow")
        self.columns = self._columns(path)
        self.max_pixels = max_pixels
        self.failures: dict[str, str] = {}

    def _columns(self, path: str) -> dict[str, pa.DataType]:
        columns = OWN | ({CAPTION: pa.string()} if self.caption_column else {})
        for name in self.metadata_columns:
            kind = self._described.data.schema.field(name).type
            if name in columns or name in INTERNAL:
                raise ValueError(
                    f"the metadata column {name} of {path} has a name that the index needs; rename it in the data set."
                )
            if not _is_plain(kind):
                raise ValueError(
                    f"the metadata column {name} of {path} holds {kind}, but an index stores strings, numbers, truth "
                    "values and dates."
                )
            columns |= {name: pa.string() if pa.types.is_large_string(kind) else kind}
        return columns | {ID: BINARY}

    def __len__(self) -> int:
        return len(self.table)

    def batches(self) -> Iterator[pa.Table]:
        """Read the data set in order; return the columns that describe the rows, some at a time."""
        size = READ_ROWS * BATCHES_AT_ONCE
        for start in range(0, len(self), size):
            yield self._describe(start, min(len(self), start + size))

    def _describe(self, start: int, stop: int) -> pa.Table:
        rows = range(start, stop)
        read: Any = self._described[start:stop] if self._described.column_names else None
        columns: dict[str, Any] = {KEY: list(map(str, rows)), "row": rows, "hash": []}
        if self.key_column:
            columns[KEY] = list(map(str, read[self.key_column].to_pylist()))
        for first in range(start, stop, READ_ROWS):
            images = self.table[first : min(stop, first + READ_ROWS)][self.image_column]
            columns["hash"] += [_hash(value) for value in images]
        if self.caption_column:
            columns[CAPTION] = [_text(value) for value in read[self.caption_column].to_pylist()]
        columns |= {name: read[name].to_pylist() for name in self.metadata_columns}
        arrays = [pa.array(values, self.columns[name]) for name, values in columns.items()]
        return pa.table([*arrays, row_digests(list(columns.values()))], list(self.columns))

    def choose(self, rows: pa.Table) -> TableRows:
        """Return some rows as images."""
        return TableRows(self, rows["row"].to_pylist())

    @staticmethod
    def contents(rows: pa.Table | pa.RecordBatch) -> np.ndarray:
        """Return digests of what a row is counted by: the image."""
        return np.array([bytes.fromhex(value) for value in rows["hash"].to_pylist()], DTYPE)

    @staticmethod
    def content_columns() -> list[str]:
        """Return the columns that `contents` reads."""
        return ["hash"]

    def key(self, row: int) -> str:
        """Return the name of a row."""
        return str(self._described[row][self.key_column][0].as_py()) if self.key_column else str(row)

    def has_image(self, row: int, digest: str | None) -> bool:
        """Return whether the image of a row has this hash; reads that row only."""
        return row < len(self) and _hash(self.table[row][self.image_column]) == digest

    def decode(self, row: int, decode: Decoder = decode_image) -> Any:
        """Decode the image of a row; see `FolderFiles.decode`."""
        return decode(self.table[row][self.image_column], self.key(row), self.max_pixels)


def _is_plain(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(test(kind) for test in (*tests, types.is_date, types.is_timestamp))


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
    return hashlib.blake2b(path.encode() if data is None else data, digest_size=SIZE).hexdigest()


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
