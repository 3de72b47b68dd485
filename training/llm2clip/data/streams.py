"""Streams of samples for training: the rows of sharded sources in an order that no number of readers changes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import fsspec.asyn
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from llm2clip.data.opened_table import OpenedTable, SourceError
from llm2clip.data.sampling import stable_seed
from llm2clip.data.shard_rows import ShardRows
from llm2clip.data.sources import CaptionSource, open_source, select_source, source_columns, used_columns
from llm2clip.data.stream_order import (
    BLOCK,
    EvenMixture,
    Lanes,
    Mixing,
    RowReader,
    RowsBefore,
    SourceOrder,
    StepMixture,
    checked_weights,
)
from llm2clip.data.table_identity import sampled_files_digest
from llm2clip.utils.files import digest_json

T = TypeVar("T")


# Yields the samples of a source in a chunk of the stream, from its `first` to its `last` one, excluded.
ReadChunk = Callable[[int, int, int], Iterator[Any]]


class SampleStream(IterableDataset):
    """Iterable data set that shares its rows among processes and DataLoader workers itself.

    The order of the rows follows from seed, numbers of rows and [`Lanes`]; process and worker decide only who yields
    which batch. The state of a run is the number of rows that it has consumed.

    With several sources and `proportional`, an epoch has every row of every source once, all of them spread evenly.
    With `weights`, the sources are spread by weight, and one that ends starts its own next epoch. With
    `one_source_per_step`, the batches of all processes in a step come from one source, by weight, or by default in
    proportion to the sizes.

    Args:
        sources: [`StreamedRows`], or [`TableSource`](llm2clip.data.captioned_images.TableSource).
        seed: Seed of the order.
        rank, world_size: The process, and the number of processes.
        repeat: Start the next epoch at the end of the data, so that no rank runs out before another.
        mixing: How several sources are mixed.
        weights: Weight of each source, relative to the others; None if there are none.

    Attributes:
        batch_size: Rows in a batch of a process, which a DataLoader makes of what the stream yields.
        lanes: How the stream is cut; by default as [`Lanes.choose`] does.
        start: The rows that all processes together have consumed before. Without it, iteration starts at the first
            row of `epoch`.

    Raises:
        ValueError: `rank` is invalid, or weights do not fit `mixing`, or are not given for every source.
        SourceError: A number of rows is unknown that `mixing` needs.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = True,
        mixing: Mixing = "proportional",
        weights: Sequence[float | None] = (),
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be between 0 and world_size - 1, but is {rank} of {world_size}.")
        self.sources, self.seed = sources, seed
        self.rank, self.world_size, self.repeat = rank, world_size, repeat
        self.batch_size = 1
        self.lanes: Lanes | None = None
        self.start: int | None = None
        self.mixing = mixing
        # In shared memory, so that persistent workers see a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.weights: list[float] | None = None
        if len(sources) > 1:
            self._join(weights)

    def _join(self, weights: Sequence[float | None]) -> None:
        self.weights = checked_weights([source.name for source in self.sources], self.mixing, weights)
        unknown = [source.name for source in self.sources if source.num_rows is None]
        if unknown and (self.mixing == "proportional" or self.weights is None):
            raise SourceError(
                f"mixing: {self.mixing} needs the number of rows of every source, but that of {unknown[0]} is "
                "unknown. Embed it, which counts its rows, or give every source a weight and set mixing: weights."
            )
        for number, source in enumerate(self.sources):
            source.join(number)

    @property
    def epoch(self) -> int:
        """The epoch of the next pass."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self._epoch.fill_(epoch)

    @property
    def num_rows(self) -> int | None:
        """Rows of all sources, or None if unknown."""
        counts = [source.num_rows for source in self.sources]
        return None if None in counts else sum(filter(None, counts))

    def require_files(self, num_workers: int) -> None:
        """Check before training that every DataLoader worker of every process has something to read.

        Raises:
            SourceError: The rows are not counted, and there are fewer files than workers.
        """
        for source in self.sources:
            source.require_readers(self.world_size * max(1, num_workers), self.world_size)

    def fingerprints(self) -> list[tuple[str, str | None]]:
        """Return the name of each source, and a hash of its files and numbers of rows if these are known."""
        return [(source.name, source.fingerprint()) for source in self.sources]

    def order_settings(self) -> dict[str, Any]:
        """Return in JSON what the order of the rows depends on besides seed, lanes and sources."""
        blocks = [getattr(source, "shuffle_block", None) for source in self.sources]
        return {"shuffle_blocks": blocks, "mixing": self.mixing, "weights": self.weights}

    def content_digest(self) -> str:
        """Hash the content of the sources, of large files a sample."""
        return digest_json([source.files_digest() for source in self.sources])

    def choose_lanes(self, num_workers: int) -> Lanes:
        """Return how the stream is cut for DataLoaders of so many workers."""
        return self.lanes or Lanes.choose(self.batch_size, self.world_size, max(1, num_workers))

    def _mixture(self, lanes: Lanes) -> EvenMixture | StepMixture:
        weights = self.weights or [float(source.num_rows or 0) for source in self.sources]
        if self.mixing == "one_source_per_step":
            return StepMixture(weights, lanes.batch)
        return EvenMixture(weights, self.num_rows if self.mixing == "proportional" else None)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self.require_files(workers)
        if worker is not None:
            fsspec.asyn.reset_lock()  # a forked process inherits a lock that nobody releases
        lanes, start = self.choose_lanes(workers), self.start or 0
        mixture = self._mixture(lanes)
        # Ranks first, so that the readers with a file more are on different ranks.
        place = number * self.world_size + self.rank, workers * self.world_size
        epoch = self.epoch if self.start is None else 0
        opened = []
        for index, source in enumerate(self.sources):
            before = partial(mixture.before, index)
            opened.append((before, source.open(lanes, before, epoch, place, start, self.repeat)))
        end = None if self.repeat else self.num_rows
        for batch in itertools.count(number, workers):
            first = start + (batch * self.world_size + self.rank) * self.batch_size
            last = first + self.batch_size if end is None else min(first + self.batch_size, end)
            if first >= last:
                return
            yielded = 0
            for sample in self._samples(first, last, lanes.chunk, opened):
                yield sample
                yielded += 1
            if yielded < last - first:
                return

    def _samples(
        self, first: int, last: int, size: int, opened: Sequence[tuple[RowsBefore, ReadChunk]]
    ) -> Iterator[Any]:
        """Yield the samples from the `first` to the `last` place of the stream, excluded."""
        for chunk in range(first // size, -(-last // size)):
            begin, end = max(0, first - chunk * size), min(size, last - chunk * size)
            for before, read in opened:
                start, stop = before(np.array([chunk * size, (chunk + 1) * size])).tolist()
                count = stop - start
                yield from read(chunk, min(begin, count), min(end, count))
                begin, end = max(0, begin - count), max(0, end - count)


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
        make_sample: Callable[..., Any],
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
        self.training, self.shuffle_block = training, shuffle_block if training else 0
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
        """Return a hash of its files and their numbers of rows, if these are known."""
        if self.row_counts is None:
            return None
        return digest_json([[*map(os.path.basename, self.shards.files)], self.row_counts])

    def files_digest(self) -> str:
        """Hash the content of the source, of large files a sample."""
        return sampled_files_digest(self.shards.files)

    def join(self, number: int) -> None:
        """Make it one of several sources of a stream, with its number among them."""
        self.is_one_of_several, self.seed = True, stable_seed(self.seed, "source", number)

    def require_readers(self, num_readers: int, world_size: int) -> None:
        """Raise a [`SourceError`] if there is nothing to read for some of the readers."""
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

    def _rows(self, epoch: int, file: int, rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[Callable[[], Any]]:
        """Yield for each numbered row of a file what makes its sample; images are decoded when it is called."""
        make_sample = self._maker(file)
        for number, values in rows:
            key = self._key(file, number, values)
            yield partial(make_sample, values, key, self.columns, self._salt(epoch, key))

    def _maker(self, file: int) -> Callable[..., Any]:
        """Return what makes samples of the rows of a file."""
        return self.make_sample

    def _salt(self, epoch: int, key: str) -> tuple[int | str, ...] | None:
        """Return what the random parts of a sample depend on besides the seed; None if nothing is random."""
        return (epoch, key) if self.training else None

    def _key(self, file: int, number: int, values: Mapping[str, Any]) -> str:
        """Return the key of a row: the same in every order and split."""
        key = None if self.columns.key is None else values[self.columns.key]
        if key is not None:
            return str(key)
        several = self.shards.num_files > 1 and not self.is_cut
        row = f"{file}-{number}" if several else str(number)
        return f"{self.name}:{row}" if self.is_one_of_several else row

    def open(
        self, lanes: Lanes, before: RowsBefore, epoch: int, place: tuple[int, int], start: int, repeat: bool
    ) -> ReadChunk:
        """Open the source for a DataLoader worker of a process.

        Args:
            lanes: How the stream is cut.
            before: How many rows of the source come before a place of the stream.
            epoch: The epoch at the first place of the stream.
            place: Which of all workers it is, and how many there are.
            start: The place of the stream from which all go on.
            repeat: Begin the next epoch at the end of the data.
        """
        if self.row_counts is None:
            uncounted = self._uncounted(place, epoch + start, repeat)
            return lambda chunk, first, last: itertools.islice(uncounted, last - first)
        rows = RowReader(
            lambda epoch, file, start, stop: self._rows(epoch, file, self.shards.read(file, start, stop)),
            self.row_counts,
            SourceOrder(sum(self.row_counts), lanes, before),
            self.shuffle_block,
            self.seed,
            epoch,
        )
        return lambda *part: (make() for make in rows.read(*part))

    def _uncounted(self, place: tuple[int, int], first_epoch: int, repeat: bool) -> Iterator[Any]:
        """Yield the samples of a worker's share of the files; one that goes on begins a new epoch of them."""
        for epoch in itertools.count(first_epoch):
            empty = True
            seed = stable_seed(self.seed, "rows", epoch, place[0])
            for make in shuffled(self._share(place, epoch), self.shuffle_block, seed):
                empty = False
                yield make()
            if not repeat:
                return
            if empty:
                # Without an error this rank would end its training, and the others would wait for it.
                raise SourceError(
                    f"reader {place[0] + 1} of {place[1]} finds no row in the stream {self.name}; use fewer processes "
                    "or DataLoader workers, or more data."
                )

    def _share(self, place: tuple[int, int], epoch: int) -> Iterator[Callable[[], Any]]:
        """Yield the rows of a worker's files; of the first rows of a source, every so many."""
        number, total = place
        if self.is_cut:
            yield from itertools.islice(self._rows(epoch, 0, self.shards.read_all(None)), number, None, total)
            return
        order = np.arange(self.shards.num_files)
        if self.shuffle_block:
            order = np.random.default_rng(stable_seed(self.seed, "files", epoch)).permutation(order)
        for file in order[share_of_files(len(order), total, number, epoch)].tolist():
            yield from self._rows(epoch, file, self.shards.read_all(file))


def share_of_files(num_files: int, num_readers: int, reader: int, epoch: int = 0) -> range:
    """Return the positions of the files that a reader reads in an epoch, where their rows are not counted.

    The readers' shares are disjoint and complete. If the numbers do not divide, some readers have one file more than
    the others, in each epoch other ones, so that no file is read more often than another in the long run.
    """
    first = (reader + epoch * (num_files % num_readers)) % num_readers
    return range(first, num_files, num_readers)


def shuffled(items: Iterable[T], block: int, seed: int) -> Iterator[T]:
    """Yield each item once, in blocks that are shuffled; 0 keeps the order."""
    if not block:
        yield from items
        return
    generator, items = np.random.default_rng(seed), iter(items)
    while found := list(itertools.islice(items, block)):
        yield from (found[place] for place in generator.permutation(len(found)))
