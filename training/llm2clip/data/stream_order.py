"""Which row of which source has which place in a stream: arithmetic with numbers of rows, without reading.

The places of a stream are cut into chunks, and chunk `c` of an epoch comes from lane `c % lanes`. A lane is a range of
the epoch's rows, whose files are shuffled; blocks of it are read in sequence and shuffled. Nothing depends on how many
processes and workers read: if their number divides that of the lanes, each has lanes of its own.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from llm2clip.data.sampling import stable_seed

# Lanes in a batch of all processes, and batches until a lane comes again, which is one of another worker's meanwhile.
LANES_PER_BATCH, CYCLE = 8, 8
# Rows of a lane that are shuffled together.
BLOCK = 256

# The fractional parts of its multiples are spread as evenly as those of any number.
GOLDEN_RATIO = (5**0.5 - 1) / 2

Mixing = Literal["one_source_per_step", "proportional", "weights"]
# Of places in a stream, (n,) int64: how many rows of a source come before each.
RowsBefore = Callable[[np.ndarray], np.ndarray]


class Lanes(NamedTuple):
    """How a stream is cut.

    Attributes:
        chunk: Consecutive rows of the stream that are of one lane.
        number: Number of lanes.
        batch: Rows in a batch of all processes.
    """

    chunk: int = 1
    number: int = LANES_PER_BATCH * CYCLE
    batch: int = 1

    @classmethod
    def choose(cls, batch_size: int, world_size: int = 1, workers: int = 1) -> Lanes:
        """Choose lanes for a run; the same ones for up to 8 processes with up to 8 workers, if these are powers of 2.

        Args:
            batch_size: Rows in a batch of a process.
            world_size: Number of processes.
            workers: DataLoader workers of each, at least 1.
        """
        rows = batch_size * world_size
        in_batch = _divisor(rows, LANES_PER_BATCH)
        if in_batch % world_size:
            in_batch = world_size * _divisor(batch_size, LANES_PER_BATCH // world_size)
        cycle = CYCLE if CYCLE % workers == 0 else workers
        return cls(rows // in_batch, in_batch * cycle, rows)


def _divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number up to a limit."""
    return next(divisor for divisor in range(max(1, min(number, limit)), 0, -1) if number % divisor == 0)


class Piece(NamedTuple):
    """Rows of a chunk that are of one epoch.

    Attributes:
        epoch: The epoch.
        lane: The lane that they are of, or None for rows of a chunk that belongs to two epochs.
        first, last: Their numbers in the lane, or in the epoch, the last one excluded.
    """

    epoch: int
    lane: int | None
    first: int
    last: int


class EpochCut(NamedTuple):
    """How the rows of an epoch of a source are cut into lanes.

    Attributes:
        chunks: The chunks that are of this epoch alone.
        starts, stops: (lanes,) where each lane begins and ends among the epoch's rows. The rows before the first and
            after the last of them are those of the chunks which this epoch shares with its neighbours.
    """

    chunks: range
    starts: np.ndarray
    stops: np.ndarray


