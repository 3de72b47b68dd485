"""Which rows a reader yields when, computed from numbers of rows: no file is read to find a place in a stream."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llm2clip.data.sampling import stable_seed

# Files that fill the shuffle buffer at the same time.
OPEN_FILES = 10
# Places in the buffer that are drawn at once.
DRAWN = 4096


class Part(NamedTuple):
    """Rows of a file, by number, in the order in which they are read."""

    file: int
    rows: Sequence[int] | np.ndarray


class Segment(NamedTuple):
    """What was read while the readers of a run were as many.

    Attributes:
        num_readers: Number of readers.
        buffer: Rows in the shuffle buffer of each.
        delivered: Rows that each had yielded at the end.
    """

    num_readers: int
    buffer: int
    delivered: Sequence[int]


def share_bounds(total: int, num_readers: int, reader: int) -> tuple[int, int]:
    """Return where the share of a reader begins and ends; shares differ by one row at most."""
    return total * reader // num_readers, total * (reader + 1) // num_readers


def share_of_rows(parts: Sequence[Part], num_readers: int, reader: int) -> list[Part]:
    """Return the rows that a reader reads: the parts in their order, cut into equal shares.

    A file at a cut is read by two readers, one of which skips its first rows.
    """
    ends = np.cumsum([0, *(len(part.rows) for part in parts)]).tolist()
    first, last = share_bounds(ends[-1], num_readers, reader)
    return [
        Part(part.file, part.rows[max(first - begin, 0) : last - begin])
        for part, (begin, end) in zip(parts, itertools.pairwise(ends), strict=True)
        if max(begin, first) < min(end, last)
    ]


class Turns:
    """Parts in turn, some of them open at a time; each that ends makes room for the next one.

    Args:
        lengths: Number of rows of each part, at least 1.
        width: Number of parts that are open at a time.
    """

    def __init__(self, lengths: Sequence[int], width: int) -> None:
        self._lengths = lengths
        self._waiting = iter(range(len(lengths)))
        # Each open part, and its next row.
        self._open = deque((part, 0) for part in itertools.islice(self._waiting, width))

    def next(self) -> tuple[int, int] | None:
        """Return the part whose turn it is and the position of its row there; None at the end."""
        if not self._open:
            return None
        part, at = self._open.popleft()
        self._open.extend(self._follow(part, at + 1))
        return part, at

    def _follow(self, part: int, at: int) -> list[tuple[int, int]]:
        if at < self._lengths[part]:
            return [(part, at)]
        return [(part, 0) for part in itertools.islice(self._waiting, 1)]

    def skip(self, count: int) -> None:
        """Go on by so many rows: as many whole rounds at once as no part ends in."""
        while count > 0 and self._open:
            rounds = min(min(self._lengths[part] - at for part, at in self._open), count // len(self._open))
            if not rounds:
                self.next()
                count -= 1
                continue
            count -= rounds * len(self._open)
            went = [self._follow(part, at + rounds) for part, at in self._open]
            self._open = deque(itertools.chain.from_iterable(went))

    def rest(self) -> list[tuple[int, int]]:
        """Return the parts that have rows left, and the position of the first of them."""
        waiting = list(self._waiting)
        self._waiting = iter(waiting)
        return [*self._open, *((part, 0) for part in waiting)]


class Start(NamedTuple):
    """Where a reader goes on.

    Attributes:
        turns: Turns at the first row that is in no buffer yet.
        held: Part and position of each row in the shuffle buffer, by place; None where one was yielded at the end.
        step: Rows that were drawn from the full buffer.
    """

    turns: Turns
    held: list[tuple[int, int] | None]
    step: int


class ReaderOrder:
    """The order of a reader's share: parts in turn, through a shuffle buffer.

    Args:
        parts: The share.
        width: Number of files that are open at a time.
        buffer: Rows in the shuffle buffer, from which the next one is drawn; 0 or 1 keep the order of the turns.
        seed: Seed of the draws.
    """

    def __init__(self, parts: Sequence[Part], width: int, buffer: int, seed: int) -> None:
        self.parts = [part for part in parts if len(part.rows)]
        self.width, self.seed = width, seed
        self.num_rows = sum(len(part.rows) for part in self.parts)
        self.size = min(max(1, buffer), self.num_rows)

    def _turns(self) -> Turns:
        return Turns([len(part.rows) for part in self.parts], self.width)

    def _drawn(self, block: int) -> np.ndarray:
        generator = np.random.default_rng(stable_seed(self.seed, "places", block))
        return generator.integers(self.size, size=DRAWN)

    def places(self, start: int) -> Iterator[int]:
        """Yield the places in the buffer that rows are drawn from, from a row on."""
        for block in itertools.count(start // DRAWN):
            yield from self._drawn(block)[max(0, start - block * DRAWN) :].tolist()

    def last_places(self) -> list[int]:
        """Return the order in which the buffer is emptied at the end."""
        return np.random.default_rng(stable_seed(self.seed, "end")).permutation(self.size).tolist()

    def _positions(self, step: int) -> np.ndarray:
        """Return the position in the turns of each row in the buffer after so many draws, (size,)."""
        held = np.full(self.size, -1)
        # Backwards, until every place is known: row `size + n` takes the place that draw n made free.
        for block in reversed(range(-(-step // DRAWN))):
            places = self._drawn(block)[: step - block * DRAWN]
            numbers = np.arange(block * DRAWN, block * DRAWN + len(places)) + self.size
            unknown = held[places] < 0
            np.maximum.at(held, places[unknown], numbers[unknown])
            if held.min() >= 0:
                return held
        return np.where(held < 0, np.arange(self.size), held)

    def start(self, done: int) -> Start:
        """Find the place of a reader that has yielded so many rows."""
        step = min(done, self.num_rows - self.size)
        positions = self._positions(step)
        for place in self.last_places()[: done - step]:
            positions[place] = -1
        held: list[tuple[int, int] | None] = [None] * self.size
        walk, at = self._turns(), 0
        for place in np.argsort(positions).tolist():
            if positions[place] >= 0:
                walk.skip(int(positions[place]) - at)
                held[place], at = walk.next(), int(positions[place]) + 1
        turns = self._turns()
        turns.skip(step + self.size)
        return Start(turns, held, step)

    def remaining(self, done: int) -> list[Part]:
        """Return the rows that have not been yielded; those of a file in ascending order."""
        start = self.start(done)
        first = dict(start.turns.rest())
        positions: dict[int, list[int]] = {}
        for number, at in filter(None, start.held):
            positions.setdefault(number, []).append(at)
        found = []
        for number, part in enumerate(self.parts):
            rows = part.rows[first.get(number, len(part.rows)) :]
            if number in positions:
                rows = np.sort(np.concatenate([np.asarray(part.rows)[positions[number]], np.asarray(rows, dtype=int)]))
            if len(rows):
                found.append(Part(part.file, rows))
        return found


class RowPlan:
    """The orders of all readers of a source, whose files have known numbers of rows, in all epochs.

    Args:
        row_counts: Rows of each file.
        seed: Seed of the order.
        shuffle: Shuffle the files in each epoch.
        first_epoch: Number of the first epoch.

    Attributes:
        earlier: What was read before with other numbers of readers; the rows left in an epoch are shared anew.
    """

    def __init__(self, row_counts: Sequence[int], seed: int, shuffle: bool = True, first_epoch: int = 0) -> None:
        self.row_counts, self.seed, self.shuffle, self.first_epoch = list(row_counts), seed, shuffle, first_epoch
        self.earlier: list[Segment] = []
        self._parts = functools.lru_cache(maxsize=2)(self._find_parts)

    def parts(self, epoch: int, depth: int | None = None) -> list[Part]:
        """Return what is left of an epoch after the first `depth` segments, by default all of them."""
        return self._parts(epoch, len(self.earlier) if depth is None else depth)

    def _find_parts(self, epoch: int, depth: int) -> list[Part]:
        if depth == 0:
            order = np.arange(len(self.row_counts))
            if self.shuffle:
                order = np.random.default_rng(stable_seed(self.seed, "files", epoch)).permutation(order)
            return [Part(file, range(self.row_counts[file])) for file in order.tolist()]
        segment, before = self.earlier[depth - 1], self.parts(epoch, depth - 1)
        done = [self.delivered_in(epoch, reader, depth - 1) for reader in range(segment.num_readers)]
        if not any(done):
            return before
        left: dict[int, list[np.ndarray]] = {part.file: [] for part in before}
        for reader, rows in enumerate(done):
            for part in self.order(epoch, segment.num_readers, reader, segment.buffer, depth - 1).remaining(rows):
                left[part.file].append(np.asarray(part.rows))
        return [Part(file, np.sort(np.concatenate(rows))) for file, rows in left.items() if rows]

    def share_size(self, epoch: int, num_readers: int, reader: int, depth: int | None = None) -> int:
        """Return the number of rows of a reader's share of an epoch."""
        first, last = share_bounds(sum(len(part.rows) for part in self.parts(epoch, depth)), num_readers, reader)
        return last - first

    def locate(self, delivered: int, num_readers: int, reader: int, depth: int | None = None) -> tuple[int, int]:
        """Return the epoch of a reader that has yielded so many rows, and how many of that epoch."""
        for epoch in itertools.count(self.first_epoch):
            size = self.share_size(epoch, num_readers, reader, depth)
            if delivered < size:
                return epoch, delivered
            delivered -= size
        raise AssertionError

    def delivered_in(self, epoch: int, reader: int, depth: int) -> int:
        """Return how many rows of an epoch a reader of segment `depth` yielded in it."""
        segment = self.earlier[depth]
        at, rows = self.locate(segment.delivered[reader], segment.num_readers, reader, depth)
        if at == epoch:
            return rows
        return 0 if at < epoch else self.share_size(epoch, segment.num_readers, reader, depth)

    def order(self, epoch: int, num_readers: int, reader: int, buffer: int, depth: int | None = None) -> ReaderOrder:
        """Return the order in which a reader reads its share of an epoch."""
        depth = len(self.earlier) if depth is None else depth
        share = share_of_rows(self.parts(epoch, depth), num_readers, reader)
        seed = stable_seed(self.seed, "rows", epoch, reader, depth)
        return ReaderOrder(share, OPEN_FILES if self.shuffle else 1, buffer if self.shuffle else 0, seed)


class TablePlan(RowPlan):
    """The same of a table with random access: its rows are permuted in each epoch, and need no buffer."""

    def _find_parts(self, epoch: int, depth: int) -> list[Part]:
        found = super()._find_parts(epoch, depth)
        generator = np.random.default_rng(stable_seed(self.seed, "table", epoch, depth))
        return [Part(part.file, generator.permutation(np.asarray(part.rows))) for part in found]

    def order(self, epoch: int, num_readers: int, reader: int, buffer: int, depth: int | None = None) -> ReaderOrder:
        return super().order(epoch, num_readers, reader, 0, depth)
