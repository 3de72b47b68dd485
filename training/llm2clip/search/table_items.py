"""The images or the captions of a data set, which an index is made of."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
from PIL import Image

from llm2clip.data import DEFAULT_MAX_PIXELS, decode_image
from llm2clip.data.opened_table import OpenedTable, open_table
from llm2clip.data.rows import clean_caption, column_value
from llm2clip.data.sources import (
    AUTOMATIC_KEY_COLUMNS,
    CAPTION_COLUMNS,
    WEBDATASET_IMAGE_COLUMNS,
    keep_encoded,
    require_columns,
    table_columns,
    top_level,
)
from llm2clip.data.transforms import Decoder
from llm2clip.encoders.images import ChosenImages
from llm2clip.search.folder_items import BINARY, DIGEST_SIZE, NUMBER, TEXT, FolderImages, Items, digest
from llm2clip.search.index_manifest import Embed, IndexManifest
from llm2clip.search.listing import ROWS_AT_ONCE, Listing
from llm2clip.search.store import DIGEST, INTERNAL, KEY

READ_ROWS = 256
DATA_SUFFIXES = {".parquet", ".tar", ".arrow"}
SAVED_DATASETS = ("dataset_info.json", "dataset_dict.json")
IMAGE_COLUMNS = ("image", *WEBDATASET_IMAGE_COLUMNS)
CAPTION, HASH, ROW = "caption", "hash", "row"
# Where a list of images in memory is from.
IN_MEMORY = "images in memory"
PLAIN = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean),
    *(pa.types.is_date, pa.types.is_timestamp),
)


class _Table(Items):
    """What is made of the rows of a data set.

    Args:
        data: See `CaptionSource.path`; or a data set that is open.
        name, split, revision: Configuration, split, and branch, tag or commit on the Hub.
        image_column: Column of the images; by default `image`, or `jpg`, `png`, ... of webdataset shards.
        caption_columns: Columns of the captions, by default `caption`, `txt` or `text`.
        metadata_columns: Further columns of strings, numbers, truth values or dates to store.
        max_pixels: Largest image to decode, width x height.

    Raises:
        FileNotFoundError: The data does not exist.
        SourceError: The data cannot be read, or lacks the split or a column.
        ValueError: A metadata column has another type, or a name that the index needs.
    """

    # The columns that have to be there if none of the usual names is.
    needs_image: ClassVar[bool]

    def __init__(
        self,
        data: str | datasets.Dataset,
        name: str | None = None,
        split: str = "train",
        revision: str | None = None,
        image_column: str | None = None,
        caption_columns: Sequence[str] = (),
        metadata_columns: Sequence[str] = (),
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        path = data if isinstance(data, str) else IN_MEMORY
        opened = open_table(data, name, split, revision) if isinstance(data, str) else OpenedTable(data)
        have = table_columns(opened.table)
        usual_image = next((name for name in IMAGE_COLUMNS if name in have), "image" if self.needs_image else None)
        self.image_column = image_column or usual_image
        usual = [column for column in CAPTION_COLUMNS if column in have][:1]
        self.captions = list(dict.fromkeys(caption_columns)) or usual or list(CAPTION_COLUMNS[: not self.needs_image])
        self.key_column = next((column for column in AUTOMATIC_KEY_COLUMNS if column in have), None)
        self.metadata_columns, self.max_pixels, self.failures = list(metadata_columns), max_pixels, {}
        top = [top_level(opened.table, column) for column in self.captions]
        wanted = [[self.image_column, self.key_column, *those, *metadata_columns] for those in (self.captions, top)]
        needed, read = ([column for column in dict.fromkeys(columns) if column is not None] for columns in wanted)
        require_columns(path, needed, have, opened.hint)
        table = opened.table.select_columns(read)
        if self.image_column is not None:
            table = keep_encoded(table, self.image_column, opened.folders, path)
        assert isinstance(table, datasets.Dataset)
        self.images = None if self.image_column is None else table.select_columns([self.image_column])
        others = table if self.image_column is None else table.remove_columns(self.image_column)
        self.described = others.with_format("arrow")
        is_local = os.path.exists(path) or (glob.has_magic(path) and "://" not in path)
        self.source = {"kind": "dataset", "path": os.path.abspath(path) if is_local else path}
        self.source |= {"name": name, "split": split, "revision": revision, "image_column": self.image_column}
        self.source["caption_columns"] = self.captions
        self.columns = {**self._own_columns(), **self._stored_types(path), DIGEST: BINARY}

    def _own_columns(self) -> dict[str, pa.DataType]:
        raise NotImplementedError

    def _stored_types(self, path: str) -> dict[str, pa.DataType]:
        """Return the types of the metadata columns, as they are stored."""
        types = {}
        for name in self.metadata_columns:
            kind = self.described.data.schema.field(name).type
            if name in self._own_columns() or name in INTERNAL:
                raise ValueError(
                    f"the metadata column {name} of {path} has a name that the index needs; rename it in the data set."
                )
            if not any(test(kind) for test in PLAIN):
                raise ValueError(
                    f"the metadata column {name} of {path} holds {kind}, but an index stores strings, numbers, truth "
                    "values and dates."
                )
            types[name] = TEXT if pa.types.is_large_string(kind) else kind
        return types

    def __len__(self) -> int:
        return len(self.described if self.images is None else self.images)

    def batches(self, before: Sequence[Listing]) -> Iterator[pa.Table]:
        self.failures.clear()
        for start in range(0, len(self), ROWS_AT_ONCE):
            rows = range(start, min(len(self), start + ROWS_AT_ONCE))
            read = self.described[start : rows.stop].to_pylist() if self.described.column_names else [{} for _ in rows]
            columns = self._columns_of(rows, read)
            columns[DIGEST] = [bytes.fromhex(hashed) for hashed in columns[HASH]]
            yield pa.table(columns, pa.schema(list(self.columns.items())))

    def _columns_of(self, rows: range, read: list[dict[str, Any]]) -> dict[str, list[Any]]:
        raise NotImplementedError

    def _key_of(self, row: int, values: Mapping[str, Any]) -> str:
        return str(values[self.key_column]) if self.key_column else str(row)

    def key(self, row: int) -> str:
        """Return the name of a row of the data."""
        return str(self.described[row][self.key_column][0].as_py()) if self.key_column else str(row)

    def decode(self, row: int, decode: Decoder = decode_image) -> Any:
        """Decode the image of a row of the data; see [`ImageSet`]."""
        assert self.images is not None
        return decode(self.images[row][self.image_column], self.key(row), self.max_pixels)


class TableImages(_Table):
    """The images of a data set. An image counts as unchanged if its bytes are the same, in whichever row.

    The first of its caption columns is the text shown with a result. Other arguments and errors: see [`_Table`].
    """

    needs_image = True

    def _own_columns(self) -> dict[str, pa.DataType]:
        return {KEY: TEXT, ROW: NUMBER, HASH: TEXT, **dict.fromkeys([CAPTION] * bool(self.captions), TEXT)}

    def _columns_of(self, rows: range, read: list[dict[str, Any]]) -> dict[str, list[Any]]:
        assert self.images is not None
        columns: dict[str, list[Any]] = {KEY: list(map(self._key_of, rows, read)), ROW: list(rows), HASH: []}
        for first in range(rows.start, rows.stop, READ_ROWS):
            some = self.images[first : min(rows.stop, first + READ_ROWS)][self.image_column]
            columns[HASH] += map(_hash, some)
        if self.captions:
            columns[CAPTION] = [_text(column_value(values, self.captions[0])) for values in read]
        return columns | {name: [values[name] for values in read] for name in self.metadata_columns}

    def choose(self, rows: pa.Table) -> ChosenImages:
        images: Any = self
        return ChosenImages(images, rows[ROW].to_pylist())

    def has(self, row: int, hashed: str | None) -> bool:
        """Return whether a row of the data still has the image with this hash; reads that row only."""
        return self.images is not None and row < len(self) and _hash(self.images[row][self.image_column]) == hashed


class TableCaptions(_Table):
    """The captions of a data set: a row of the index for each caption, without white space around it.

    A caption counts as unchanged if its text is the same, in whichever row. The images are not read, but shown with
    results. Rows without a caption are failures. Columns of captions hold texts or lists of texts; `a.b` is field `b`
    of record `a`. Other arguments and errors: see [`_Table`].
    """

    embed = "caption"
    needs_image = False

    def _own_columns(self) -> dict[str, pa.DataType]:
        return {KEY: TEXT, ROW: NUMBER, "caption_column": TEXT, "caption_number": NUMBER, CAPTION: TEXT, HASH: TEXT}

    def _columns_of(self, rows: range, read: list[dict[str, Any]]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in self.columns if name != DIGEST}
        for row, values in zip(rows, read, strict=True):
            key, metadata = self._key_of(row, values), [values[name] for name in self.metadata_columns]
            for column, number, text in self._texts_of(key, values):
                described = [key, row, column, number, text, digest(text).hex(), *metadata]
                for cells, value in zip(columns.values(), described, strict=True):
                    cells.append(value)
        return columns

    def _texts_of(self, key: str, row: Mapping[str, Any]) -> list[tuple[str, int, str]]:
        """Return column, number in it and text of each caption of a row; none, and a failure, if it has no caption."""
        try:
            texts = list(_texts(row, self.captions))
        except TypeError as error:
            self.failures[key] = str(error)
            return []
        if not texts:
            self.failures[key] = f"it has no text in {', '.join(self.captions)}"
        return texts

    def choose(self, rows: pa.Table) -> list[str]:
        return rows[CAPTION].to_pylist()

    def has(self, row: int, hashed: str | None) -> bool:
        """Return whether a row of the data still has the caption with this hash; reads that row only."""
        if row >= len(self):
            return False
        (values,) = self.described[row : row + 1].to_pylist()
        try:
            return any(digest(text).hex() == hashed for *_, text in _texts(values, self.captions))
        except TypeError:
            return False


def open_items(
    path: str,
    exclude: Sequence[Path] = (),
    kind: str = "auto",
    embed: Embed = "image",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    **table: Any,
) -> Items:
    """Open the images of a folder, or the images or captions of a data set.

    Args:
        exclude: Subfolders of a folder of images to leave out.
        kind: `folder`, `dataset`, or `auto` to detect it.
        table: Other arguments of [`TableImages`] and [`TableCaptions`].
    """
    if embed == "caption":
        return TableCaptions(path, max_pixels=max_pixels, **table)
    if kind == "folder" or (kind == "auto" and not is_dataset(path)):
        return FolderImages(path, exclude, max_pixels)
    return TableImages(path, max_pixels=max_pixels, **table)


def as_items(images: Any, exclude: Sequence[Path] = ()) -> Items:
    """Return images as items: a folder, a data set by its path or Hub id or open, a list of paths and PIL images.

    Items are returned as they are.
    """
    if isinstance(images, Items):
        return images
    if isinstance(images, (str, Path)):
        return open_items(str(images), exclude)
    if not isinstance(images, datasets.Dataset):
        names = [str(number) if isinstance(image, Image.Image) else str(image) for number, image in enumerate(images)]
        given = [image if isinstance(image, Image.Image) else str(image) for image in images]
        features = datasets.Features({"image": datasets.Image(), "key": datasets.Value("string")})
        images = datasets.Dataset.from_dict({"image": given, "key": names}, features)
    return TableImages(images)


def items_of(manifest: IndexManifest, exclude: Sequence[Path] = ()) -> Items:
    """Open again what the manifest of an index names.

    Raises:
        ValueError: It was in memory.
    """
    if manifest.source["path"] == IN_MEMORY:
        raise ValueError("the index is of images in memory: give them to update(images).")
    columns: dict[str, Any] = {"metadata_columns": manifest.metadata_columns, "max_pixels": manifest.max_pixels}
    return open_items(**manifest.source, exclude=exclude, embed=manifest.embed, **columns)


def is_dataset(path: str) -> bool:
    """Return whether a path is data for `datasets` rather than a folder of image files.

    A folder is data if `save_to_disk` wrote it, or if it (or its subfolder `data`) contains parquet files, webdataset
    shards or arrow files, and no images.
    """
    root = Path(path).expanduser()
    if not root.is_dir() or any((root / name).is_file() for name in SAVED_DATASETS):
        return True
    files = [file for folder in (root, root / "data") if folder.is_dir() for file in folder.iterdir()]
    suffixes = {file.suffix.lower() for file in files if file.is_file()}
    return bool(suffixes & DATA_SUFFIXES) and not suffixes & set(Image.registered_extensions())


def _hash(value: dict[str, Any] | None) -> str:
    """Hash the encoded bytes of an image, or its path if the file is missing."""
    value = value or {}
    data, path = value.get("bytes"), value.get("path") or ""
    if data is None and os.path.isfile(path):
        data = Path(path).read_bytes()
    return hashlib.blake2b(path.encode() if data is None else data, digest_size=DIGEST_SIZE).hexdigest()


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, str) else None


def _texts(row: Mapping[str, Any], columns: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """Yield column, number in it and text of each caption of a row.

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
