"""The rows of caption sources, map-style and streamed: where a row is read, and the key that names it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import fsspec.asyn
import torch
from torch.utils.data import IterableDataset, get_worker_info

from llm2clip.data.sampling import ConcatenatedTables, SampleIndex
from llm2clip.data.sources import CaptionSource, Columns, SourceError, load_source, source_columns
from llm2clip.data.streams import Attach, StreamReader, StreamRow

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
        super().__init__([load_source(source, with_images) for source in self.sources])
        self.columns = [source_columns(*pair, with_images) for pair in zip(self.sources, self.tables, strict=True)]

    def _key(self, number: int, position: int, row: Mapping[str, Any]) -> str:
        column = self.columns[number].key
        if column is not None and row[column] is not None:
            return str(row[column])
        return str(position) if len(self.sources) == 1 else f"{self.sources[number].path}:{position}"

    def __getitem__(self, index: SampleIndex | int) -> Any:
        epoch, position, number, offset = self.locate(index)
        row = self.tables[number][offset]
        salt = None if epoch is None else (epoch, position)
        return self.make_sample(row, self._key(number, offset, row), self.columns[number], salt)


class StreamedRows(IterableDataset):
    """Iterable data set of what `make_sample` makes of the rows of a stream; see [`StreamingCaptionImageDataset`].

    Args:
        make_sample: The function, called in the worker processes too.
        with_images: Read the images.

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
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be between 0 and world_size - 1, but is {rank} of {world_size}.")
        if not source.streaming:
            raise ValueError(f"{source.path} is not set to streaming; use CaptionImageDataset or streaming: true.")
        self.source = source
        self.make_sample = make_sample
        self.table = load_source(source, with_images)
        self.columns = source_columns(source, self.table, with_images)
        self.reader = StreamReader(self.table, source.max_samples is not None, row_counts)
        self.training, self.seed, self.repeat = training, seed, repeat
        self.shuffle_buffer = shuffle_buffer if training else 0
        self.rank, self.world_size = rank, world_size
        # In shared memory, so that persistent workers see a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch of the next pass."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self._epoch.fill_(epoch)

    def require_files(self, num_workers: int) -> None:
        """Check before training that every DataLoader worker of every process has something to read.

        Raises:
            SourceError: If there are fewer files than workers, or fewer rows if their number is known.
        """
        workers = max(1, num_workers)
        if self.reader.row_counts is not None:
            if sum(self.reader.row_counts) < self.world_size * workers:
                raise SourceError(
                    f"the stream {self.source.path} has {sum(self.reader.row_counts)} rows, fewer than "
                    f"{self.world_size * workers} readers."
                )
            return
        if not self.reader.whole and self.reader.num_files < self.world_size * workers:
            each = f" with {workers} DataLoader workers each" if workers > 1 else ""
            raise SourceError(
                f"the stream {self.source.path} has {self.reader.num_files} files, which is fewer than "
                f"{self.world_size * workers} readers ({self.world_size} processes{each}). Split the data into more "
                "files, lower dataloader_num_workers, or set streaming: false."
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
        return str(row.number) if self.reader.num_files == 1 else f"{row.file}-{row.number}"

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self.require_files(workers)
        if worker is not None:
            fsspec.asyn.reset_lock()  # a forked process inherits a lock that nobody releases
        # Ranks first, so that the readers with a file more are on different ranks.
        reader, num_readers = number * self.world_size + self.rank, workers * self.world_size
        for epoch in itertools.count(self.epoch):
            empty = True
            attach = self._attach(epoch)
            for row in self.reader.rows(num_readers, reader, epoch, self.seed, self.shuffle_buffer, attach):
                empty = False
                yield self._make(row, epoch)
            if empty or not self.repeat:
                return
