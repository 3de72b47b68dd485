"""How the readers of a stream share its files, and how they shuffle: no row is yielded twice in an epoch."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np

from llm2clip.data.sampling import stable_seed

T = TypeVar("T")

# Files that fill the shuffle buffer at the same time.
OPEN_FILES = 10


class StreamRow(NamedTuple):
    """A row of a stream, with the number of its file and its number there: the same in every order and split.

    Attributes:
        attached: What [`StreamReader.rows`] was given to attach to it.
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


class RowRange(NamedTuple):
    """Consecutive rows of a file, from `start` up to `stop`, or to its end if that is None."""

    file: int
    start: int = 0
    stop: int | None = None


def share_of_rows(row_counts: Sequence[int], order: Sequence[int], num_readers: int, reader: int) -> list[RowRange]:
    """Return the rows that a reader reads, if it is known how many each file has.

    The rows of the files in their order are cut into shares that differ by one row at most. A file at a cut is read by
    two readers, one of which skips its first rows.

    Args:
        row_counts: Rows of each file.
        order: The files, in the order of the epoch.
    """
    bounds = np.cumsum([0, *(row_counts[file] for file in order)]).tolist()
    first, last = (bounds[-1] * number // num_readers for number in (reader, reader + 1))
    shares = [
        RowRange(int(file), max(first - begin, 0), min(last, end) - begin)
        for file, (begin, end) in zip(order, itertools.pairwise(bounds), strict=True)
    ]
    return [share for share in shares if share.stop is not None and share.start < share.stop]


class StreamReader:
    """Reads one reader's share of a stream, file by file.

    Args:
        table: The stream.
        whole: Read the whole stream and keep every n-th row of it: for the first rows of a source (`max_samples`),
            since the files before a row decide whether it is one of them.
        row_counts: Rows of each file, if they are known. Readers then have equal shares of the rows instead of the
            files.
    """

    def __init__(self, table: datasets.IterableDataset, whole: bool, row_counts: Sequence[int] | None = None) -> None:
        self.table, self.whole, self.row_counts = table, whole, row_counts
        self.num_files: int = 1 if whole else table.num_shards

    def rows(
        self,
        num_readers: int,
        reader: int,
        epoch: int = 0,
        seed: int = 0,
        shuffle_buffer: int = 0,
        attach: Attach | None = None,
    ) -> Iterator[StreamRow]:
        """Yield the rows of a reader's share in an epoch.

        Args:
            seed: Seed of the order.
            shuffle_buffer: Number of rows to draw the next one from; 0 keeps rows and files in order.
            attach: Called with the rows of each file in their order, before the shuffle; not with `whole`.

        Raises:
            ValueError: If there are fewer files than readers, and the numbers of their rows are not known.
        """
        if self.whole:
            kept = itertools.islice(self._file(RowRange(0)), reader, None, num_readers)
            return shuffled(kept, shuffle_buffer, stable_seed(seed, "rows", epoch, reader))
        order = np.arange(self.num_files)
        if shuffle_buffer:
            order = np.random.default_rng(stable_seed(seed, "files", epoch)).permutation(order)
        if self.row_counts is None:
            positions = share_of_files(self.num_files, num_readers, reader, epoch)
            share = [RowRange(int(order[position])) for position in positions]
        else:
            share = share_of_rows(self.row_counts, order.tolist(), num_readers, reader)
        files = (lambda part=part: self._file(part, attach) for part in share)
        found = interleaved(files, OPEN_FILES if shuffle_buffer else 1)
        return shuffled(found, shuffle_buffer, stable_seed(seed, "rows", epoch, reader))

    def _file(self, part: RowRange, attach: Attach | None = None) -> Iterator[StreamRow]:
        compute = None if attach is None else attach(part.file)
        table = self.table if self.num_files == 1 else self.table.shard(self.num_files, part.file)
        # Unlike the iterator of the table, its method does not split the rows by DataLoader worker once more.
        for number, batch in itertools.islice(enumerate(table.iter(1)), part.start, part.stop):
            row = StreamRow(part.file, number, {name: values[0] for name, values in batch.items()})
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
