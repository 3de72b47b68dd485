"""Streams of samples for training: the rows of sharded sources in an order that no number of readers changes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import fsspec.asyn
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from llm2clip.data.mixing import EvenMixture, Mixing, Mixture, StepMixture, checked_weights
from llm2clip.data.opened_table import SourceError
from llm2clip.data.records import NO_EMBEDDING, OnError, SkippedSample
from llm2clip.data.sampling import stable_seed
from llm2clip.data.shard_rows import ShardRows
from llm2clip.data.stream_order import FileOrder, Lanes, Piece, RowsBefore, SourceOrder, shuffled_block
from llm2clip.store.captions import EmbeddingCache
from llm2clip.utils.files import digest_json

logger = logging.getLogger(__name__)
T = TypeVar("T")


class StreamRow(NamedTuple):
    """A row of a stream, with the number of its file and its number there: the same in every order and split.

    Attributes:
        attached: What an [`Attach`] computes of it.
    """

    file: int
    number: int
    values: dict[str, Any]
    attached: Any = None


# Makes, of the number of a file that is about to be read, the function that computes what is attached to its rows.
Attach = Callable[[int], Callable[[StreamRow], Any]]


class Reader(NamedTuple):
    """A DataLoader worker of a process, and what it reads of a source.

    Attributes:
        number, total: Which reader it is, of how many.
        lanes: How the stream is cut.
        before: How many rows of the source come before a place of the stream.
        first_epoch: The epoch at the first place of the stream.
        start: The place from which all readers go on.
        repeat: Begin the next epoch at the end of the data.
    """

    number: int
    total: int
    lanes: Lanes
    before: RowsBefore
    first_epoch: int
    start: int
    repeat: bool


# Yields the samples of a source in a chunk of the stream, from its `first` to its `last` one, excluded.
ReadChunk = Callable[[int, int, int], Iterator[Any]]


class StreamSource(Protocol):
    """A source of a stream.

    Attributes:
        name: Its path, for messages.
    """

    name: str

    @property
    def num_rows(self) -> int | None:
        """Number of rows, or None if unknown."""

    def fingerprint(self) -> str | None:
        """Return a hash of its files and their numbers of rows, if these are known."""

    def join(self, number: int) -> None:
        """Make it one of several sources of a stream, with its number among them."""

    def require_readers(self, num_readers: int, world_size: int) -> None:
        """Raise a [`SourceError`] if there is nothing to read for some of the readers."""

    def files_digest(self) -> str:
        """Hash the content of the source, of large files a sample."""

    def open(self, reader: Reader) -> ReadChunk:
        """Open the source for a reader."""


class SampleStream(IterableDataset):
    """Iterable data set that shares its rows among processes and DataLoader workers itself.

    The order of the rows follows from seed, numbers of rows and [`Lanes`]; process and worker decide only who yields
    which batch. The state of a run is the number of rows that it has consumed.

    With several sources and `proportional`, an epoch has every row of every source once, all of them spread evenly.
    With `weights`, the sources are spread by weight, and one that ends starts its own next epoch. With
    `one_source_per_step`, the batches of all processes in a step come from one source, by weight, or by default in
    proportion to the sizes.

    Args:
        sources: The sources.
        seed: Seed of the order.
        rank, world_size: The process, and the number of processes.
        repeat: Start the next epoch at the end of the data, so that no rank runs out before another.
        mixing: How several sources are mixed.
        weights: Weight of each source, relative to the others; None if there are none.
        lookups: Where the captions of a source are looked up; None if its samples have embeddings, or need none.
        on_error: `raise` an error for a caption that is not found there, or yield a `SkippedSample` (`skip`).

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
        sources: Sequence[StreamSource],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = True,
        mixing: Mixing = "proportional",
        weights: Sequence[float | None] = (),
        lookups: Sequence[EmbeddingCache | None] = (),
        on_error: OnError = "raise",
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be between 0 and world_size - 1, but is {rank} of {world_size}.")
        self.sources, self.seed = sources, seed
        self.rank, self.world_size, self.repeat = rank, world_size, repeat
        self.batch_size = 1
        self.lanes: Lanes | None = None
        self.start: int | None = None
        self.mixing, self.lookups, self.on_error = mixing, lookups or [None] * len(sources), on_error
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

    def content_digest(self) -> str:
        """Hash the content of the sources, of large files a sample."""
        return digest_json([source.files_digest() for source in self.sources])

    def choose_lanes(self, num_workers: int) -> Lanes:
        """Return how the stream is cut for DataLoaders of so many workers."""
        return self.lanes or Lanes.choose(self.batch_size, self.world_size, max(1, num_workers))

    def _mixture(self, lanes: Lanes) -> Mixture | None:
        if len(self.sources) == 1:
            return None
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
        opened = []
        for index, source in enumerate(self.sources):
            before: RowsBefore = _all if mixture is None else lambda places, index=index: mixture.before(index, places)  # type: ignore[misc]
            epoch = self.epoch if self.start is None else 0
            opened.append((before, source.open(Reader(*place, lanes, before, epoch, start, self.repeat))))
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
            for source, (before, read) in enumerate(opened):
                start, stop = before(np.array([chunk * size, (chunk + 1) * size])).tolist()
                count = stop - start
                for sample in read(chunk, min(begin, count), min(end, count)):
                    yield self.finished(source, sample)
                begin, end = max(0, begin - count), max(0, end - count)

    def finished(self, source: int, sample: Any) -> Any:
        """Return the sample of a source as it is yielded."""
        lookup = self.lookups[source]
        if lookup is None or not isinstance(sample, dict):
            return sample
        caption = sample["caption"]
        if self.on_error == "skip" and not lookup.contains([caption])[0]:
            return SkippedSample(str(sample.get("key", caption)), NO_EMBEDDING)
        return {**sample, "llm_embeds": lookup.lookup([caption], dtype=None)[0]}


