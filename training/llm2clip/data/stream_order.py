"""Which row of a source has which place in a stream: arithmetic with numbers of rows, without reading.

The places of a stream are cut into chunks, and chunk `c` of an epoch comes from lane `c % lanes`. A lane is a range of
the epoch's rows, whose files are shuffled; blocks of it are read in sequence and shuffled. Nothing depends on how many
processes and workers read: if their number divides that of the lanes, each has lanes of its own.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llm2clip.data.sampling import stable_seed

# Lanes in a batch of all processes, and batches until a lane comes again, which is one of another worker's meanwhile.
LANES_PER_BATCH, CYCLE = 8, 8
# Rows of a lane that are shuffled together.
BLOCK = 256

# The fractional parts of its multiples are spread as evenly as those of any number.
GOLDEN_RATIO = (5**0.5 - 1) / 2

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

    def __init__(self, num_rows: int, lanes: Lanes, before: RowsBefore = lambda places: places) -> None:
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


class FileOrder:
    """The files of an epoch, one after another.

    Args:
        row_counts: Rows of each file.
        seed: Seed of their order; None keeps it.
    """

    def __init__(self, row_counts: Sequence[int], seed: int | None) -> None:
        order = np.arange(len(row_counts))
        self.files = order if seed is None else np.random.default_rng(seed).permutation(order)
        self.ends = np.cumsum(np.asarray(row_counts)[self.files])

    def files_of(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield the file, first and last row of each part of the rows `first` to `last`, excluded, of the epoch."""
        position = int(np.searchsorted(self.ends, first, side="right"))
        for number in itertools.count(position):
            if first >= last:
                return
            end = int(self.ends[number])
            begin = int(self.ends[number - 1]) if number else 0
            stop = min(last, end)
            if first < stop:
                yield int(self.files[number]), first - begin, stop - begin
            first = stop


def shuffled_block(rows: int, *seed: int | str) -> list[int]:
    """Return the order of the rows of a block."""
    return np.random.default_rng(stable_seed(*seed)).permutation(rows).tolist()
