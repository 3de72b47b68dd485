"""The rows of caption sources, map-style and streamed: where a row is read, and the key that names it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

from llm2clip.data.image_keys import sampled_keys
from llm2clip.data.opened_table import OpenedTable, SourceError
from llm2clip.data.sample_stream import ReaderPlace, SampleStream
from llm2clip.data.sampling import ConcatenatedTables, SampleIndex, stable_seed
from llm2clip.data.shard_rows import ShardRows
from llm2clip.data.shared_files import rows_digest, sampled_files_digest
from llm2clip.data.sources import (
    CaptionSource,
    Columns,
    load_source,
    open_source,
    select_source,
    source_columns,
    top_level,
    used_columns,
)
from llm2clip.data.stream_plan import RowPlan
from llm2clip.data.streams import Attach, StreamReader, StreamRow
from llm2clip.utils.files import digest_json
from llm2clip.utils.library_errors import reading

# Makes a sample of a row, its key, the columns of its source, and what the random parts depend on besides the seed
# (None: nothing is random).
SampleFunction: TypeAlias = Callable[[Mapping[str, Any], str, Columns, "tuple[int | str, ...] | None"], Any]


class CaptionRows(ConcatenatedTables):
    """Map-style data set of what `make_sample` makes of the rows of sources.

    `dataset[SampleIndex(epoch, index)]` passes epoch and index to it, `dataset[index]` passes None.

    Args:
        make_sample: The function, called in the worker processes too.
        with_images: Read the images.

    Raises:
        FileNotFoundError, SourceError: If a source cannot be read.
        ValueError: If there is no source, or one is set to streaming.
    """

    def __init__(
        self, sources: CaptionSource | Sequence[CaptionSource], make_sample: SampleFunction, with_images: bool
    ) -> None:
        self.sources = [sources] if isinstance(sources, CaptionSource) else list(sources)
        if not self.sources:
            raise ValueError(f"{type(self).__name__} needs at least one source.")
        for source in self.sources:
            if source.streaming:
                raise ValueError(f"{source.path} is set to streaming; use StreamingCaptionImageDataset.")
        self.make_sample = make_sample
        # Whether row numbers name the rows of several data sets.
        self.is_one_of_several = False
        super().__init__([load_source(source, with_images) for source in self.sources])
        self.columns = [source_columns(*pair, with_images) for pair in zip(self.sources, self.tables, strict=True)]

    def content_digest(self) -> str:
        """See [`EpochDataset.content_digest`]. Of images, some are hashed."""
        found: list[Any] = []
        for table, columns in zip(self.tables, self.columns, strict=True):
            texts = table.select_columns(list(dict.fromkeys(top_level(table, name) for name in columns.captions)))
            images = [] if columns.image is None else sampled_keys(table, columns.image)
            found.append([rows_digest(texts), images])
        return digest_json(found)

    def _key(self, number: int, position: int, row: Mapping[str, Any]) -> str:
        column = self.columns[number].key
        if column is not None and row[column] is not None:
            return str(row[column])
        alone = len(self.sources) == 1 and not self.is_one_of_several
        return str(position) if alone else f"{self.sources[number].path}:{position}"

    def __getitem__(self, index: SampleIndex | int) -> Any:
        epoch, position, number, offset = self.locate(index)
        with reading(self.sources[number].path, SourceError):
            row = self.tables[number][offset]
        salt = None if epoch is None else (epoch, position)
        return self.make_sample(row, self._key(number, offset, row), self.columns[number], salt)


class StreamedRows(SampleStream):
    """Iterable data set of what `make_sample` makes of the rows of a stream; see [`StreamingCaptionImageDataset`].

    Args:
        make_sample: The function, called in the worker processes too.
        with_images: Read the images.
        opened: The table of the source, if it is open.

    Raises:
        FileNotFoundError, SourceError: If the source cannot be read, or (when iterating) has fewer files than readers.
        ValueError: If the source is not set to streaming, or `rank` is invalid.
    """

    def __init__(
        self,
        source: CaptionSource,
        make_sample: SampleFunction,
        with_images: bool,
        training: bool = True,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = False,
        row_counts: Sequence[int] | None = None,
        opened: OpenedTable | None = None,
    ) -> None:
        if not source.streaming:
            raise ValueError(f"{source.path} is not set to streaming; use CaptionImageDataset or streaming: true.")
        self.shuffle_buffer = shuffle_buffer if training else 0
        super().__init__([self], [self.shuffle_buffer], seed, rank, world_size, repeat)
        self.source, self.name = source, source.path
        self.make_sample = make_sample
        opened = opened or open_source(source)
        self.table = select_source(source, opened, with_images)
        self.columns = source_columns(source, self.table, with_images)
        columns = used_columns(self.columns, opened.table)
        shards = ShardRows(self.table, columns, opened.files, source.caption_columns)
        self.reader = StreamReader(shards, source.max_samples is not None, row_counts)
        self.training = training
        # Whether row numbers name the rows of several sources.
        self.is_one_of_several = False

    def set_buffer(self, rows: int) -> None:
        """Set the number of rows in the shuffle buffer of a reader; 0 keeps rows and files in order."""
        self.shuffle_buffer, self.buffers = rows, [rows]

    @property
    def num_rows(self) -> int | None:
        return None if self.reader.row_counts is None else sum(self.reader.row_counts)

    def plan(self, first_epoch: int) -> RowPlan | None:
        if self.reader.row_counts is None:
            return None
        return RowPlan(self.reader.row_counts, self.seed, self.shuffle_buffer > 0, first_epoch)

    def fingerprint(self) -> str | None:
        if self.reader.row_counts is None:
            return None
        return digest_json([[*map(os.path.basename, self.reader.shards.files)], self.reader.row_counts])

    def files_digest(self) -> str:
        return sampled_files_digest(self.reader.shards.files)

    def join(self, number: int) -> None:
        self.is_one_of_several, self.seed = True, stable_seed(self.seed, "source", number)

    def require_readers(self, num_readers: int, world_size: int) -> None:
        # Of a stream with max_samples all readers read the same files.
        rows = self.source.max_samples if self.num_rows is None else self.num_rows
        if rows is not None:
            if rows < num_readers:
                raise SourceError(f"the stream {self.name} has {rows} rows, fewer than {num_readers} readers.")
        elif not self.reader.whole and self.reader.num_files < num_readers:
            workers = num_readers // world_size
            each = f" with {workers} DataLoader workers each" if workers > 1 else ""
            raise SourceError(
                f"the stream {self.name} has {self.reader.num_files} files, which is fewer than {num_readers} readers "
                f"({world_size} processes{each}). Split the data into more files, lower dataloader_num_workers, or "
                "set streaming: false."
            )

    def _attach(self, epoch: int) -> Attach | None:
        """Return what computes the values that are attached to rows while their file is read, if anything."""
        return None

    def _make(self, row: StreamRow, epoch: int) -> Any:
        """Make the sample of a row."""
        key = self._key(row)
        return self.make_sample(row.values, key, self.columns, self._salt(epoch, key))

    def _salt(self, epoch: int, key: str) -> tuple[int | str, ...] | None:
        return (epoch, key) if self.training else None

    def _key(self, row: StreamRow) -> str:
        key = None if self.columns.key is None else row.values[self.columns.key]
        if key is not None:
            return str(key)
        number = str(row.number) if self.reader.num_files == 1 else f"{row.file}-{row.number}"
        return f"{self.name}:{number}" if self.is_one_of_several else number

    def samples(self, place: ReaderPlace, first_epoch: int, repeat: bool) -> Iterator[Any]:
        read = self._unplanned if place.plan is None else self._planned
        return (self._make(row, epoch) for epoch, row in read(place, first_epoch, repeat))

    def _planned(self, place: ReaderPlace, first_epoch: int, repeat: bool) -> Iterator[tuple[int, StreamRow]]:
        plan, readers = cast(RowPlan, place.plan), (place.num_readers, place.reader)
        start, done = plan.locate(place.delivered, *readers)
        for epoch in itertools.count(start):
            if epoch > first_epoch and not repeat:
                return
            order = plan.order(epoch, *readers, place.buffer)
            for row in self.reader.planned(order, done, self._attach(epoch)):
                yield epoch, row
            done = 0

    def _unplanned(self, place: ReaderPlace, first_epoch: int, repeat: bool) -> Iterator[tuple[int, StreamRow]]:
        passed = 0
        for epoch in itertools.count(first_epoch):
            empty = True
            attach = self._attach(epoch)
            for row in self.reader.unplanned(*place[:2], epoch, self.seed, place.buffer, attach):
                empty = False
                passed += 1
                if passed > place.delivered:
                    yield epoch, row
            if not repeat:
                return
            if empty:
                # Without an error this rank would end its training, and the others would wait for it.
                raise SourceError(
                    f"reader {place.reader + 1} of {place.num_readers} finds no row in the stream {self.name}; use "
                    "fewer processes or DataLoader workers, or more data."
                )
