"""Sources of captioned images and texts: files, folders and Hub data sets, read with `datasets`."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import datasets

from llm2clip.command_line.settings import build_config, refuse
from llm2clip.data.formats import SourceError
from llm2clip.data.opened_table import OpenedTable, Table, open_table
from llm2clip.data.rows import Columns
from llm2clip.files.library_errors import wrap_read_errors
from llm2clip.files.remote_path import refuse_pipe

SourceT = TypeVar("SourceT", bound="Source")

WEBDATASET_IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp")
# In this order, where no column is named.
CAPTION_COLUMNS = ("caption", "txt", "text")
AUTOMATIC_KEY_COLUMNS = ("key", "__key__")
PATH_TYPES = ("string", "large_string")
# Fields by which stage 2 draws rows and finds their embeddings.
TRAINING_FIELDS = ("caption_weights", "weight", "embedding_cache")


@dataclass
class Source:
    """The fields that all sources share; see [`CaptionSource`]."""

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    caption_columns: list[str] | None = None
    max_samples: int | None = None

    def __post_init__(self) -> None:
        self.path = os.fspath(self.path)
        refuse_pipe(self.path)
        if isinstance(self.caption_columns, str):
            self.caption_columns = [self.caption_columns]
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples of {self.path} must be at least 1, not {self.max_samples}.")

    @classmethod
    def from_dict(cls: type[SourceT], fields: Mapping[str, Any] | str | SourceT) -> SourceT:
        """Build a source from the mapping of a recipe or from a path.

        Raises:
            ValueError: If a field does not exist, has a value of the wrong type, or `path` is missing.
        """
        if isinstance(fields, cls):
            return fields
        fields = {"path": fields} if isinstance(fields, str) else fields
        if not isinstance(fields, Mapping):
            raise ValueError(f"A source must be a path or a mapping of {cls.__name__} fields, not {fields!r:.80}.")
        if not fields.get("path"):
            names = ", ".join(fields) or "none"
            raise ValueError(f"A {cls.__name__} needs a path, but has only these fields: {names}.")
        return build_config(cls, fields, cls.__name__)

    def require_unset(self: SourceT, names: Sequence[str]) -> SourceT:
        """Return the source; raise ValueError if one of these fields is set, which have no use where it is read."""
        refuse(self, names, f"{self.path} is read without it here")
        return self


@dataclass
class CaptionSource(Source):
    """Source of captioned images, or of captions only.

    Attributes:
        path: A file (parquet, json, jsonl, csv, tsv, tar), a glob pattern, a URL, a folder (data files named by split,
            an image folder with `metadata.jsonl`, webdataset shards, or the output of `save_to_disk`), or a data set
            on the Hub (`owner/name`).
        name: Configuration of a data set that has several.
        split: The split. Single files have any split.
        revision: Branch, tag or commit on the Hub.
        image_column: Column of the images: encoded bytes, or paths relative to the folder of the file. If the default
            `image` does not exist, the first of `jpg`, `jpeg`, `png` and `webp` is used (webdataset).
        caption_columns: Columns of the captions, texts or lists of texts. `a.b` is field `b` of record `a`. If the
            default `caption` does not exist, `txt` (webdataset) or `text` is used, and stands here once it is opened.
        caption_weights: Sampling weight of each caption column, shared by the entries of a list. Equal by default.
        key_column: Column that identifies a row in messages. By default `key` or `__key__`, else the row number.
        streaming: Read the files as a stream instead of preparing a local copy. An image folder and the output of
            `save_to_disk` are no such files.
        max_samples: Use only the first rows.
        weight: Share of the rows (`mixing: weights`) or steps (`one_source_per_step`) of stage 2, relative to the
            other sources. Set it for all sources or for none.
        embedding_cache: Folder of the embeddings of this source in stage 2, a cache or sidecars; by default the
            `embedding_cache` of the run.

    Raises:
        ValueError: If a field has an invalid value.
    """

    image_column: str = "image"
    caption_columns: list[str] = field(default_factory=lambda: ["caption"])
    caption_weights: list[float] | None = None
    key_column: str | None = None
    streaming: bool = False
    weight: float | None = None
    embedding_cache: str | list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.caption_columns:
            raise ValueError(f"caption_columns of {self.path} is empty; name at least one column.")
        if len(set(self.caption_columns)) < len(self.caption_columns):
            raise ValueError(f"caption_columns of {self.path} has a column twice: {', '.join(self.caption_columns)}.")
        weights = self.caption_weights
        if weights is not None and len(weights) != len(self.caption_columns):
            raise ValueError(
                f"caption_weights of {self.path} has {len(weights)} entries for {len(self.caption_columns)} "
                "caption_columns; give one weight per column."
            )
        if weights is not None and (min(weights) < 0 or sum(weights) <= 0):
            raise ValueError(f"caption_weights of {self.path} must be non-negative and not all 0, but are {weights}.")
        require_weight(self.path, self.weight)


def require_weight(path: str, weight: float | None) -> None:
    """Raise ValueError if the weight of a source is given and is not positive and finite."""
    if weight is not None and not 0 < weight < math.inf:
        raise ValueError(f"The weight of {path} must be positive and finite, not {weight}.")


def load_source(source: CaptionSource, with_images: bool = True) -> Table:
    """Open the table of a source. It has the columns that the source uses (see [`source_columns`]) and encoded images.

    Args:
        with_images: Include the image column. Without it, formats that allow it do not read the images.

    Raises:
        FileNotFoundError: If the path does not exist.
        SourceError: If a column or the split does not exist, or the data cannot be read.
    """
    return select_source(source, open_source(source), with_images)


def open_source(source: CaptionSource) -> OpenedTable:
    """Open the table of a source with all its columns; see [`load_source`] for errors."""
    return open_table(source.path, source.name, source.split, source.revision, source.streaming)


def select_source(source: CaptionSource, opened: OpenedTable, with_images: bool = True) -> Table:
    """Return an opened table as [`load_source`] does."""
    with wrap_read_errors(source.path, SourceError):  # of some streams the first rows say which columns there are
        columns = source_columns(source, opened.table, with_images, opened.hint)
    table = opened.table.select_columns(used_columns(columns, opened.table))
    if columns.image is not None:
        table = keep_encoded(table, columns.image, opened.folders, source.path)
    return first_rows(table, source.max_samples)


def used_columns(columns: Columns, table: Table) -> list[str]:
    """Return the names of the columns of a table that contain those of a source."""
    used = [column for column in (columns.key, columns.image) if column is not None]
    used += [top_level(table, column) for column in columns.captions]
    return list(dict.fromkeys(used))


def first_rows(table: Table, count: int | None) -> Table:
    """Return the first rows of a table; None returns all."""
    if count is None:
        return table
    return table.select(range(min(count, len(table)))) if isinstance(table, datasets.Dataset) else table.take(count)


def source_columns(source: CaptionSource, table: Table, with_images: bool = True, hint: str = "") -> Columns:
    """Find the columns of a source in its table; default caption columns of the source become those that exist.

    Raises:
        SourceError: If columns do not exist; the message lists them and the existing ones.
    """
    have = table_columns(table)
    image: str | None = source.image_column if with_images else None
    if image == "image" and "image" not in have:
        image = next((column for column in WEBDATASET_IMAGE_COLUMNS if column in have), image)
    if source.caption_columns == [CAPTION_COLUMNS[0]]:
        source.caption_columns = [next((column for column in CAPTION_COLUMNS if column in have), CAPTION_COLUMNS[0])]
    key = source.key_column or next((column for column in AUTOMATIC_KEY_COLUMNS if column in have), None)
    wanted = [column for column in (image, *source.caption_columns, key) if column is not None]
    require_columns(source.path, wanted, have, hint)
    return Columns(image, key, list(source.caption_columns), source.caption_weights)


def require_columns(path: str, wanted: Iterable[str], have: Sequence[str], hint: str = "") -> None:
    """Raise a `SourceError` that lists the existing columns unless these include all `wanted` ones."""
    missing = [column for column in dict.fromkeys(wanted) if column not in have]
    if missing:
        names = f"column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}"
        near = [repr(match) for name in missing for match in difflib.get_close_matches(name, have, n=1)]
        advice = f" Did you mean {', '.join(near)}?" if near else ""
        raise SourceError(f"{path} has no {names}; it has {', '.join(have)}.{advice}{hint}")


def table_columns(table: Table) -> list[str]:
    """Return the names of the columns, and of the fields of records as `column.field`."""
    return _record_columns(next(iter(table), {}) if table.features is None else table.features)


def top_level(table: Table, column: str) -> str:
    """Return `column`, or for a field of a record the column of that record."""
    names = table.column_names or table_columns(table)
    return column if column in names else column.split(".")[0]


def row_batches(table: Table, size: int = 1000) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a table, some at a time."""
    for batch in table.iter(size):
        yield [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _record_columns(record: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, value in record.items():
        names.append(f"{prefix}{name}")
        if isinstance(value, Mapping) and set(value) != {"bytes", "path"}:
            names += _record_columns(value, f"{prefix}{name}.")
    return names


def keep_encoded(table: Table, column: str, folders: list[str], path: str) -> Table:
    """Keep images as bytes or absolute paths, since `datasets` would decode them without reporting the key."""
    options: dict[str, Any] = {"batched": True, "fn_kwargs": {"column": column, "folders": folders, "path": path}}
    if table.features is None:  # a stream of a format without a schema
        return table.map(_absolute_paths, **options)
    feature = table.features[column]
    dtype = feature.dtype if isinstance(feature, datasets.Value) else None
    is_record = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    if not (isinstance(feature, datasets.Image) or is_record or dtype in (*PATH_TYPES, "binary", "large_binary")):
        raise SourceError(f"Column {column!r} of {path} contains {feature}, not images (encoded bytes or paths).")
    if dtype in PATH_TYPES:
        features = table.features.copy()
        features[column] = datasets.Value("string")  # datasets 4 cannot cast large_string to images
        table = table.map(_absolute_paths, **options, features=features)
    return table.cast_column(column, datasets.Image(decode=False))


def _absolute_paths(batch: dict[str, list[Any]], column: str, folders: list[str], path: str) -> dict[str, list[Any]]:
    texts = {value for value in batch[column] if isinstance(value, str)}
    relative = {value for value in texts if not os.path.isabs(value) and "://" not in value}
    if relative and len(folders) != 1:
        raise SourceError(
            f"The image path {min(relative)!r} of {path} is relative, but the data files are in "
            f"{len(folders)} folders; use one source per folder, or absolute paths."
        )
    absolute = {value: os.path.join(folders[0], value) for value in relative}
    return {column: [absolute.get(value, value) if isinstance(value, str) else value for value in batch[column]]}