class SourceOrder:
    """The order of the rows of a source in a stream.

    Args:
        num_rows: Number of its rows.
        lanes: How the stream is cut.
        before: How many of the source's rows come before a place of the stream; by default all of the stream is its.
    """

    def __init__(self, num_rows: int, lanes: Lanes, before: RowsBefore = lambda positions: positions) -> None:
        self.num_rows, self.lanes, self.before = num_rows, lanes, before
        self.cut = functools.lru_cache(maxsize=2)(self._cut)
        # Of each lane: the epoch, the next chunk, and the rows of the lane before it.
        self._reached: dict[int, tuple[int, int, int]] = {}

    def count(self, chunk: int) -> int:
        """Return how many of the source's rows come before a chunk."""
        return int(self.before(np.array([chunk * self.lanes.chunk]))[0])

    def _cut(self, epoch: int) -> EpochCut:
        first_row, last_row = epoch * self.num_rows, (epoch + 1) * self.num_rows
        first, last = self._chunk_from(first_row), self._chunk_from(last_row)
        if self.count(last) > last_row:
            last -= 1
        last = max(first, last)
        sizes = np.diff(self.before(np.arange(first, last + 1) * self.lanes.chunk))
        numbers = np.arange(self.lanes.number)
        rows = np.bincount(np.arange(first, last) % len(numbers), weights=sizes, minlength=len(numbers))
        # The lanes of a batch follow one another; their rows are in different parts of the epoch.
        order = np.argsort(numbers * GOLDEN_RATIO % 1)
        stops = np.empty_like(numbers)
        stops[order] = min(self.count(first), last_row) - first_row + np.cumsum(rows[order].astype(np.int64))
        return EpochCut(range(first, last), stops - rows.astype(np.int64), stops)

    def _chunk_from(self, row: int) -> int:
        """Return the first chunk that no row below a number comes before."""
        high = 1
        while self.count(high) < row:
            high *= 2
        return bisect.bisect_left(range(high + 1), row, key=self.count)

    def pieces(self, chunk: int, first: int = 0, last: int | None = None) -> Iterator[Piece]:
        """Yield the source's rows in a chunk: all, or those from its `first` to its `last` one, excluded."""
        begin, end = self.count(chunk), self.count(chunk + 1)
        begin, end = begin + first, end if last is None else min(end, begin + last)
        while begin < end:
            epoch, row = divmod(begin, self.num_rows)
            stop = min(end, (epoch + 1) * self.num_rows)
            if chunk in self.cut(epoch).chunks:
                at = self._rows_of_lane(epoch, chunk) + begin - self.count(chunk)
                yield Piece(epoch, chunk % self.lanes.number, at, at + stop - begin)
            else:
                yield Piece(epoch, None, row, row + stop - begin)
            begin = stop

    def _rows_of_lane(self, epoch: int, chunk: int) -> int:
        """Return how many rows of a chunk's lane come before it in an epoch."""
        lane, step = chunk % self.lanes.number, self.lanes.number
        known, reached, rows = self._reached.get(lane, (epoch, -1, 0))
        if known != epoch or not 0 <= reached <= chunk:
            start = self.cut(epoch).chunks.start
            reached, rows = start + (lane - start) % step, 0
        chunks = np.arange(reached, chunk, step)
        if len(chunks):
            size = self.lanes.chunk
            rows += int((self.before((chunks + 1) * size) - self.before(chunks * size)).sum())
        self._reached[lane] = epoch, chunk, rows
        return rows


class RowReader:
    """Reads the rows of a source in its order, where the number of rows of each file is known.

    Args:
        read: Reads rows of a file, given the epoch, the number of the file, the first row and the one after the last.
        row_counts: Rows of each file.
        order: Order of the rows.
        block: Rows of a lane that are shuffled together; 0 keeps rows and files in order.
        seed: Seed of the order.
        first_epoch: Number of the first epoch.
    """

    def __init__(
        self,
        read: Callable[[int, int, int, int], Iterator[Any]],
        row_counts: Sequence[int],
        order: SourceOrder,
        block: int,
        seed: int,
        first_epoch: int,
    ) -> None:
        self.read_file, self.row_counts, self.order = read, row_counts, order
        self.block, self.seed, self.first_epoch = block, seed, first_epoch
        self._lanes: dict[int, _LaneReader] = {}

    def read(self, chunk: int, first: int, last: int) -> Iterator[Any]:
        """Yield the rows of a chunk, from its `first` to its `last` one, excluded."""
        for piece in self.order.pieces(chunk, first, last):
            epoch = self.first_epoch + piece.epoch
            if piece.lane is None:
                yield from _LaneReader(self, epoch, -1, 0, piece.last).in_order(piece.first, piece.last)
            else:
                lane = self._lanes.get(piece.lane)
                if lane is None or lane.epoch != epoch:
                    cut = self.order.cut(piece.epoch)
                    bounds = int(cut.starts[piece.lane]), int(cut.stops[piece.lane])
                    lane = self._lanes[piece.lane] = _LaneReader(self, epoch, piece.lane, *bounds)
                yield from lane.read(piece.first, piece.last)


