"""Rows of the files of a stream by number, and how many a file has."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.data.opened_table import SourceError, file_format
from llm2clip.data.records import column_value
from llm2clip.data.tar_rows import count_tar_rows, numbered_tar_rows
from llm2clip.utils.library_errors import wrap_read_errors

# Rows of a parquet file that are decoded at once, and bytes of each column that are read at once.
BATCH, BUFFER = 64, 2**20


class ShardRows:
    """Reads the files of a stream.

    Args:
        table: The stream, with the columns to read.
        columns: Their names.
        files: Path or URL of each file; unknown files are read through `datasets`, from their beginning.
        captions: The columns of captions, where `a.b` is field `b` of record `a`.
    """

    def __init__(
        self,
        table: datasets.IterableDataset,
        columns: Sequence[str] = (),
        files: Sequence[str] = (),
        captions: Sequence[str] = (),
    ) -> None:
        self.table, self.columns, self.captions = table, list(columns), list(captions)
        self.num_files: int = table.num_shards
        self.files = list(files) if len(files) == self.num_files else []

    def read(self, file: int, wanted: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the rows of a file that have these numbers, which ascend, with their numbers.

        Raises:
            SourceError: The file cannot be read, or has fewer rows.
        """
        with wrap_read_errors(self.files[file] if self.files else f"file {file} of the stream", SourceError):
            yield from self._read(file, wanted)

    def _read(self, file: int, wanted: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.files and file_format(self.files[file]) == ".tar":
            rows = numbered_tar_rows(self.files[file], self.columns, wanted)
            return ((number, self._declared(row)) for number, row in rows)
        if self.files and is_plain(self.files[file], ".parquet") and not self._contains_paths:
            return parquet_rows(self.files[file], self.columns, wanted)
        return picked(self.read_all(file), wanted, f"file {file} of the stream")

    def is_remote(self, file: int) -> bool:
        """Tell whether a file is at a URL."""
        return bool(self.files) and "://" in self.files[file]

    @functools.cached_property
    def _features(self) -> datasets.Features | None:
        # `datasets` copies them for each reader of the attribute.
        return self.table.features

    @functools.cached_property
    def _contains_paths(self) -> bool:
        """Whether the images of parquet files are paths, which `keep_encoded` completes."""
        images = [name for name, feature in (self.table.features or {}).items() if isinstance(feature, datasets.Image)]
        with fsspec.open(self.files[0], "rb") as file:
            schema = pq.read_schema(file)
        kinds = [schema.field(name).type for name in images]
        return any(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds)

    def _declared(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row of a tar as `datasets` does, which makes texts of numbers where the first rows have texts."""
        if self._features is None or all(_is_text(column_value(row, name)) for name in self.captions):
            return row
        return self._features.encode_example(row)

    def read_all(self, file: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield all rows of a file with their numbers; None stands for all files, one after another."""
        whole = file is None or self.num_files == 1
        table = self.table if whole else self.table.shard(self.num_files, file)
        # Unlike the iterator of the table, its method does not split the rows by DataLoader worker once more.
        name = self.files[file] if file is not None and self.files else "a file of the stream"
        with wrap_read_errors(name, SourceError):
            for number, batch in enumerate(table.iter(1)):
                yield number, {name: values[0] for name, values in batch.items()}


def _is_text(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(entry, str) for entry in value)
    return value is None or isinstance(value, str)


def is_plain(path: str, ending: str) -> bool:
    """Tell whether a file has this ending, and no compression."""
    return path.split("?")[0].lower().endswith(ending)


def parquet_rows(path: str, columns: Collection[str], wanted: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows of a parquet file with their numbers; row groups without one of them are not read.

    Args:
        path: Path or URL.
        columns: The columns to read.
        wanted: Numbers of the rows, in ascending order.

    Raises:
        SourceError: The file cannot be read, or has fewer rows.
    """
    numbers = np.fromiter(wanted, dtype=np.int64)
    try:
        with fsspec.open(path, "rb") as file:
            # Many files are open at a time: without a buffer, each would hold a whole row group.
            parquet = pq.ParquetFile(file, buffer_size=BUFFER)
            if len(numbers) and numbers[-1] >= parquet.metadata.num_rows:
                raise SourceError(
                    f"{path} has no row {numbers[-1]}: it has {parquet.metadata.num_rows}, fewer than were counted."
                )
            first = 0
            for group in range(parquet.num_row_groups):
                last = first + parquet.metadata.row_group(group).num_rows
                if len(_within(numbers, first, last)):
                    # A forked process has none of the threads of Arrow.
                    options: dict[str, Any] = {"batch_size": BATCH, "columns": list(columns), "use_threads": False}
                    for batch in parquet.iter_batches(row_groups=[group], **options):
                        found = _within(numbers, first, first + len(batch))
                        yield from zip(found.tolist(), batch.take(pa.array(found - first)).to_pylist(), strict=True)
                        first += len(batch)
                first = last
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"Reading {path} failed: {type(error).__name__}: {error}") from error


def _within(numbers: np.ndarray, first: int, last: int) -> np.ndarray:
    return numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, last)]


def picked(
    rows: Iterable[tuple[int, dict[str, Any]]], wanted: Iterable[int], name: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the numbered rows that have these numbers, which ascend; SourceError if there are fewer."""
    rows = iter(rows)
    for number in wanted:
        row = next((row for row in rows if row[0] == number), None)
        if row is None:
            raise SourceError(f"{name} has no row {number}: it has fewer rows than were counted. Was it replaced?")
        yield row


def can_count(path: str) -> bool:
    """Tell whether the rows of a file can be counted without reading all of it: of a local tar, and of parquet."""
    return is_plain(path, ".parquet") or (is_plain(path, ".tar") and "://" not in path)


def count_rows(path: str) -> int:
    """Count the rows of a file for which [`can_count`] is true.

    Raises:
        SourceError: The file is damaged.
    """
    if is_plain(path, ".tar"):
        return count_tar_rows(path)
    try:
        with fsspec.open(path, "rb") as file:
            return int(pq.ParquetFile(file).metadata.num_rows)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"Reading {path} failed: {type(error).__name__}: {error}") from error
