"""Rows of the files of a stream from any row on, and how many a file has; for training and for embedding."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import fsspec.asyn
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import get_worker_info

from llm2clip.data.formats import SourceError, file_format
from llm2clip.data.opened_table import OpenedTable
from llm2clip.data.sources import CaptionSource, Columns, row_batches, select_source, source_columns, used_columns
from llm2clip.data.tars import count_tar_rows, fewer_rows, row_offsets, tar_rows
from llm2clip.files.library_errors import wrap_read_errors
from llm2clip.files.shared_files import shared_file

logger = logging.getLogger(__name__)
# Rows of a file that are decoded at once, and bytes of each column of parquet that are read at once.
BATCH, BUFFER = 64, 2**20
# What file systems say by which a file that has changed differs.
FILE_STATE = ("size", "mtime", "ino", "ETag", "etag", "md5", "LastModified")


class RowRange(NamedTuple):
    """Some rows of a file.

    Attributes:
        start, stop: The first one, and the one after the last.
        total: Rows of the file.
    """

    start: int
    stop: int
    total: int

    @property
    def suffix(self) -> str:
        """What the names of files have that belong to these rows, after the name of the file."""
        return f".{self.start:08}-{self.stop:08}"


class ShardRows:
    """Reads the files of a stream.

    Args:
        table: The stream, with the columns to read.
        columns: Their names.
        files: Path or URL of each file; unknown files are read through `datasets`, from their beginning.
    """

    def __init__(
        self,
        table: datasets.IterableDataset,
        columns: Sequence[str],
        files: Sequence[str],
    ) -> None:
        self.table, self.columns = table, list(columns)
        self.num_files: int = table.num_shards
        self.files = list(files) if len(files) == self.num_files else []
        self._is_announced = False

    def read(self, file: int, rows: Iterable[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield rows of a file with their numbers.

        Args:
            file: Its number.
            rows: Numbers of the rows, ascending; the next one is asked for when the one before has been used. By
                default all rows.

        Raises:
            SourceError: The file cannot be read, or has fewer rows.
        """
        path, next_row = self.files[file] if self.files else f"file {file} of the stream", 0
        numbers, sought, is_new = None if rows is None else iter(rows), list[int](), True

        def asked(numbers: Iterator[int]) -> Iterator[int]:
            for number in numbers:
                sought[:] = [number]
                yield number

        try:
            with wrap_read_errors(path, SourceError):
                for number, row in self._read(file, path, None if numbers is None else asked(numbers)):
                    sought.clear()
                    yield number, row
                    next_row, is_new = number + 1, False
            return
        except SourceError as error:
            # A server may have ended the connection while other files were read.
            if is_new or not self.is_remote(file):
                raise
            logger.warning("Opening %s again at row %d: %s", path, next_row, error)
        left = None if numbers is None else itertools.chain(sought, numbers)
        yield from (found for found in self.read(file, left) if found[0] >= next_row)

    def share(self, reader: int, readers: int, limit: int | None) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield file, number and values of one reader's part of the rows: those of its files.

        Of the first `limit` rows, whose last file is not known, each reader takes some, and reads them all.
        """
        files = range(self.num_files) if limit is not None else range(self.num_files)[reader::readers]
        rows = ((file, *row) for file in files for row in self.read(file))
        return rows if limit is None else itertools.islice(rows, reader, limit, readers)

    def _read(self, file: int, path: str, rows: Iterator[int] | None) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.files and file_format(path) == ".tar":
            yield from tar_rows(path, self.columns, rows)
        elif self.files and is_plain(path, ".parquet") and not self._contains_paths:
            yield from parquet_rows(path, self.columns, rows)
        elif rows is None:
            yield from self.read_all(file)
        else:
            every = self.read_all(file)
            for wanted in rows:
                for number, row in every:
                    if number == wanted:
                        yield number, row
                        break
                else:
                    raise fewer_rows(path, wanted + 1)

    def is_remote(self, file: int) -> bool:
        """Tell whether a file is at a URL."""
        return bool(self.files) and "://" in self.files[file]

    @functools.cached_property
    def _contains_paths(self) -> bool:
        """Whether the images of parquet files are paths, which `keep_encoded` completes."""
        images = [name for name, feature in (self.table.features or {}).items() if isinstance(feature, datasets.Image)]
        if not images:
            return False
        with fsspec.open(self.files[0], "rb") as file:
            schema = pq.read_schema(file)
        kinds = [schema.field(name).type for name in images]
        return any(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds)

    def read_all(self, file: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield all rows of a file through `datasets`, with their numbers."""
        table = self.table if self.num_files == 1 else self.table.shard(self.num_files, file)
        # Unlike the iterator of the table, its method does not split the rows by DataLoader worker once more.
        with wrap_read_errors(self.files[file] if self.files else "a file of the stream", SourceError):
            yield from enumerate(itertools.chain.from_iterable(row_batches(table, BATCH)))

    def count(self, file: int, limit: int | None = None) -> int:
        """Count the rows of a file: of parquet in its footer, of a tar in its headers, of others by reading them.

        What has to be read is read once per machine.

        Args:
            limit: Rows that are wanted, at which the reading stops.

        Raises:
            SourceError: The file is damaged.
        """
        path = self.files[file] if self.files else ""
        if is_plain(path, ".parquet"):
            with wrap_read_errors(path, SourceError), fsspec.open(path, "rb") as opened:
                return int(pq.ParquetFile(opened).metadata.num_rows)
        is_tar = file_format(path) == ".tar"
        if not path:
            return sum(1 for _ in itertools.islice(self.read_all(file), limit))
        if is_plain(path, ".tar") and not self.is_remote(file) and (offsets := row_offsets(path)) is not None:
            return len(offsets)
        if limit is not None:
            return sum(1 for _ in itertools.islice(self.read(file), limit))

        def write(counted: Path) -> None:
            if self.is_remote(file):
                self._announce_reading()
            counted.write_text(str(count_tar_rows(path) if is_tar else sum(1 for _ in self.read_all(file))))

        with wrap_read_errors(path, SourceError):
            files, name = fsspec.core.url_to_fs(path)
            state = {key: str(value) for key, value in files.info(name).items() if key in FILE_STATE}
        return int(shared_file("row-count", {"path": path, **state}, write).read_text())

    def _announce_reading(self) -> None:
        """Say before the first one that remote files are read whole, which may take as long as an epoch."""
        if self._is_announced:
            return
        self._is_announced = True
        read = [path for path in self.files if "://" in path and not is_plain(path, ".parquet")]
        logger.info(
            "counting the rows of %d remote files, %s and so on: they are read whole, once on this machine. You avoid "
            "it with sidecars, which llm2clip embed writes.",
            len(read),
            read[0].split("?")[0],  # a signature may follow
        )


