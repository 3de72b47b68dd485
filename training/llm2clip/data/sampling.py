"""Sample indices with epoch, and batch samplers whose order depends only on seed and epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from torch.utils.data import Dataset, Sampler

from llm2clip.data.rows import stable_seed


class SampleIndex(NamedTuple):
    """Index of a training sample.

    The epoch is part of the index because a data set in a worker process is not notified of a new epoch. The random
    parts of a sample (caption and crop) are functions of the seed and this index only, so that neither prefetching nor
    resuming changes them.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # overrides tuple.index


class EpochDataset(Dataset):
    """Map-style data set with the epoch that its batch sampler reads.

    The epoch is stored here and not in the sampler because accelerate's wrappers (`BatchSamplerShard`, and the one
    that skips batches when resuming) pass the Trainer's call of `set_epoch` to the data set instead of the sampler.
    """

    epoch: int = 0
    # How batches are made of several tables: of one each, or of all.
    mixing: str = "one_source_per_step"

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.epoch = int(epoch)

    def content_digest(self) -> str | None:
        """Hash the rows in their order, wherever their files are; None if they cannot be identified."""
        return None

    def __len__(self) -> int:
        raise NotImplementedError


class ConcatenatedTables(EpochDataset):
    """Map-style data set of the rows of several tables, one after another.

    Attributes:
        tables: The tables.
        starts: (tables + 1,) index of the first sample of each table, and the number of samples.
    """

    def __init__(self, tables: Sequence[Any]) -> None:
        self.tables = tables
        self.starts = np.cumsum([0, *map(len, tables)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, index: SampleIndex | int) -> tuple[int | None, int, int, int]:
        """Return the epoch of an index (None for an `int`), the index, the number of its table and its row there."""
        epoch, position = index if isinstance(index, SampleIndex) else (None, int(index))
        if not 0 <= position < len(self):
            raise IndexError(f"Index {position} is out of range for {len(self)} samples.")
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        return epoch, position, number, position - int(self.starts[number])


class EpochBatchSampler(Sampler[list[SampleIndex]]):
    """Base of the batch samplers: global batches, split into one consecutive batch per rank.

    accelerate's `BatchSamplerShard` assigns batch `i * num_replicas + r` to rank `r`. A global batch of
    `num_replicas * batch_size` samples is therefore yielded as `num_replicas` consecutive batches, and a run on two
    ranks sees the same global batches as a run on one rank with twice the batch size.

    Args:
        dataset: The data set, whose `epoch` selects the pass.
        batch_size: Samples per rank and step.
        num_replicas: Number of ranks.
        seed: Seed of the order.
        drop_last: Drop the samples that do not fill a global batch.

    Raises:
        ValueError: If `batch_size` or `num_replicas` is less than 1, or `drop_last` is False with several ranks in a
            class that allows this for a single rank only.
    """

    # Whether every source ends with a short batch, which ranks cannot share.
    short_batches_need_one_rank = False

    def __init__(
        self, dataset: EpochDataset, batch_size: int, num_replicas: int = 1, seed: int = 0, drop_last: bool = True
    ) -> None:
        for name, value in (("batch_size", batch_size), ("num_replicas", num_replicas)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if not drop_last and num_replicas > 1 and self.short_batches_need_one_rank:
            raise ValueError("drop_last=False needs a single rank, because ranks would get batches of different size.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_replicas = num_replicas
        self.global_batch_size = batch_size * num_replicas
        self.seed = seed
        self.drop_last = drop_last

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.dataset.set_epoch(epoch)

    def global_batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Yield the sample indices of each global batch of an epoch."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        epoch = self.dataset.epoch
        for batch in self.global_batches(epoch):
            for start in range(0, len(batch), self.batch_size):
                yield [SampleIndex(epoch, index) for index in batch[start : start + self.batch_size].tolist()]


class SampleIndexBatchSampler(EpochBatchSampler):
    """Batches of a new seeded permutation in each epoch; see [`EpochBatchSampler`] for the arguments.

    With `drop_last=False` the last global batch may be short; with several ranks, accelerate completes it with samples
    of the first batch.

    Raises:
        ValueError: If the data set does not fill one global batch and `drop_last` is set.
    """

    def __init__(
        self, dataset: EpochDataset, batch_size: int, num_replicas: int = 1, seed: int = 0, drop_last: bool = True
    ) -> None:
        super().__init__(dataset, batch_size, num_replicas, seed, drop_last)
        if len(self) == 0:
            raise ValueError(
                f"The data set has {len(dataset)} samples, fewer than one global batch of {self.global_batch_size} "
                f"({batch_size} on each of {num_replicas} ranks). Use a smaller batch size."
            )

    def _num_samples(self) -> int:
        return len(self.dataset) - (len(self.dataset) % self.global_batch_size if self.drop_last else 0)

    def __len__(self) -> int:
        """Number of batches of all ranks together."""
        return -(-self._num_samples() // self.batch_size)

    def global_batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Yield the sample indices of each global batch of an epoch."""
        order = np.random.default_rng(stable_seed(self.seed, epoch)).permutation(len(self.dataset))
        order = order[: self._num_samples()]
        for start in range(0, len(order), self.global_batch_size):
            yield order[start : start + self.global_batch_size]


class OneSourceBatchSampler(EpochBatchSampler):
    """Batches of one source each, in proportion to the sizes of the sources and in random order.

    Every epoch has all full batches of each source, each of a new permutation. See [`EpochBatchSampler`] for the
    arguments and for how ranks share a global batch. With `drop_last=False`, which needs a single rank, the last batch
    of each source may be short.

    Args:
        dataset: A data set of several sources, which has `starts`; see [`ConcatenatedTables`].

    Raises:
        ValueError: If a source does not fill a global batch, or `drop_last` is False with several ranks.
    """

    short_batches_need_one_rank = True

    def __init__(
        self, dataset: EpochDataset, batch_size: int, num_replicas: int = 1, seed: int = 0, drop_last: bool = True
    ) -> None:
        super().__init__(dataset, batch_size, num_replicas, seed, drop_last)
        starts = cast(Any, dataset).starts.tolist()
        self._parts = list(itertools.pairwise(starts))
        sizes = [stop - start for start, stop in self._parts]
        if drop_last and min(sizes) < self.global_batch_size:
            raise ValueError(
                f"Source {sizes.index(min(sizes)) + 1} of {len(sizes)} has {min(sizes)} rows, fewer than one global "
                f"batch of {self.global_batch_size}, and each batch comes from one source. Use mixing: proportional "
                "or a smaller batch size."
            )

    def __len__(self) -> int:
        """Number of batches of all ranks together; the same in every epoch."""
        sizes = [stop - start for start, stop in self._parts]
        full = self.num_replicas * sum(size // self.global_batch_size for size in sizes)
        return full + (0 if self.drop_last else sum(size % self.global_batch_size > 0 for size in sizes))

    def global_batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Yield the sample indices of each global batch of an epoch."""
        batches: list[np.ndarray] = []
        for number, (start, stop) in enumerate(self._parts):
            order = np.random.default_rng(stable_seed(self.seed, epoch, number)).permutation(np.arange(start, stop))
            end = len(order) - (len(order) % self.global_batch_size if self.drop_last else 0)
            batches += [order[i : i + self.global_batch_size] for i in range(0, end, self.global_batch_size)]
        turns = np.random.default_rng(stable_seed(self.seed, "turns", epoch)).permutation(len(batches))
        return (batches[turn] for turn in turns)
