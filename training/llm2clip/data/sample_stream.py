"""Streams of samples for training: any number of sources and readers, from any place on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import fsspec.asyn
import torch
from torch.utils.data import IterableDataset, get_worker_info

from llm2clip.data.mixing import OneSource, Schedule
from llm2clip.data.opened_table import SourceError
from llm2clip.data.stream_place import Layout, Place
from llm2clip.data.stream_plan import RowPlan, Segment
from llm2clip.utils.files import digest_json


class ReaderPlace(NamedTuple):
    """Where a reader is in a source.

    Attributes:
        num_readers, reader: Number of readers, and which one it is.
        buffer: Rows in its shuffle buffer.
        delivered: Rows that it has yielded.
        plan: The plan of the source; None if its numbers of rows are unknown.
    """

    num_readers: int
    reader: int
    buffer: int
    delivered: int
    plan: RowPlan | None


class Lane(Protocol):
    """A source of a stream.

    Attributes:
        name: Its path, for messages.
    """

    name: str

    @property
    def num_rows(self) -> int | None:
        """Number of rows, or None if unknown."""

    def plan(self, first_epoch: int) -> RowPlan | None:
        """Make the plan of its rows, if their number is known."""

    def fingerprint(self) -> str | None:
        """Return a hash of its files and their numbers of rows, if these are known."""

    def join(self, number: int) -> None:
        """Make it one of several sources of a stream, with its number among them."""

    def require_readers(self, num_readers: int, world_size: int) -> None:
        """Raise a [`SourceError`] if there is nothing to read for some of the readers."""

    def files_digest(self) -> str:
        """Hash the content of the source, of large files a sample."""

    def samples(self, place: ReaderPlace, first_epoch: int, repeat: bool) -> Iterator[Any]:
        """Yield the samples of a reader from a place on; those of one epoch, or with `repeat` without end."""


class SampleStream(IterableDataset):
    """Iterable data set that shares its rows among processes and DataLoader workers itself.

    A reader is a DataLoader worker of a process. What it yields follows from the number of readers, the seed, the
    epoch and how many rows it has yielded, so that it can go on from any [`Place`].

    Args:
        lanes: The sources.
        buffers: Rows in the shuffle buffer of a reader, for each source.
        seed: Seed of the order.
        rank, world_size: The process, and the number of processes.
        repeat: Start the next epoch at the end of the data, so that no rank runs out before another.

    Attributes:
        place: The place to go on from. Without one, iteration starts at the first row of `epoch`.

    Raises:
        ValueError: If `rank` is invalid.
    """

    def __init__(
        self, lanes: Sequence[Lane], buffers: Sequence[int], seed: int, rank: int, world_size: int, repeat: bool
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be between 0 and world_size - 1, but is {rank} of {world_size}.")
        self.lanes, self.buffers, self.seed = lanes, buffers, seed
        self.rank, self.world_size, self.repeat = rank, world_size, repeat
        self.place: Place | None = None
        # In shared memory, so that persistent workers see a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

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
        counts = [lane.num_rows for lane in self.lanes]
        return None if None in counts else sum(filter(None, counts))

    def require_files(self, num_workers: int) -> None:
        """Check before training that every DataLoader worker of every process has something to read.

        Raises:
            SourceError: If there are fewer files than workers, or fewer rows if their number is known.
        """
        for lane in self.lanes:
            lane.require_readers(self.world_size * max(1, num_workers), self.world_size)

    def fingerprints(self) -> list[tuple[str, str | None]]:
        """Return the name of each source, and a hash of its files and numbers of rows if these are known."""
        return [(lane.name, lane.fingerprint()) for lane in self.lanes]

    def content_digest(self) -> str:
        """Hash the content of the sources, of large files a sample."""
        return digest_json([lane.files_digest() for lane in self.lanes])

    def schedule(self, plans: Sequence[RowPlan | None], layout: Layout, reader: int, depth: int) -> Schedule:
        """Return of which source each row of a reader is.

        Args:
            plans: The plans of the sources.
            layout: How the rows are shared.
            reader: The reader.
            depth: Number of layouts before it.
        """
        return OneSource()

    def finished(self, source: int, sample: Any) -> Any:
        """Return the sample of a source as it is yielded."""
        return sample

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self.require_files(workers)
        if worker is not None:
            fsspec.asyn.reset_lock()  # a forked process inherits a lock that nobody releases
        place = self.place or Place((Layout(self.world_size, workers, buffers=tuple(self.buffers)),))
        layout = place.layouts[-1]
        if (layout.world_size, layout.workers) != (self.world_size, workers):
            raise ValueError(f"the place of the stream is of {layout}, but it is read by {workers} workers.")
        plans = [lane.plan(self.epoch) for lane in self.lanes]
        self._add_earlier(plans, place)
        # The first worker yields the next batch, which may be another one's turn.
        number = (number + place.steps()[-1] * layout.accumulation) % workers
        # Ranks first, so that the readers with a file more are on different ranks.
        reader, depth = number * self.world_size + self.rank, len(place.layouts) - 1
        schedule = self.schedule(plans, layout, reader, depth)
        rows = layout.rows_of(reader, place.steps()[-1])
        samples = [
            lane.samples(ReaderPlace(layout.num_readers, reader, buffer, delivered, plan), self.epoch, self.repeat)
            for lane, buffer, delivered, plan in zip(
                self.lanes, layout.buffers, schedule.delivered(rows), plans, strict=True
            )
        ]
        for source in schedule.sources(rows):
            if (sample := next(samples[source], self)) is self:
                return
            yield self.finished(source, sample)

    def _add_earlier(self, plans: Sequence[RowPlan | None], place: Place) -> None:
        """Tell the plans what was read with earlier layouts."""
        for depth, (layout, steps) in enumerate(zip(place.layouts[:-1], place.steps(), strict=False)):
            delivered = [
                self.schedule(plans, layout, reader, depth).delivered(layout.rows_of(reader, steps))
                for reader in range(layout.num_readers)
            ]
            for lane, plan, buffer, rows in zip(
                self.lanes, plans, layout.buffers, zip(*delivered, strict=True), strict=True
            ):
                if plan is None:
                    raise SourceError(
                        f"{lane.name} cannot be read by another number of processes or workers than before, because "
                        "the numbers of its rows are unknown."
                    )
                plan.earlier.append(Segment(layout.num_readers, buffer, rows))
