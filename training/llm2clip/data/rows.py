"""The rows of caption sources, map-style and streamed: where a row is read, and the key that names it."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from llm2clip.data.image_keys import sampled_keys
from llm2clip.data.opened_table import OpenedTable, SourceError
from llm2clip.data.sampling import ConcatenatedTables, SampleIndex, stable_seed
from llm2clip.data.shard_rows import ShardRows
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
from llm2clip.data.stream_order import BLOCK, Lanes, SourceOrder
from llm2clip.data.streams import (
    Attach,
    CountedReader,
    ReadChunk,
    Reader,
    SampleStream,
    StreamRow,
    attached,
    share_of_files,
    shuffled,
)
from llm2clip.data.table_identity import rows_digest, sampled_files_digest
from llm2clip.utils.files import digest_json
from llm2clip.utils.library_errors import wrap_read_errors

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
        with wrap_read_errors(self.sources[number].path, SourceError):
            row = self.tables[number][offset]
        salt = None if epoch is None else (epoch, position)
        return self.make_sample(row, self._key(number, offset, row), self.columns[number], salt)


class TableSource:
    """A map-style source as one of the sources of a stream: its rows are permuted in each epoch.

    Args:
        dataset: A data set of one source.
        seed: Seed of the order.
    """

    def __init__(self, dataset: CaptionRows, seed: int) -> None:
        self.dataset, self.seed, self.name = dataset, seed, dataset.sources[0].path

    @property
    def num_rows(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> str:
        return digest_json(len(self.dataset))

    def files_digest(self) -> str:
        return self.dataset.content_digest()

    def join(self, number: int) -> None:
        self.dataset.is_one_of_several, self.seed = True, stable_seed(self.seed, "source", number)

    def require_readers(self, num_readers: int, world_size: int) -> None:
        """Any number of readers can share a table."""

    def open(self, reader: Reader) -> ReadChunk:
        order = SourceOrder(len(self.dataset), reader.lanes, reader.before)

        @functools.lru_cache(maxsize=2)
        def rows(epoch: int) -> np.ndarray:
            return np.random.default_rng(stable_seed(self.seed, "table", epoch)).permutation(len(self.dataset))

        def read(chunk: int, first: int, last: int) -> Iterator[Any]:
            begin = order.count(chunk)
            for row in range(begin + first, begin + last):
                passed, place = divmod(row, len(self.dataset))
                epoch = reader.first_epoch + passed
                yield self.dataset[SampleIndex(epoch, int(rows(epoch)[place]))]

        return read


class StreamedRows(SampleStream):
    """Iterable data set of what `make_sample` makes of the rows of a stream; see [`StreamingCaptionImageDataset`].

    Args:
        make_sample: The function, called in the worker processes too.
        with_images: Read the images.
        opened: The table of the source, if it is open.

    Raises:
        FileNotFoundError, SourceError: If the source cannot be read, or (when iterating) its rows are not counted and
            it has fewer files than readers.
        ValueError: If the source is not set to streaming, or `rank` is invalid.
    """

    def __init__(
        self,
        source: CaptionSource,
        make_sample: SampleFunction,
        with_images: bool,
        training: bool = True,
        seed: int = 0,
        shuffle_block: int = BLOCK,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = False,
        row_counts: Sequence[int] | None = None,
        opened: OpenedTable | None = None,
    ) -> None:
        if not source.streaming:
            raise ValueError(f"{source.path} is not set to streaming; use CaptionImageDataset or streaming: true.")
        self.source, self.name = source, source.path
        super().__init__([self], seed, rank, world_size, repeat)
        self.shuffle_block = shuffle_block if training else 0
        self.make_sample = make_sample
        opened = opened or open_source(source)
        self.row_counts = None if row_counts is None else list(row_counts)
        # If rows are not counted, all readers read the first ones, and keep a share: of which file a row is, decide
        # the files before it.
        self.is_cut = source.max_samples is not None and row_counts is None
        whole = source if self.is_cut else replace(source, max_samples=None)
        self.table = select_source(whole, opened, with_images)
        self.columns = source_columns(source, self.table, with_images)
        columns = used_columns(self.columns, opened.table)
        self.shards = ShardRows(self.table, columns, opened.files, source.caption_columns)
        if self.row_counts is not None and len(self.row_counts) != self.shards.num_files:
            raise ValueError(f"row_counts has {len(self.row_counts)} entries for {self.shards.num_files} files.")
        self.training = training
        # Whether row numbers name the rows of several sources.
        self.is_one_of_several = False

    @property
    def num_rows(self) -> int | None:
        return None if self.row_counts is None else sum(self.row_counts)

    def choose_lanes(self, num_workers: int) -> Lanes:
        # In order, all rows are of one lane.
        found = super().choose_lanes(num_workers)
        return found if self.shuffle_block or self.lanes else Lanes(found.batch, 1, found.batch)

    def fingerprint(self) -> str | None:
        if self.row_counts is None:
            return None
        return digest_json([[*map(os.path.basename, self.shards.files)], self.row_counts])

    def files_digest(self) -> str:
        return sampled_files_digest(self.shards.files)

    def join(self, number: int) -> None:
        self.is_one_of_several, self.seed = True, stable_seed(self.seed, "source", number)

    def require_readers(self, num_readers: int, world_size: int) -> None:
        if self.num_rows == 0:
            raise SourceError(f"the stream {self.name} has no rows.")
        if self.is_cut and (rows := self.source.max_samples or 0) < num_readers:
            raise SourceError(f"the stream {self.name} has {rows} rows, fewer than {num_readers} readers.")
        if self.num_rows is None and not self.is_cut and self.shards.num_files < num_readers:
            workers = num_readers // world_size
            each = f" with {workers} DataLoader workers each" if workers > 1 else ""
            raise SourceError(
                f"the stream {self.name} has {self.shards.num_files} files, which is fewer than {num_readers} readers "
                f"({world_size} processes{each}). Split the data into more files, lower dataloader_num_workers, or "
                "set streaming: false."
            )

    def _attach(self, epoch: int) -> Attach | None:
        """Return what computes the values that are attached to rows while their file is read, if anything."""
        return None

    def _make(self, row: StreamRow, epoch: int) -> Any:
        """Make the sample of a row."""
        key = self._key(row)
        return self.make_sample(row.values, key, self.columns, self._sample_seed(epoch, key))

    def _sample_seed(self, epoch: int, key: str) -> tuple[int | str, ...] | None:
        return (epoch, key) if self.training else None

    def _key(self, row: StreamRow) -> str:
        key = None if self.columns.key is None else row.values[self.columns.key]
        if key is not None:
            return str(key)
        several = self.shards.num_files > 1 and not self.is_cut
        number = f"{row.file}-{row.number}" if several else str(row.number)
        return f"{self.name}:{number}" if self.is_one_of_several else number

    def open(self, reader: Reader) -> ReadChunk:
        if self.row_counts is None:
            uncounted = self._uncounted(reader)
            return lambda chunk, first, last: itertools.islice(uncounted, last - first)
        order = SourceOrder(sum(self.row_counts), reader.lanes, reader.before)
        counted = CountedReader(
            self.shards, self.row_counts, order, self.shuffle_block, self.seed, reader.first_epoch, self._attach
        )

        def read(chunk: int, first: int, last: int) -> Iterator[Any]:
            return (self._make(row, epoch) for epoch, row in counted.read(chunk, first, last))

        return read

    def _uncounted(self, reader: Reader) -> Iterator[Any]:
        """Yield the samples of a reader's share of the files; one that goes on begins a new epoch of them."""
        for epoch in itertools.count(reader.first_epoch + reader.start):
            empty = True
            for row in self._uncounted_rows(reader, epoch):
                empty = False
                yield self._make(row, epoch)
            if not reader.repeat:
                return
            if empty:
                # Without an error this rank would end its training, and the others would wait for it.
                raise SourceError(
                    f"reader {reader.number + 1} of {reader.total} finds no row in the stream {self.name}; use "
                    "fewer processes or DataLoader workers, or more data."
                )

    def _uncounted_rows(self, reader: Reader, epoch: int) -> Iterator[StreamRow]:
        attach = self._attach(epoch)
        if self.is_cut:
            every = attached(0, self.shards.read_all(None), attach)
            rows: Iterator[StreamRow] = itertools.islice(every, reader.number, None, reader.total)
        else:
            order = np.arange(self.shards.num_files)
            if self.shuffle_block:
                order = np.random.default_rng(stable_seed(self.seed, "files", epoch)).permutation(order)
            files = order[share_of_files(len(order), reader.total, reader.number, epoch)].tolist()
            rows = itertools.chain.from_iterable(attached(file, self.shards.read_all(file), attach) for file in files)
        return shuffled(rows, self.shuffle_block, stable_seed(self.seed, "rows", epoch, reader.number))