class _LaneReader:
    """Reads the rows of a lane, `start` to `stop` of the epoch's, block by block; its file stays open meanwhile."""

    def __init__(self, source: RowReader, epoch: int, lane: int, start: int, stop: int) -> None:
        self.source, self.epoch, self.lane, self.start, self.stop = source, epoch, lane, start, stop
        self._block, self._rows = -1, list[Any]()
        # The files of an epoch, one after another, and where each of them ends.
        self._files = np.arange(len(source.row_counts))
        if source.block:
            seed = stable_seed(source.seed, "files", epoch)
            self._files = np.random.default_rng(seed).permutation(self._files)
        self._ends = np.cumsum(np.asarray(source.row_counts)[self._files])
        # The file and row at which the rows of the open file go on.
        self._position, self._open = (-1, 0), iter(list[Any]())

    def read(self, first: int, last: int) -> list[Any]:
        """Return the rows from the `first` to the `last` one of the lane, excluded."""
        size, result = self.source.block, list[Any]()
        if not size:
            return self.in_order(self.start + first, self.start + last)
        while first < last:
            block, at = divmod(first, size)
            if block != self._block:
                begin = self.start + block * size
                self._rows = []  # before the next ones are read
                rows = self.in_order(begin, min(self.stop, begin + size))
                seed = stable_seed(self.source.seed, "block", self.epoch, self.lane, block)
                order = np.random.default_rng(seed).permutation(len(rows))
                self._block, self._rows = block, [rows[number] for number in order]
            result += self._rows[at : at + last - first]
            first = min(last, (block + 1) * size)
        return result

    def in_order(self, first: int, last: int) -> list[Any]:
        """Return the rows from the `first` to the `last` one of the epoch, excluded."""
        rows: list[Any] = []
        while first < last:
            position = int(np.searchsorted(self._ends, first, side="right"))
            file, end = int(self._files[position]), int(self._ends[position])
            start, stop = first - end + self.source.row_counts[file], min(last, end)
            if self._position != (file, start):
                # Up to the end of the lane, since the next part mostly begins where this one ends.
                until = min(self.source.row_counts[file], start + self.stop - first)
                self._open = self.source.read_file(self.epoch, file, start, until)
            rows += itertools.islice(self._open, stop - first)
            self._position, first = (file, start + stop - first), stop
        return rows


class EvenMixture:
    """Rows of all sources, spread evenly.

    Args:
        weights: Share of each source. If they are its number of rows, all sources end their epochs at the same place.
        period: The sum of the numbers of rows, if the weights are these.
    """

    def __init__(self, weights: Sequence[float], period: int | None = None) -> None:
        self.weights, self.period = weights, period

    def before(self, source: int, positions: np.ndarray) -> np.ndarray:
        epochs, left = (0, positions) if self.period is None else np.divmod(positions, self.period)
        # Each source takes its share of what those before it leave: so the rows of all sources are the places.
        for number, weight in enumerate(self.weights):
            rest = sum(self.weights[number:])
            taken = left if number == len(self.weights) - 1 else self._share(left, weight, rest)
            if number == source:
                return taken + (0 if self.period is None else epochs * np.int64(weight))
            left = left - taken
        raise IndexError(source)

    def _share(self, positions: np.ndarray, weight: float, rest: float) -> np.ndarray:
        if self.period is not None and max(weight, rest) < 2**31:
            return positions * int(weight) // max(1, int(rest))
        return np.floor(positions * (weight / rest)).astype(np.int64)


class StepMixture:
    """Steps of one source each, spread evenly.

    Args:
        weights: Share of each source.
        batch: Rows in a step.
    """

    def __init__(self, weights: Sequence[float], batch: int) -> None:
        self.bounds, self.batch = np.cumsum(weights) / sum(weights), batch
        # (steps + 1, sources) how many steps of each source come before a step.
        self._steps = np.zeros((1, len(weights)), dtype=np.int64)

    def before(self, source: int, positions: np.ndarray) -> np.ndarray:
        steps, rest = np.divmod(positions, self.batch)
        known = self._known(int(steps.max(initial=0)) + 1)[:, source]
        return known[steps] * self.batch + (known[steps + 1] - known[steps]) * rest

    def _known(self, steps: int) -> np.ndarray:
        if len(self._steps) <= steps:
            drawn = (0.5 + np.arange(max(steps, 2 * len(self._steps))) * GOLDEN_RATIO) % 1
            sources = np.searchsorted(self.bounds[:-1], drawn, side="right")
            counted = np.cumsum(sources[:, None] == np.arange(len(self.bounds)), axis=0)
            self._steps = np.concatenate([np.zeros_like(counted[:1]), counted])
        return self._steps


def checked_weights(names: Sequence[str], mixing: Mixing, weights: Sequence[float | None]) -> list[float] | None:
    """Return the weights of sources, None if there are none.

    Raises:
        ValueError: They do not fit `mixing`, or are not given for every source.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        if mixing == "weights":
            raise ValueError("mixing: weights needs a weight for every source.")
        return None
    if mixing == "proportional":
        raise ValueError(
            "mixing: proportional has no weights; remove weight from the sources, or set mixing: weights."
        )
    if len(given) < len(names):
        missing = next(name for name, weight in zip(names, weights, strict=True) if weight is None)
        raise ValueError(f"the source {missing} has no weight, but others have; set it for every source or for none.")
    return given
