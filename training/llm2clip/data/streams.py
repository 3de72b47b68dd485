"""How the readers of a stream read their shares, and go on in them: no row is yielded twice in an epoch."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from llm2clip.data.sampling import stable_seed
from llm2clip.data.shard_rows import ShardRows
from llm2clip.data.stream_plan import OPEN_FILES, ReaderOrder

T = TypeVar("T")


class StreamRow(NamedTuple):
    """A row of a stream, with the number of its file and its number there: the same in every order and split.

    Attributes:
        attached: What [`StreamReader.planned`] was given to attach to it.
    """

    file: int
    number: int
    values: dict[str, Any]
    attached: Any = None


# Makes, of the number of a file that is about to be read, the function that computes what is attached to its rows.
Attach = Callable[[int], Callable[[StreamRow], Any]]


def share_of_files(num_files: int, num_readers: int, reader: int, epoch: int = 0) -> range:
    """Return the positions of the files that a reader reads in an epoch.

    The readers' shares are disjoint and complete. If the numbers do not divide, some readers have one file more than
    the others, in each epoch other ones, so that no file is read more often than another in the long run.

    Raises:
        ValueError: If there are fewer files than readers.
    """
    if num_files < num_readers:
        raise ValueError(f"{num_files} files cannot be shared by {num_readers} readers.")
    first = (reader + epoch * (num_files % num_readers)) % num_readers
    return range(first, num_files, num_readers)


class StreamReader:
    """Reads one reader's share of a stream, file by file.

    If the numbers of rows are known, readers have equal shares of the rows, and a place in the stream is found without
    reading what comes before it. Otherwise they have equal shares of the files, and rows are passed over.

    Args:
        shards: The files of the stream.
        whole: Read the whole stream and keep every n-th row of it: for the first rows of a source (`max_samples`),
            since the files before a row decide whether it is one of them.
        row_counts: Rows of each file, if they are known.
    """

    def __init__(self, shards: ShardRows, whole: bool = False, row_counts: Sequence[int] | None = None) -> None:
        self.shards, self.whole = shards, whole
        self.row_counts = None if row_counts is None else list(row_counts)
        self.num_files: int = 1 if whole else shards.num_files
        if self.row_counts is not None and len(self.row_counts) != self.num_files:
            raise ValueError(f"row_counts has {len(self.row_counts)} entries for {self.num_files} files.")

    def planned(self, order: ReaderOrder, done: int = 0, attach: Attach | None = None) -> Iterator[StreamRow]:
        """Yield the rows of an order that is known, after the first `done` ones.

        Args:
            attach: Called with the rows of each file in ascending order, before the shuffle.

        Raises:
            SourceError: A file has fewer rows than the order expects.
        """
        if done >= order.num_rows:
            return
        turns, held, step = order.start(done)
        first, opened = dict(turns.rest()), dict[int, Iterator[StreamRow]]()
        buffer: list[StreamRow | None] = [None] * order.size
        places: dict[int, list[tuple[int, int]]] = {}
        for place, found in enumerate(held):
            if found is not None:
                places.setdefault(found[0], []).append((found[1], place))
        for number, wanted in places.items():
            part, wanted = order.parts[number], sorted(wanted)
            rows: Any = part.rows[first.get(number, len(part.rows)) :]
            before = [part.rows[at] for at, _ in wanted]
            opened[number] = self._read(part.file, itertools.chain(before, rows), attach)
            for _, place in wanted:
                buffer[place] = next(opened[number])
            if number not in first:
                opened.pop(number)
        places_drawn = order.places(step)
        while (turn := turns.next()) is not None:
            number, at = turn
            place = next(places_drawn)
            row = buffer[place]
            assert row is not None
            yield row
            part = order.parts[number]
            if number not in opened:
                opened[number] = self._read(part.file, part.rows[at:], attach)
            buffer[place] = next(opened[number])
            if at + 1 == len(part.rows):
                opened.pop(number)
        for place in order.last_places():
            if (row := buffer[place]) is not None:
                yield row

    def unplanned(
        self,
        num_readers: int,
        reader: int,
        epoch: int,
        seed: int,
        shuffle_buffer: int,
        attach: Attach | None = None,
    ) -> Iterator[StreamRow]:
        """Yield the rows of a reader's share of an epoch, if the numbers of rows are unknown.

        Args:
            attach: See [`StreamReader.planned`]; not with `whole`.

        Raises:
            ValueError: If there are fewer files than readers.
        """
        if self.whole:
            kept = itertools.islice(self._all(None), reader, None, num_readers)
            return shuffled(kept, shuffle_buffer, stable_seed(seed, "rows", epoch, reader))
        order = np.arange(self.num_files)
        if shuffle_buffer:
            order = np.random.default_rng(stable_seed(seed, "files", epoch)).permutation(order)
        positions = share_of_files(self.num_files, num_readers, reader, epoch)
        files = (functools.partial(self._all, int(order[position]), attach) for position in positions)
        found = interleaved(files, OPEN_FILES if shuffle_buffer else 1)
        return shuffled(found, shuffle_buffer, stable_seed(seed, "rows", epoch, reader))

    def _all(self, file: int | None, attach: Attach | None = None) -> Iterator[StreamRow]:
        return self._rows(file or 0, self.shards.read_all(file), attach)

    def _read(self, file: int, wanted: Iterable[int], attach: Attach | None) -> Iterator[StreamRow]:
        return self._rows(file, self.shards.read(file, wanted), attach)

    def _rows(
        self, file: int, found: Iterable[tuple[int, dict[str, Any]]], attach: Attach | None
    ) -> Iterator[StreamRow]:
        compute = None if attach is None else attach(file)
        for number, values in found:
            row = StreamRow(file, number, values)
            yield row if compute is None else row._replace(attached=compute(row))


def interleaved(streams: Iterable[Callable[[], Iterator[T]]], width: int) -> Iterator[T]:
    """Yield from `width` iterators in turn; each that ends makes room for the next one, which is only then made."""
    waiting = iter(streams)
    turns = deque(make() for make in itertools.islice(waiting, width))
    end = object()
    while turns:
        current = turns.popleft()
        item: Any = next(current, end)
        if item is end:
            turns.extend(make() for make in itertools.islice(waiting, 1))
        else:
            yield item
            turns.append(current)


def shuffled(items: Iterable[T], size: int, seed: int) -> Iterator[T]:
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