def _all(places: np.ndarray) -> np.ndarray:
    return places


class CountedReader:
    """Reads the rows of a source whose files have known numbers of rows.

    Args:
        shards: The files.
        row_counts: Rows of each.
        order: Order of the rows.
        block: Rows of a lane that are shuffled together; 0 keeps rows and files in order.
        seed: Seed of the order.
        first_epoch: Number of the first epoch.
        attach: Makes, of the number of an epoch, what is attached to the rows of a file.
    """

    def __init__(
        self,
        shards: ShardRows,
        row_counts: Sequence[int],
        order: SourceOrder,
        block: int,
        seed: int,
        first_epoch: int,
        attach: Callable[[int], Attach | None],
    ) -> None:
        self.shards, self.row_counts, self.order = shards, row_counts, order
        self.block, self.seed, self.first_epoch, self.attach = block, seed, first_epoch, attach
        self._lanes: dict[int, _LaneReader] = {}

    def read(self, chunk: int, first: int, last: int) -> Iterator[tuple[int, StreamRow]]:
        """Yield rows of a chunk, and their epoch; see [`ReadChunk`]."""
        for piece in self.order.pieces(chunk, first, last):
            epoch = self.first_epoch + piece.epoch
            for row in self._rows(piece, epoch):
                yield epoch, row

    def _rows(self, piece: Piece, epoch: int) -> list[StreamRow]:
        if piece.lane is None:
            return _RowRange(self, epoch, piece.last).read(piece.first, piece.last)
        lane = self._lanes.get(piece.lane)
        if lane is None or lane.epoch != epoch:
            cut = self.order.cut(piece.epoch)
            lane = _LaneReader(self, epoch, piece.lane, int(cut.starts[piece.lane]), int(cut.stops[piece.lane]))
            self._lanes[piece.lane] = lane
        return lane.read(piece.first, piece.last)


