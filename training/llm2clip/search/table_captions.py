"""The captions of a data set, one row of an index for each, with what identifies an unchanged one between two runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from llm2clip.data import DEFAULT_MAX_PIXELS
from llm2clip.data.captioned_images import clean_caption
from llm2clip.data.opened_table import open_table
from llm2clip.data.sources import CAPTION_COLUMNS, column_value, table_columns
from llm2clip.search.index_manifest import Embed
from llm2clip.search.index_rows import KEY
from llm2clip.search.indexed_table import CAPTION, HASH, IMAGE_COLUMNS, ROW, IndexedTable
from llm2clip.search.row_digests import digest, row_digests

COLUMN, NUMBER_IN_COLUMN = "caption_column", "caption_number"
OWN = {
    KEY: pa.string(),
    ROW: pa.int64(),
    COLUMN: pa.string(),
    NUMBER_IN_COLUMN: pa.int64(),
    CAPTION: pa.string(),
    HASH: pa.string(),
}


class ChosenCaptions:
    """Some captions of a data set, with the names of their rows."""

    def __init__(self, rows: pa.Table) -> None:
        self.keys: list[str] = rows[KEY].to_pylist()
        self.texts: list[str] = rows[CAPTION].to_pylist()


class TableCaptions(IndexedTable):
    """The captions of a data set: a row of the index for each caption, without white space around it.

    A caption counts as unchanged if its text is the same, in whichever row. The images are not read. Rows without a
    caption are failures.

    Args:
        path, name, split, revision, metadata_columns, max_pixels: See [`TableImages`].
        image_column: Column of the images, which results are shown with; by default `image`, or `jpg`, `png`, ... of
            webdataset shards, if it exists.
        caption_columns: Columns of the captions, texts or lists of texts; `a.b` is field `b` of record `a`. By default
            `caption`, `txt` or `text`.

    Raises:
        FileNotFoundError: The data does not exist.
        SourceError: The data cannot be read, or lacks the split or a column.
        ValueError: A metadata column has another type, or a name that the index needs.
    """

    embed: Embed = "caption"

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        revision: str | None = None,
        image_column: str | None = None,
        caption_columns: Sequence[str] = (),
        metadata_columns: Sequence[str] = (),
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        opened = open_table(path, name, split, revision)
        have = table_columns(opened.table)
        image_column = image_column or next((column for column in IMAGE_COLUMNS if column in have), None)
        found = next((column for column in CAPTION_COLUMNS if column in have), CAPTION_COLUMNS[0])
        self.caption_columns = list(dict.fromkeys(caption_columns)) or [found]
        named = self.caption_columns
        super().__init__(path, name, split, revision, opened, image_column, named, metadata_columns, max_pixels)
        self.source["caption_columns"] = self.caption_columns
        self._set_columns(path, OWN)

    def total(self) -> None:
        """Return None: the number of captions is not known before they are read."""

    def _describe(self, start: int, stop: int) -> pa.Table:
        read: Any = self._described[start:stop]
        columns: dict[str, list[Any]] = {name: [] for name in [*OWN, *self.metadata_columns]}
        for row, values in enumerate(read.to_pylist(), start):
            key = str(values[self.key_column]) if self.key_column else str(row)
            metadata = [values[name] for name in self.metadata_columns]
            for column, number, text in self._captions(key, values):
                hashed = digest(text.encode()).hex()
                described = [key, row, column, number, text, hashed, *metadata]
                for place, value in zip(columns.values(), described, strict=True):
                    place.append(value)
        arrays = [pa.array(values, self.columns[name]) for name, values in columns.items()]
        return pa.table([*arrays, row_digests(list(columns.values()))], list(self.columns))

    def _captions(self, key: str, row: Mapping[str, Any]) -> list[tuple[str, int, str]]:
        """Return column, place in it and text of each caption of a row; none, and a failure, if it has no caption."""
        try:
            found = list(_texts(row, self.caption_columns))
        except TypeError as error:
            self.failures[key] = str(error)
            return []
        if not found:
            self.failures[key] = f"it has no text in {', '.join(self.caption_columns)}"
        return found

    def choose(self, rows: pa.Table) -> ChosenCaptions:
        """Return some rows as captions."""
        return ChosenCaptions(rows)

    def has(self, row: int, hashed: str | None) -> bool:
        if row >= len(self):
            return False
        (values,) = self._described[row : row + 1].to_pylist()
        try:
            return any(digest(text.encode()).hex() == hashed for *_, text in _texts(values, self.caption_columns))
        except TypeError:
            return False


def _texts(row: Mapping[str, Any], columns: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """Yield column, place in it and text of each caption of a row.

    Raises:
        TypeError: One is not text; the message names the column.
    """
    for column in columns:
        value = column_value(row, column)
        for number, entry in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            try:
                text = clean_caption(entry)
            except TypeError as error:
                raise TypeError(f"column {column!r}: {error}") from None
            if text is not None:
                yield column, number, text
