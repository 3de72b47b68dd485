"""Which row of which source has which place in a stream: arithmetic with numbers of rows, without reading.

The places of a stream are cut into chunks, and chunk `c` of an epoch comes from lane `c % lanes`. A lane is a range of
the epoch's rows, whose files are shuffled; blocks of it are read in sequence and shuffled. A batch of all processes
has a chunk of every lane, so that it is drawn from all of the data. A chunk is at most a quarter of a block, so that
most neighbours in a file are in different batches: at least four batches of encoded rows are in memory for that.

The share of a process in a batch is consecutive chunks, so that processes have lanes of their own. The DataLoader
workers of a process share its lanes, since each makes whole batches: a worker keeps its own rows of a block and skips
the others. In a local tar that costs nothing, since rows are found by their offset; of a remote one, every worker
receives all bytes. Lanes of their own for up to 8 workers would need 8 times the memory for the same shuffle, in every
run, since nothing may depend on how many processes and workers read.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np

from llm2clip.data.rows import stable_seed

# Lanes of a batch of all processes; more for large batches of small blocks, up to a number of files that can be open.
LANES, MOST_LANES = 64, 512
# Rows of a lane that are shuffled together, and in how many batches they are at least.
BLOCK, BATCHES_OF_BLOCK = 256, 4

# The fractional parts of its multiples are spread as evenly as those of any number.
GOLDEN_RATIO = (5**0.5 - 1) / 2

Mixing = Literal["one_source_per_step", "proportional", "weights"]
# Maps places in a stream, (n,) int64, to whether a reader yields their rows, (n,) bool.
IsOwn = Callable[[np.ndarray], np.ndarray]
# Yields rows of a file of a source: the epoch, the number of the file, and those of the rows.
ReadFile = Callable[[int, int, Iterator[int]], Iterator[Any]]


class Lanes(NamedTuple):
    """How a stream is cut.

    Attributes:
        chunk: Consecutive rows of the stream that are of one lane.
        number: Number of lanes.
        batch: Rows in a batch of all processes.
    """

    chunk: int = 1
    number: int = LANES
    batch: int = 1

    @classmethod
    def choose(cls, batch: int, block: int = BLOCK) -> Lanes:
        """Choose lanes for a run.

        Args:
            batch: Rows in a batch of all processes.
            block: Rows of a lane that are shuffled together; 0 keeps all rows in order, in one lane.
        """
        if not block:
            return cls(batch, 1, batch)
        least = min(max(LANES, -(-BATCHES_OF_BLOCK * batch // block)), MOST_LANES)
        if batch <= least:
            return cls(1, -(-least // batch) * batch, batch)
        chunk = next(size for size in range(batch // least, 0, -1) if batch % size == 0)
        # A process keeps its lanes from batch to batch where all batches have the same chunks of them.
        return cls(chunk, batch // chunk if batch // chunk < 2 * least else least, batch)


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
        mixture: How the rows of all sources are mixed; None if all of the stream is its.
        number: Its number among the sources, whose rows are in this order in a chunk.
        seed: Seed of the order.
        first_epoch: Number of the first epoch.
    """

    def __init__(
        self,
        num_rows: int,
        lanes: Lanes,
        mixture: EvenMixture | StepMixture | None = None,
        number: int = 0,
        seed: int = 0,
        first_epoch: int = 0,
    ) -> None:
        self.num_rows, self.lanes, self.mixture, self.number = num_rows, lanes, mixture, number
        self.seed, self.first_epoch = seed, first_epoch
        self.cut = functools.lru_cache(maxsize=2)(self._cut)
        self.count = functools.lru_cache(maxsize=4 * lanes.number)(self._count)
        # For each lane: the epoch, the next chunk, and the rows of the lane before it.
        self._reached: dict[int, tuple[int, int, int]] = {}

    def before(self, places: np.ndarray) -> np.ndarray:
        """Return how many of the source's rows come before places of the stream."""
        return places if self.mixture is None else self.mixture.before(self.number, places)

    def _ahead(self, places: np.ndarray) -> np.ndarray:
        """Return how many rows of the sources whose rows come first in a chunk come before places."""
        if self.mixture is None:
            return np.zeros_like(places)
        return sum((self.mixture.before(other, places) for other in range(self.number)), np.zeros_like(places))

    def _count(self, chunk: int) -> int:
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
        order = np.random.default_rng(stable_seed(self.seed, "lanes", self.first_epoch + epoch)).permutation(numbers)
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
        start, end = self.count(chunk), self.count(chunk + 1)
        begin, end = start + first, end if last is None else min(end, start + last)
        while begin < end:
            epoch, row = divmod(begin, self.num_rows)
            stop = min(end, (epoch + 1) * self.num_rows)
            if chunk in self.cut(epoch).chunks:
                at = self._rows_of_lane(epoch, chunk) + begin - start
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
        if chunk == reached + step:
            rows += self.count(reached + 1) - self.count(reached)
        elif reached < chunk:
            chunks, size = np.arange(reached, chunk, step), self.lanes.chunk
            rows += int((self.before((chunks + 1) * size) - self.before(chunks * size)).sum())
        self._reached[lane] = epoch, chunk, rows
        return rows

    def places(self, epoch: int, chunk: int, rows: int) -> np.ndarray:
        """Return the places of rows of a chunk's lane, from the chunk's first one on, (n,) int64.

        There are at least `rows` of them, or all up to the end of the lane in the epoch.
        """
        size, chunks = self.lanes.chunk, range(chunk, self.cut(epoch).chunks.stop, self.lanes.number)
        number = -(-rows // size)
        while True:
            starts = np.array(chunks[:number], dtype=np.int64) * size
            counts = self.before(starts + size) - self.before(starts)
            if number >= len(chunks) or counts.sum() >= rows:
                break
            number *= 2
        firsts = starts + self._ahead(starts + size) - self._ahead(starts)
        return np.repeat(firsts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())


def row_reader(
    read: ReadFile, row_counts: Sequence[int], order: SourceOrder, block: int, is_own: IsOwn
) -> Callable[[int, int, int], Iterator[Any]]:
    """Return what reads the rows of a source in its order: those of a chunk, from its first to its last one, excluded.

    Args:
        read: Reads rows of a file, given the epoch, the number of the file and those of the rows, ascending, of which
            it asks for the next one only when the one before has been used.
        row_counts: Rows of each file.
        order: Order of the rows.
        block: Rows of a lane that are shuffled together; 0 keeps rows and files in order.
        is_own: Tells which places it is asked for.
    """
    open_lane = functools.partial(LaneReader, read, row_counts, order, block, is_own)
    lanes: dict[int, LaneReader] = {}

    def rows(chunk: int, first: int, last: int) -> Iterator[Any]:
        for piece in order.pieces(chunk, first, last):
            epoch = order.first_epoch + piece.epoch
            if piece.lane is None:
                yield from open_lane(epoch, -1, 0, piece.last).in_order(range(piece.first, piece.last))
                continue
            lane = lanes.get(piece.lane)
            if lane is None or lane.epoch != epoch:
                cut = order.cut(piece.epoch)
                bounds = int(cut.starts[piece.lane]), int(cut.stops[piece.lane])
                lane = lanes[piece.lane] = open_lane(epoch, piece.lane, *bounds)
            yield from lane.read(piece.first, piece.last, chunk, piece.first - first)

    return rows


class LaneReader:
    """Reads the rows of a lane, `start` to `stop` of the epoch's, block by block; its file stays open meanwhile.

    See [`row_reader`] for the other arguments.
    """

    def __init__(
        self,
        read: ReadFile,
        row_counts: Sequence[int],
        order: SourceOrder,
        block: int,
        is_own: IsOwn,
        epoch: int,
        lane: int,
        start: int,
        stop: int,
    ) -> None:
        self.read_file, self.row_counts, self.order, self.size, self.is_own = read, row_counts, order, block, is_own
        self.epoch, self.lane, self.start, self.stop = epoch, lane, start, stop
        # The blocks of the lanes end one after another, not all in one batch.
        self._shift = int(block * (lane * GOLDEN_RATIO % 1))
        # The rows of the block that have not been yielded, by their place in the lane.
        self._block, self._rows = -1, dict[int, Any]()
        # The files of an epoch, one after another, and where each of them ends.
        self._files = np.arange(len(row_counts))
        if block:
            seed = stable_seed(order.seed, "files", epoch)
            self._files = np.random.default_rng(seed).permutation(self._files)
        self._ends = np.cumsum(np.asarray(row_counts)[self._files])
        # The place of the open file, the numbers of the rows to read of it next, and its rows.
        self._position, self._wanted, self._open = -1, deque[int](), iter(list[Any]())

    def read(self, first: int, last: int, chunk: int, at: int) -> Iterator[Any]:
        """Yield the rows from the `first` to the `last` one of the lane, excluded; `at` is that of its chunk."""
        size = self.size
        if not size:
            yield from self.in_order(range(self.start + first, self.start + last))
            return
        for number in range(first, last):
            block = (number + self._shift) // size
            if block != self._block:
                self._rows.clear()  # before the next ones are read
                self._block, self._rows = block, self._read_block(block, number, chunk, at)
            yield self._rows.pop(number)

    def _read_block(self, block: int, first: int, chunk: int, at: int) -> dict[int, Any]:
        """Return the rows of a block that are this reader's, from the `first` one of the lane on, by their place."""
        size = self.size
        begin = max(0, block * size - self._shift)
        end = min(self.stop - self.start, (block + 1) * size - self._shift)
        seed = stable_seed(self.order.seed, "block", self.epoch, self.lane, block)
        order = np.random.default_rng(seed).permutation(end - begin)
        places = self.order.places(self.epoch - self.order.first_epoch, chunk, end - at)[first - at : end - at]
        own = first + np.flatnonzero(self.is_own(places))
        own = own[np.argsort(order[own - begin])]
        rows = self.in_order((self.start + begin + order[own - begin]).tolist())
        return dict(zip(own.tolist(), rows, strict=True))

    def in_order(self, rows: Sequence[int]) -> list[Any]:
        """Return rows of the epoch, whose numbers ascend."""
        result: list[Any] = []
        positions = np.searchsorted(self._ends, rows, side="right").tolist()
        for position, group in itertools.groupby(zip(positions, rows, strict=True), itemgetter(0)):
            file = int(self._files[position])
            begin = int(self._ends[position]) - self.row_counts[file]
            if position != self._position:
                self._position, self._wanted = position, deque()
                # What is to be read next is not known yet when the last row of a block has been read.
                self._open = self.read_file(self.epoch, file, iter(self._wanted.popleft, None))
            self._wanted += [row - begin for _, row in group]
            result += itertools.islice(self._open, len(self._wanted))
        return result


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