def data_worker() -> tuple[int, int]:
    """Return the number of this DataLoader worker, and how many there are; 0 and 1 where there are none."""
    worker = get_worker_info()
    if worker is None:
        return 0, 1
    fsspec.asyn.reset_lock()  # a forked process inherits a lock that nobody releases
    return worker.id, worker.num_workers


def open_shards(source: CaptionSource, opened: OpenedTable, with_images: bool) -> tuple[Columns, ShardRows]:
    """Return the columns of a streamed source, and the reader of its files, with all their rows."""
    table = cast(datasets.IterableDataset, select_source(replace(source, max_samples=None), opened, with_images))
    columns = source_columns(source, table, with_images)
    names = used_columns(columns, opened.table)
    return columns, ShardRows(table, names, opened.files)


def is_plain(path: str, ending: str) -> bool:
    """Tell whether a file has this ending, and no compression."""
    return path.split("?")[0].lower().endswith(ending)


def parquet_rows(
    path: str, columns: Collection[str], rows: Iterable[int] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows of a parquet file with their numbers; row groups without one of them are not read.

    Args:
        path: Path or URL.
        columns: The columns to read.
        rows: Numbers of the rows, ascending; the next one is asked for when the one before has been used. By default
            all rows.

    Raises:
        SourceError: The file cannot be read, or has fewer rows.
    """
    with wrap_read_errors(path, SourceError), fsspec.open(path, "rb") as file:
        # Many files are open at a time: without a buffer, each would hold a whole row group.
        parquet = pq.ParquetFile(file, buffer_size=BUFFER)
        numbers = iter(range(parquet.metadata.num_rows) if rows is None else rows)
        wanted, end = next(numbers, None), 0
        # A forked process has none of the threads of Arrow.
        options: dict[str, Any] = {"batch_size": BATCH, "columns": list(columns), "use_threads": False}
        for group in range(parquet.num_row_groups):
            start, end = end, end + parquet.metadata.row_group(group).num_rows
            if wanted is None or wanted >= end:
                continue
            for batch in parquet.iter_batches(row_groups=[group], **options):
                values: list[dict[str, Any]] | None = None
                while wanted is not None and wanted < start + len(batch):
                    values = batch.to_pylist() if values is None else values
                    yield wanted, values[wanted - start]
                    wanted = next(numbers, None)
                start += len(batch)
                if wanted is None or wanted >= end:
                    break
        if wanted is not None:
            raise fewer_rows(path, wanted + 1)


def cut_parquet(path: str, columns: Sequence[str], captions: int, text_bytes: int) -> list[RowRange]:
    """Cut a parquet file into ranges of rows of about the same size at most, at its row groups or within one.

    Args:
        path: Path or URL.
        columns: The columns of captions, texts or lists of texts, whose numbers and bytes are in the footer.
        captions, text_bytes: Captions of a range, and the bytes of their columns before compression.

    Returns:
        The ranges; none of a file that has no more than that, or that cannot be read.
    """
    try:
        with fsspec.open(path, "rb") as file:
            metadata = pq.ParquetFile(file).metadata
    except (OSError, pa.ArrowException):
        return []  # the error of reading it names it
    limits = np.array([captions, text_bytes])
    cuts, held, end = [0], np.zeros(2, dtype=np.int64), 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        start, end = end, end + group.num_rows
        parts = [group.column(column) for column in range(group.num_columns)]
        parts = [part for part in parts if _is_of(part.path_in_schema, columns)]
        texts = max(sum(part.num_values for part in parts), group.num_rows)
        size = np.array([texts, sum(part.total_uncompressed_size for part in parts)])
        if held.any() and (held + size > limits).any():
            cuts.append(start)
            held = np.zeros(2, dtype=np.int64)
        if (size > limits).any():
            rows = int((group.num_rows * limits // np.maximum(size, 1)).min())
            cuts += range(start, end, max(1, rows))[1:]
            size = np.minimum(size, limits)
        held = held + size
    cuts.append(metadata.num_rows)
    return [RowRange(start, stop, cuts[-1]) for start, stop in itertools.pairwise(cuts)] if len(cuts) > 2 else []


def _is_of(path: str, columns: Sequence[str]) -> bool:
    """Tell whether a column of a parquet file is one of these, or of the texts in its lists."""
    return any(path == column or path.startswith(f"{column}.") for column in columns)
