"""The files of a streamed source: their names, and the rows, captions and counts of each."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import posixpath
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import fsspec
import pyarrow.parquet as pq

from llm2clip.data.formats import SourceError, file_format
from llm2clip.data.opened_table import OpenedTable
from llm2clip.data.parquet import BATCH, RowRange, cut_parquet, parquet_rows
from llm2clip.data.rows import column_texts
from llm2clip.data.sources import (
    PATH_TYPES,
    CaptionSource,
    open_source,
    row_batches,
    select_source,
    source_columns,
    used_columns,
)
from llm2clip.data.tars import count_tar_rows, fewer_rows, row_offsets, tar_rows
from llm2clip.files.library_errors import wrap_read_errors
from llm2clip.files.remote_path import protocols
from llm2clip.files.shared_files import shared_file
from llm2clip.store.manifest import SourceFile

logger = logging.getLogger(__name__)

# Files that are counted, and footers, sizes and manifests that are read, at the same time: remote ones take a while.
FILES_AT_ONCE = 16
MAGIC = re.compile(r"[*?\[]")
# How what the captions of a local file are known by begins.
BY_CAPTIONS = "captions:"
# What file systems say by which a file that has changed differs.
FILE_STATE = ("size", "mtime", "ino", "ETag", "etag", "md5", "LastModified")
# Files are counted side by side, and none before the message about all of them.
ANNOUNCING = threading.Lock()


class SourceShard(NamedTuple):
    """A file of a source.

    Attributes:
        number: Its place among the files of the source.
        path: Path or URL.
        name: Path below the folder of the source, with `/`; the same wherever that folder lies.
        part: The rows that are meant, of a large parquet file.
    """

    number: int
    path: str
    name: str
    part: RowRange | None = None


class ShardedSource:
    """A streamed source as its files, which are read one at a time, from any row on.

    Args:
        source: A source with `streaming`; of one with `max_samples`, all rows are read nevertheless.
        opened: Its table with all columns, if it is open.
        with_images: Read the images too.

    Attributes:
        columns: The columns that are read.
        files: The paths or URLs of the files.

    Raises:
        FileNotFoundError, SourceError: The source cannot be read, lacks a column, is not set to streaming, or is not a
            list of files.
    """

    def __init__(self, source: CaptionSource, opened: OpenedTable | None = None, with_images: bool = False) -> None:
        if not source.streaming:
            raise SourceError(f"{source.path} is read file by file, but is not set to streaming: set streaming: true.")
        self.source, self.opened = source, opened or open_source(source)
        whole = select_source(replace(source, max_samples=None), self.opened, with_images)
        self._table = cast(datasets.IterableDataset, whole)
        self.columns = source_columns(source, self._table, with_images)
        self._names = used_columns(self.columns, self.opened.table)
        self.files = self.opened.files
        if len(self.files) != self._table.num_shards:
            raise SourceError(
                f"{source.path} (split {source.split}) is not a list of files, which a stream reads one by one. Use "
                "webdataset tars or parquet, json or csv files, and one split; or leave streaming unset."
            )
        # Reads a file; None is through `datasets`, which also completes paths of images (`keep_encoded`).
        self._read_file = cast(Any, None)
        image = (self.opened.table.features or {}).get(self.columns.image)
        if file_format(self.files[0]) == ".tar":
            self._read_file = tar_rows
        elif is_plain(self.files[0], ".parquet") and getattr(image, "dtype", None) not in PATH_TYPES:
            self._read_file = parquet_rows
        self._is_announced = False

    # Rows.

    def rows(self, file: int, numbers: Iterable[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield rows of a file with their numbers.

        Args:
            file: Its number.
            numbers: Numbers of the rows, ascending; the next one is asked for when the one before has been used. By
                default all rows.

        Raises:
            SourceError: The file cannot be read, or has fewer rows.
        """
        path, next_row = self.files[file], 0
        wanted, sought, is_new = None if numbers is None else iter(numbers), list[int](), True

        def asked(wanted: Iterator[int]) -> Iterator[int]:
            for number in wanted:
                sought[:] = [number]
                yield number

        try:
            with wrap_read_errors(path, SourceError):
                for number, row in self._rows(file, None if wanted is None else asked(wanted)):
                    sought.clear()
                    yield number, row
                    next_row, is_new = number + 1, False
            return
        except SourceError as error:
            # A server may have ended the connection while other files were read.
            if is_new or not self.is_remote(file):
                raise
            logger.warning("Opening %s again at row %d: %s", path, next_row, error)
        left = None if wanted is None else itertools.chain(sought, wanted)
        yield from (found for found in self.rows(file, left) if found[0] >= next_row)

    def _rows(self, file: int, numbers: Iterator[int] | None) -> Iterator[tuple[int, dict[str, Any]]]:
        path = self.files[file]
        if self._read_file is not None:
            yield from self._read_file(path, self._names, numbers)
            return
        every = self.all_rows(file)
        if numbers is None:
            yield from every
            return
        for wanted in numbers:
            found = next((row for number, row in every if number == wanted), None)
            if found is None:
                raise fewer_rows(path, wanted + 1)
            yield wanted, found

    def all_rows(self, file: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield all rows of a file through `datasets`, with their numbers."""
        table = self._table if len(self.files) == 1 else self._table.shard(len(self.files), file)
        # Unlike the iterator of the table, its method does not split the rows by DataLoader worker once more.
        with wrap_read_errors(self.files[file], SourceError):
            yield from enumerate(itertools.chain.from_iterable(row_batches(table, BATCH)))

    def share(self, reader: int, readers: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield file, number and values of one reader's part of the rows: those of its files.

        Of the first `max_samples` rows, whose last file is not known, each reader takes some, and reads them all.
        """
        limit = self.source.max_samples
        files = range(len(self.files)) if limit is not None else range(len(self.files))[reader::readers]
        rows = ((file, *row) for file in files for row in self.rows(file))
        return rows if limit is None else itertools.islice(rows, reader, limit, readers)

    def row_name(self, file: int, number: int) -> str:
        """Name a row without a key by its number in its file, after the number of the file if there are several."""
        return f"{file}-{number}" if len(self.files) > 1 else str(number)

    def is_remote(self, file: int) -> bool:
        """Tell whether a file is at a URL."""
        return "://" in self.files[file]

    # Counts.

    def counts(self, files: Iterable[int] | None = None) -> Iterator[int]:
        """Count the rows of files, by default of all; only the first `max_samples` rows of a stream.

        They are counted side by side: of parquet in the footer, of a tar in its headers, of others by reading them.
        What has to be read is read once per machine.

        Raises:
            SourceError: A file is damaged.
        """
        files, left = range(len(self.files)) if files is None else files, self.source.max_samples
        if left is None:
            with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
                try:
                    yield from pool.map(self._count, files)
                finally:
                    pool.shutdown(cancel_futures=True)
            return
        for file in files:
            count = 0 if left == 0 else min(left, self._count(file, left))
            left -= count
            yield count

    def _count(self, file: int, limit: int | None = None) -> int:
        """Count the rows of a file; `limit` are wanted, at which the reading stops."""
        path = self.files[file]
        if is_plain(path, ".parquet"):
            with wrap_read_errors(path, SourceError), fsspec.open(path, "rb") as opened:
                return int(pq.ParquetFile(opened).metadata.num_rows)
        if is_plain(path, ".tar") and not self.is_remote(file) and (offsets := row_offsets(path)) is not None:
            return len(offsets)
        if limit is not None:
            return sum(1 for _ in itertools.islice(self.rows(file), limit))

        def write(counted: Path) -> None:
            if self.is_remote(file):
                self._announce_reading()
            is_tar = file_format(path) == ".tar"
            counted.write_text(str(count_tar_rows(path) if is_tar else sum(1 for _ in self.all_rows(file))))

        with wrap_read_errors(path, SourceError):
            files, name = fsspec.core.url_to_fs(path)
            state = {key: str(value) for key, value in files.info(name).items() if key in FILE_STATE}
        return int(shared_file("row-count", {"path": path, **state}, write).read_text())

    def _announce_reading(self) -> None:
        """Say before the first one that remote files are read whole, which may take as long as an epoch."""
        with ANNOUNCING:
            if self._is_announced:
                return
            self._is_announced = True
            read = [path for path in self.files if "://" in path and not is_plain(path, ".parquet")]
            logger.info(
                "counting the rows of %d remote files, %s and so on: they are read whole, once on this machine. You "
                "avoid it with sidecars, which llm2clip embed writes.",
                len(read),
                read[0].split("?")[0],  # a signature may follow
            )

    # Captions.

    @cached_property
    def shards(self) -> list[SourceShard]:
        """The files with their names.

        Raises:
            SourceError: The source has `max_samples`.
        """
        if self.source.max_samples is not None:
            raise SourceError(f"{self.source.path} is read by shard; leave max_samples unset.")
        return name_shards(self.source.path, self.files)

    def cut(self, captions: int, text_bytes: int) -> list[list[SourceShard]]:
        """Return the shards, and of each parquet file with more than so many captions or bytes of them its parts."""
        columns = self.source.caption_columns

        def parts(shard: SourceShard) -> list[SourceShard]:
            is_parquet = shard.path.endswith(".parquet")
            ranges = cut_parquet(shard.path, columns, captions, text_bytes) if is_parquet else []
            return [shard._replace(part=part) for part in ranges] or [shard]

        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            return list(pool.map(parts, self.shards))

    def read(self, shard: SourceShard) -> tuple[list[str], SourceFile]:
        """Read the captions of a shard or part: those that training sees.

        Returns:
            The distinct ones, in order of first appearance by row, column and list entry; and the file, as the
            manifest of their embeddings describes it.

        Raises:
            SourceError: The file cannot be read, is cut short, or a caption is not text.
        """
        columns, rows, digest = list(self.source.caption_columns), 0, hashlib.sha256()
        captions: dict[str, None] = {}
        part = None if shard.part is None else range(*shard.part[:2])
        with wrap_read_errors(shard.path, SourceError):
            size = source_size(shard.path)
            for _, row in self.rows(shard.number, part):
                texts = [column_texts(row, column) for column in columns]
                digest.update(json.dumps(texts).encode())
                captions.update(dict.fromkeys(itertools.chain.from_iterable(texts)))
                rows += 1
            checksum = BY_CAPTIONS + digest.hexdigest() if _is_local(shard.path) else stated_checksum(shard.path)
        name, cut = posixpath.basename(shard.name), None if shard.part is None else shard.part._asdict()
        return list(captions), SourceFile(name, size, checksum, rows, columns, cut)


def is_plain(path: str, ending: str) -> bool:
    """Tell whether a file has this ending, and no compression."""
    return path.split("?")[0].lower().endswith(ending)


def source_size(path: str) -> int:
    """Return the size of a local or remote file in bytes."""
    files, name = fsspec.core.url_to_fs(path)
    return int(files.size(name))


def read_checksum(path: str, columns: Sequence[str], part: RowRange | None = None) -> str | None:
    """Read the captions of a file or a part of it, in these columns, and return what they are known by."""
    source = ShardedSource(CaptionSource(path, caption_columns=list(columns), streaming=True))
    return source.read(source.shards[0]._replace(part=part))[1].checksum


def source_checksum(path: str, columns: Sequence[str], part: RowRange | None = None) -> str | None:
    """Return what the captions of a file, or of a part of it, are known by.

    Of a local file it is the SHA-256 of those in these columns, by row, which are read once on this machine as long as
    the file stays as it is; images are not read. Of a remote file it is what its file system states without reading
    it, or None.

    Raises:
        SourceError: The file cannot be read, or lacks a column.
    """
    if not _is_local(path):
        return stated_checksum(path)
    status = os.stat(path)
    state = status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
    identity = {"path": os.path.abspath(path), "state": state, "columns": list(columns), "part": part}

    def write(file: Path) -> None:
        file.write_text(str(read_checksum(path, columns, part)), encoding="utf-8")

    return shared_file("captions", identity, write).read_text(encoding="utf-8")


def stated_checksum(path: str) -> str | None:
    """Return what the file system of a remote file states by which its content is known, or None."""
    files, name = fsspec.core.url_to_fs(path)
    entry = files.info(name)
    stated = next((entry[field] for field in ("ETag", "etag", "md5", "sha256") if entry.get(field)), None)
    return None if stated is None else f"stated:{stated}"


def _is_local(path: str) -> bool:
    return "file" in protocols(fsspec.core.url_to_fs(path)[0])


def name_shards(source: str, files: list[str]) -> list[SourceShard]:
    """Name the files of a source relative to its folder: the one given, or the last one before a wildcard."""
    is_url = "://" in source
    local = os.path.expanduser(source)
    if is_url or not Path(local).is_dir():
        start = MAGIC.split(source if is_url else local)[0]
        root = start.rpartition("/")[0] if is_url else os.path.dirname(start)
    else:
        root = local
    root = root if is_url else os.path.abspath(root)
    below = [_below(root, file) for file in files]
    if None in below:  # a data set of the Hub, or a link out of the folder
        scheme, separator, _ = files[0].rpartition("://")
        root = posixpath.commonpath([posixpath.dirname(file.rpartition("://")[2]) for file in files])
        root = f"{scheme}{separator}{root}"
        below = [_below(root, file) for file in files]
    return [
        SourceShard(number, file, name or posixpath.basename(file))
        for number, (file, name) in enumerate(zip(files, below, strict=True))
    ]


def _below(root: str, file: str) -> str | None:
    """Return the path of a file below a folder, or None if it is elsewhere."""
    if "://" in file:
        prefix = root.rstrip("/") + "/"
        return file.removeprefix(prefix) if file.startswith(prefix) else None
    relative = os.path.relpath(file, root)
    return None if relative.startswith(os.pardir) else Path(relative).as_posix()
