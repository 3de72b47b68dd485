"""A data set that an index is made of: its rows, their names and images, and what is stored with them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from llm2clip.data import decode_image
from llm2clip.data.opened_table import OpenedTable
from llm2clip.data.sources import (
    AUTOMATIC_KEY_COLUMNS,
    WEBDATASET_IMAGE_COLUMNS,
    keep_encoded,
    require_columns,
    table_columns,
    top_level,
)
from llm2clip.data.transforms import Decoder
from llm2clip.search.index_rows import ID, INTERNAL
from llm2clip.search.row_digests import BINARY, DTYPE

IMAGE_COLUMNS = ("image", *WEBDATASET_IMAGE_COLUMNS)
CAPTION, HASH, ROW = "caption", "hash", "row"
READ_ROWS = 256
BATCHES_AT_ONCE = 16


class IndexedTable:
    """What [`TableImages`] and [`TableCaptions`] share.

    Args:
        path: See `CaptionSource.path`.
        name, split, revision: Configuration, split, and branch, tag or commit on the Hub.
        opened: The table, with all its columns.
        image_column: Column of the images; None if there are none.
        caption_columns: Columns of captions; `a.b` is field `b` of record `a`.
        metadata_columns: Further columns to store.
        max_pixels: Largest image to decode, width x height.

    Attributes:
        source: Where the data is, for the manifest.
        columns: Columns that describe a row of the index, with their types.
        failures: Why a row of the data is not among those of the index, by its name; complete after `batches`.
    """

    # A row that moved keeps its embedding.
    reuses_content = True

    def __init__(
        self,
        path: str,
        name: str | None,
        split: str,
        revision: str | None,
        opened: OpenedTable,
        image_column: str | None,
        caption_columns: Sequence[str],
        metadata_columns: Sequence[str],
        max_pixels: int,
    ) -> None:
        have = table_columns(opened.table)
        self.image_column = image_column
        self.key_column = next((column for column in AUTOMATIC_KEY_COLUMNS if column in have), None)
        self.metadata_columns = list(metadata_columns)
        named = [image_column, self.key_column, *caption_columns, *self.metadata_columns]
        require_columns(path, [column for column in named if column is not None], have, opened.hint)
        top = [top_level(opened.table, column) for column in caption_columns]
        named = [image_column, self.key_column, *top, *self.metadata_columns]
        table = opened.select(list(dict.fromkeys(column for column in named if column is not None)))
        if image_column is not None:
            table = keep_encoded(table, image_column, opened.folders, path)
        assert isinstance(table, datasets.Dataset)
        self.images = None if image_column is None else table.select_columns([image_column])
        others = table if image_column is None else table.remove_columns(image_column)
        self._described = others.with_format("arrow")
        is_local = os.path.exists(path) or (glob.has_magic(path) and "://" not in path)
        self.source: dict[str, Any] = {"kind": "dataset", "path": os.path.abspath(path) if is_local else path}
        self.source |= {"name": name, "split": split, "revision": revision, "image_column": image_column}
        self.columns: dict[str, pa.DataType] = {}
        self.max_pixels = max_pixels
        self.failures: dict[str, str] = {}

    def _set_columns(self, path: str, own: dict[str, pa.DataType]) -> None:
        """Complete the columns of the index by those of the metadata.

        Raises:
            ValueError: A metadata column has another type than an index stores, or a name that it needs.
        """
        columns = dict(own)
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
        self.columns = columns | {ID: BINARY}

    def __len__(self) -> int:
        """Count the rows of the data."""
        return len(self._described if self.images is None else self.images)

    def batches(self) -> Iterator[pa.Table]:
        """Read the data in order; return the columns that describe the rows of the index, some at a time."""
        self.failures.clear()
        size = READ_ROWS * BATCHES_AT_ONCE
        for start in range(0, len(self), size):
            yield self._describe(start, min(len(self), start + size))

    def _describe(self, start: int, stop: int) -> pa.Table:
        raise NotImplementedError

    @staticmethod
    def contents(rows: pa.Table | pa.RecordBatch) -> np.ndarray:
        """Return digests of what a row is counted by: the image or the caption."""
        return np.array([bytes.fromhex(value) for value in rows[HASH].to_pylist()], DTYPE)

    @staticmethod
    def content_columns() -> list[str]:
        """Return the columns that `contents` reads."""
        return [HASH]

    def key(self, row: int) -> str:
        """Return the name of a row of the data."""
        return str(self._described[row][self.key_column][0].as_py()) if self.key_column else str(row)

    def has(self, row: int, hashed: str | None) -> bool:
        """Return whether a row of the data still has what has this hash; reads that row only."""
        raise NotImplementedError

    def decode(self, row: int, decode: Decoder = decode_image) -> Any:
        """Decode the image of a row of the data; see `FolderFiles.decode`."""
        assert self.images is not None
        return decode(self.images[row][self.image_column], self.key(row), self.max_pixels)


def _is_plain(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(test(kind) for test in (*tests, types.is_date, types.is_timestamp))
