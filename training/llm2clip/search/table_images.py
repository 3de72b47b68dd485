"""The images of a data set, with what identifies an unchanged image between two runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from llm2clip.data import DEFAULT_MAX_PIXELS, decode_image
from llm2clip.data.opened_table import open_table
from llm2clip.data.sources import CAPTION_COLUMNS, column_value, table_columns, top_level
from llm2clip.data.transforms import Decoder
from llm2clip.search.index_manifest import Embed
from llm2clip.search.index_rows import KEY
from llm2clip.search.indexed_table import (
    CAPTION,
    HASH,
    IMAGE_COLUMNS,
    READ_ROWS,
    ROW,
    IndexedTable,
)
from llm2clip.search.row_digests import SIZE, row_digests

DATA_SUFFIXES = {".parquet", ".tar", ".arrow"}
SAVED_DATASETS = ("dataset_info.json", "dataset_dict.json")
OWN = {KEY: pa.string(), ROW: pa.int64(), HASH: pa.string()}


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


class TableImages(IndexedTable):
    """The images of a data set. An image counts as unchanged if its bytes are the same, in whichever row.

    Args:
        path: See `CaptionSource.path`.
        name: The configuration.
        revision: Branch, tag or commit on the Hub.
        image_column: Column of the images; by default `image`, or `jpg`, `png`, ... of webdataset shards.
        caption_column: Column of the text shown with a result; by default `caption`, `txt` or `text` if it exists.
        metadata_columns: Further columns of strings, numbers, truth values or dates to store.
        max_pixels: Largest image to decode, width x height.

    Attributes:
        failures: Empty; a row always has an image, if a damaged one.

    Raises:
        FileNotFoundError: The data does not exist.
        SourceError: The data cannot be read, or lacks the split or a column.
        ValueError: A metadata column has another type, or a name that the index needs.
    """

    embed: Embed = "image"

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
        image_column = image_column or next((column for column in IMAGE_COLUMNS if column in have), "image")
        self.caption_column = caption_column or next((column for column in CAPTION_COLUMNS if column in have), None)
        captions = [self.caption_column] if self.caption_column else []
        super().__init__(path, name, split, revision, opened, image_column, captions, metadata_columns, max_pixels)
        self._set_columns(path, OWN | ({CAPTION: pa.string()} if self.caption_column else {}))

    def total(self) -> int:
        """Count the images."""
        return len(self)

    def _describe(self, start: int, stop: int) -> pa.Table:
        assert self.images is not None
        rows = range(start, stop)
        read: Any = self._described[start:stop] if self._described.column_names else None
        columns: dict[str, Any] = {KEY: list(map(str, rows)), ROW: rows, HASH: []}
        if self.key_column:
            columns[KEY] = list(map(str, read[self.key_column].to_pylist()))
        for first in range(start, stop, READ_ROWS):
            images = self.images[first : min(stop, first + READ_ROWS)][self.image_column]
            columns[HASH] += [_hash(value) for value in images]
        if self.caption_column:
            shown = read.select([top_level(self._described, self.caption_column)]).to_pylist()
            columns[CAPTION] = [_text(column_value(row, self.caption_column)) for row in shown]
        columns |= {name: read[name].to_pylist() for name in self.metadata_columns}
        arrays = [pa.array(values, self.columns[name]) for name, values in columns.items()]
        return pa.table([*arrays, row_digests(list(columns.values()))], list(self.columns))

    def choose(self, rows: pa.Table) -> TableRows:
        """Return some rows as images."""
        return TableRows(self, rows[ROW].to_pylist())

    def has(self, row: int, hashed: str | None) -> bool:
        return self.images is not None and row < len(self) and _hash(self.images[row][self.image_column]) == hashed


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
