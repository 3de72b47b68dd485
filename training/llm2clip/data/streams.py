"""Streams of rows for training: those of sharded sources in an order that no number of readers changes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import fsspec.asyn
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from llm2clip.data.captioned_images import CaptionImageDataset
from llm2clip.data.formats import SourceError
from llm2clip.data.opened_table import OpenedTable
from llm2clip.data.rows import captioned_row, stable_seed
from llm2clip.data.sampling import SampleIndex
from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.data.sources import CaptionSource
from llm2clip.data.stream_order import (
    BLOCK,
    EvenMixture,
    IsOwn,
    Lanes,
    Mixing,
    SourceOrder,
    StepMixture,
    checked_weights,
    row_reader,
)
from llm2clip.data.table_identity import sampled_files_digest
from llm2clip.files.atomic import digest_json
from llm2clip.store import EmbeddingCache

# Yields the rows of a source in a chunk of the stream, from its `first` to its `last` one, excluded.
ReadChunk = Callable[[int, int, int], Iterator[Any]]


class SampleStream(IterableDataset):
    """Iterable data set of rows that it shares among processes and DataLoader workers itself.

    The order of the rows follows from seed, numbers of rows and [`Lanes`]; process and worker decide only who yields
    which batch. The state of a run is the number of rows that it has consumed.

    With several sources and `proportional`, an epoch has every row of every source once, all of them spread evenly.
    With `weights`, the sources are spread by weight, and one that ends starts its own next epoch. With
    `one_source_per_step`, the batches of all processes in a step come from one source, by weight, or by default in
    proportion to the sizes.

    Args:
        sources: [`StreamingCaptionImageDataset`], or [`TableSource`].
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
            self.weights = checked_weights([source.name for source in sources], mixing, weights)
            for number, source in enumerate(sources):
                source.join(number)

    @property
    def epoch(self) -> int:
        """The epoch of the next pass."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self._epoch.fill_(epoch)

    @property
    def num_rows(self) -> int:
        """Rows of all sources."""
        return sum(source.num_rows for source in self.sources)

    def fingerprints(self) -> list[tuple[str, str]]:
        """Return the name of each source, and a hash of its files and numbers of rows."""
        return [(source.name, source.fingerprint()) for source in self.sources]

    def order_settings(self) -> dict[str, Any]:
        """Return in JSON what the order of the rows depends on besides seed, lanes and sources."""
        blocks = [getattr(source, "shuffle_block", None) for source in self.sources]
        return {"shuffle_blocks": blocks, "mixing": self.mixing, "weights": self.weights}

    def content_digest(self) -> str:
        """Hash the content of the sources, of large files a sample."""
        return digest_json([source.files_digest() for source in self.sources])

    def choose_lanes(self) -> Lanes:
        """Return how the stream is cut."""
        blocks = [source.shuffle_block for source in self.sources if hasattr(source, "shuffle_block")]
        return self.lanes or Lanes.choose(self.batch_size * self.world_size, min(blocks, default=BLOCK))

    def _mixture(self, lanes: Lanes) -> EvenMixture | StepMixture | None:
        if len(self.sources) == 1:
            return None
        weights = self.weights or [float(source.num_rows) for source in self.sources]
        if self.mixing == "one_source_per_step":
            return StepMixture(weights, lanes.batch)
        return EvenMixture(weights, self.num_rows if self.mixing == "proportional" else None)

    def __iter__(self) -> Iterator[Any]:
        number, workers = data_worker()
        lanes, start = self.choose_lanes(), self.start or 0
        mixture = self._mixture(lanes)
        epoch = self.epoch if self.start is None else 0

        def is_own(places: np.ndarray) -> np.ndarray:
            batches, ranks = np.divmod((places - start) // self.batch_size, self.world_size)
            return (places >= start) & (ranks == self.rank) & (batches % workers == number)

        opened = []
        for index, source in enumerate(self.sources):
            order = SourceOrder(source.num_rows, lanes, mixture, index, source.seed, epoch)
            opened.append((order, source.open(order, is_own)))
        end = None if self.repeat else self.num_rows
        for batch in itertools.count(number, workers):
            first = start + (batch * self.world_size + self.rank) * self.batch_size
            last = first + self.batch_size if end is None else min(first + self.batch_size, end)
            if first >= last:
                return
            yield from self._rows_of(first, last, lanes.chunk, opened)

    def _rows_of(
        self, first: int, last: int, size: int, opened: Sequence[tuple[SourceOrder, ReadChunk]]
    ) -> Iterator[Any]:
        """Yield the rows from the `first` to the `last` place of the stream, excluded."""
        for chunk in range(first // size, -(-last // size)):
            begin, end = max(0, first - chunk * size), min(size, last - chunk * size)
            for order, read in opened:
                count = order.count(chunk + 1) - order.count(chunk)
                yield from read(chunk, min(begin, count), min(end, count))
                begin, end = max(0, begin - count), max(0, end - count)


def data_worker() -> tuple[int, int]:
    """Return the number of this DataLoader worker, and how many there are; 0 and 1 where there are none."""
    worker = get_worker_info()
    if worker is None:
        return 0, 1
    fsspec.asyn.reset_lock()  # a forked process inherits a lock that nobody releases
    return worker.id, worker.num_workers


class StreamingCaptionImageDataset(SampleStream):
    """Iterable data set of captioned images, read as a shuffled stream.

    Rows are those of [`CaptionImageDataset`]; their drawn caption and crop are functions of seed, epoch and key. The
    order of the rows is the same for any number of ranks and DataLoader workers; see [`SampleStream`]. Since the data
    set shards itself, accelerate must not shard or dispatch its loader. Without a key column, the key of a row is its
    number in its file, preceded by the number of the file and `-` if there are several.

    Args:
        with_images: Read the images. Without, rows have no `image`.
        training: Draw captions and crops; False takes first captions and whole images, in order.
        seed: Seed of order, drawn captions and crops.
        shuffle_block: Rows that are shuffled together; 0 keeps rows and files in order.
        repeat: Start the next epoch at the end of the data, so that no rank runs out before another; for training by
            number of steps.
        embeddings: The embeddings of the captions, which the rows then name: a cache, or the sidecars of the files.
        row_counts: Rows of each file, without those beyond `max_samples`; by default those that the sidecars state, or
            else they are counted.
        opened: The table of the source, if it is open.

    Raises:
        FileNotFoundError, SourceError: If the source cannot be read, is not set to streaming, or has no rows.
        ValueError: If `rank` is invalid, or there are sidecars and `max_samples`.
    """

    def __init__(
        self,
        source: CaptionSource,
        with_images: bool = True,
        training: bool = True,
        seed: int = 0,
        shuffle_block: int = BLOCK,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = False,
        embeddings: EmbeddingCache | SourceSidecars | None = None,
        row_counts: Sequence[int] | None = None,
        opened: OpenedTable | None = None,
    ) -> None:
        if isinstance(embeddings, SourceSidecars) and source.max_samples is not None:
            raise ValueError(f"max_samples of {source.path} cannot be combined with embeddings beside its files.")
        self.name = source.path
        super().__init__([self], seed, rank, world_size, repeat)
        self.row_seed, self.training, self.shuffle_block = seed, training, shuffle_block if training else 0
        self.embeddings, self.files = embeddings, ShardedSource(source, opened, with_images)
        row_counts = getattr(embeddings, "row_counts", None) if row_counts is None else row_counts
        self.row_counts = list(self.files.counts() if row_counts is None else row_counts)
        if len(self.row_counts) != len(self.files.files):
            raise ValueError(f"row_counts has {len(self.row_counts)} entries for {len(self.files.files)} files.")
        if not self.num_rows:
            raise SourceError(f"the stream {self.name} has no rows.")
        # Whether row numbers name the rows of several sources.
        self.is_one_of_several = False

    @property
    def num_rows(self) -> int:
        return sum(self.row_counts)

    def fingerprint(self) -> str:
        """Return a hash of its files and their numbers of rows."""
        return digest_json([[*map(os.path.basename, self.files.files)], self.row_counts])

    def files_digest(self) -> str:
        """Hash the content of the source, of large files a sample."""
        return sampled_files_digest(self.files.files)

    def join(self, number: int) -> None:
        """Make it one of several sources of a stream, with its number among them."""
        self.is_one_of_several, self.seed = True, stable_seed(self.seed, "source", number)

    def _rows(self, epoch: int, file: int, numbers: Iterator[int]) -> Iterator[dict[str, Any]]:
        """Yield rows of a file by number, with the cache of their embeddings."""
        cache = self.embeddings.open(file) if isinstance(self.embeddings, SourceSidecars) else self.embeddings
        with_cache = {} if cache is None else {"embedding_cache": cache}
        for number, values in self.files.rows(file, numbers):
            name = self.files.row_name(file, number)
            row = captioned_row(values, self.files.columns, f"{self.name}:{name}" if self.is_one_of_several else name)
            if self.training:
                row["seed_parts"] = self.row_seed, epoch, row["key"]
            yield {**row, **with_cache}

    def open(self, order: SourceOrder, is_own: IsOwn) -> ReadChunk:
        """Open the source for a DataLoader worker of a process.

        Args:
            order: The order of its rows.
            is_own: Which places of the stream the worker yields.
        """
        return row_reader(self._rows, self.row_counts, order, self.shuffle_block, is_own)


class TableSource:
    """A map-style source as one of the sources of a stream: its rows are permuted in each epoch.

    Args:
        dataset: A data set of one source.
        seed: Seed of the order.
        cache: The embeddings of the captions, which the rows then name.
    """

    def __init__(self, dataset: CaptionImageDataset, seed: int, cache: EmbeddingCache | None = None) -> None:
        self.dataset, self.seed, self.name = dataset, seed, dataset.sources[0].path
        self.with_cache = {} if cache is None else {"embedding_cache": cache}

    @property
    def num_rows(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> str:
        return digest_json(len(self.dataset))

    def files_digest(self) -> str:
        return self.dataset.content_digest()

    def join(self, number: int) -> None:
        self.dataset.is_one_of_several, self.seed = True, stable_seed(self.seed, "source", number)

    def open(self, order: SourceOrder, is_own: IsOwn) -> ReadChunk:
        """Open the source as [`StreamingCaptionImageDataset.open`] does."""

        @lru_cache(maxsize=2)
        def rows(epoch: int) -> np.ndarray:
            return np.random.default_rng(stable_seed(self.seed, "table", epoch)).permutation(len(self.dataset))

        def read(chunk: int, first: int, last: int) -> Iterator[Any]:
            begin = order.count(chunk)
            for row in range(begin + first, begin + last):
                passed, number = divmod(row, len(self.dataset))
                epoch = order.first_epoch + passed
                yield {**self.dataset[SampleIndex(epoch, int(rows(epoch)[number]))], **self.with_cache}

        return read