class _LaneReader:
    """Reads a lane block by block."""

    def __init__(self, source: CountedReader, epoch: int, lane: int, start: int, stop: int) -> None:
        self.source, self.epoch, self.lane, self.start, self.stop = source, epoch, lane, start, stop
        self._range, self._block, self._rows = _RowRange(source, epoch, stop), -1, list[StreamRow]()

    def read(self, first: int, last: int) -> list[StreamRow]:
        """Return the rows from the `first` to the `last` one of the lane, excluded."""
        size, found = self.source.block, list[StreamRow]()
        if not size:
            return self._range.read(self.start + first, self.start + last)
        while first < last:
            block, at = divmod(first, size)
            if block != self._block:
                self._load(block)
            found += self._rows[at : at + last - first]
            first = min(last, (block + 1) * size)
        return found

    def _load(self, block: int) -> None:
        begin = self.start + block * self.source.block
        self._rows = []  # before the next ones are read
        rows = self._range.read(begin, min(self.stop, begin + self.source.block))
        order = shuffled_block(len(rows), self.source.seed, "block", self.epoch, self.lane, block)
        self._block, self._rows = block, [rows[at] for at in order]


class _RowRange:
    """Reads parts of a range of an epoch's rows; a file stays open, since a part mostly begins where one ended.

    Args:
        stop: Where the range ends.
    """

    def __init__(self, source: CountedReader, epoch: int, stop: int) -> None:
        self.source, self.stop = source, stop
        seed = stable_seed(source.seed, "files", epoch) if source.block else None
        self.order, self.attach = FileOrder(source.row_counts, seed), source.attach(epoch)
        self._next, self._rows = (-1, 0), iter(list[StreamRow]())

    def read(self, first: int, last: int) -> list[StreamRow]:
        """Return the rows from the `first` to the `last` one of the epoch, excluded."""
        found: list[StreamRow] = []
        for file, start, stop in self.order.files_of(first, last):
            wanted = range(start, min(self.source.row_counts[file], start + self.stop - first))
            found += self._part(file, wanted, stop - start)
            self._next, first = (file, stop), first + stop - start
        return found

    def _part(self, file: int, wanted: range, count: int) -> list[StreamRow]:
        """Return the first rows of the wanted ones of a file, at which it may be open."""
        if self._next == (file, wanted.start):
            try:
                return list(itertools.islice(self._rows, count))
            except SourceError as error:
                # A server may have ended the connection while other files were read.
                if not self.source.shards.is_remote(file):
                    raise
                logger.warning("Opening %s again at row %d: %s", self.source.shards.files[file], wanted.start, error)
        self._rows = attached(file, self.source.shards.read(file, wanted), self.attach)
        return list(itertools.islice(self._rows, count))


def attached(file: int, rows: Iterator[tuple[int, dict[str, Any]]], attach: Attach | None) -> Iterator[StreamRow]:
    """Yield the numbered rows of a file as those of a stream."""
    compute = None if attach is None else attach(file)
    for number, values in rows:
        row = StreamRow(file, number, values)
        yield row if compute is None else row._replace(attached=compute(row))


def share_of_files(num_files: int, num_readers: int, reader: int, epoch: int = 0) -> range:
    """Return the positions of the files that a reader reads in an epoch, where their rows are not counted.

    The readers' shares are disjoint and complete. If the numbers do not divide, some readers have one file more than
    the others, in each epoch other ones, so that no file is read more often than another in the long run.
    """
    first = (reader + epoch * (num_files % num_readers)) % num_readers
    return range(first, num_files, num_readers)


def shuffled(items: Iterator[T], size: int, seed: int) -> Iterator[T]:
    """Yield each item once, in an order drawn from a buffer of `size` items; 0 keeps the order."""
    generator = np.random.default_rng(seed)
    buffer: list[T] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
        elif buffer:
            place = int(generator.integers(size))
            yield buffer[place]
            buffer[place] = item
        else:
            yield item
    generator.shuffle(buffer)
    yield from buffer
