"""Which sample comes when: stateless per-epoch indices, and batches that resume and split over ranks alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler


class SampleIndex(NamedTuple):
    """The address of one training sample.

    The epoch travels with the index because a data set in a worker process never hears of a new epoch. What a
    sample looks like (the caption drawn, the crop) is a function of the seed and this pair alone, so that neither
    prefetching nor a restart changes it.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # tuple.index, which nobody needs on a pair


def stable_seed(*parts: int | str) -> int:
    """A non-negative 63-bit number that depends on `parts` alone, equal on every machine and Python version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class EpochDataset(Dataset):
    """A map-style data set that holds the epoch which its batch sampler reads.

    The epoch lives here, not in the sampler, because of how the Trainer announces it: accelerate's wrappers (its
    rank shard around the sampler, and the one that skips the batches a resumed run has seen) hide the sampler from
    `set_epoch` and pass the call to the data set instead.
    """

    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        raise NotImplementedError


class EpochBatchSampler(Sampler[list[SampleIndex]]):
    """What the two batch samplers share: global batches, cut into one consecutive slice per rank.

    accelerate's `BatchSamplerShard` hands batch `i * num_replicas + r` to rank `r`. A global batch of
    `num_replicas * batch_size` samples is therefore yielded as `num_replicas` consecutive batches, and a run on
    two ranks sees the global batches of one rank with the doubled batch size.

    Args:
        dataset: The data set to index; its `epoch` picks the pass.
        batch_size: Samples per rank and step.
        num_replicas: World size.
        seed: Seed of the order.
        drop_last: Leave out what does not fill a global batch.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        dataset: EpochDataset,
        batch_size: int,
        num_replicas: int = 1,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("num_replicas", num_replicas)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_replicas = num_replicas
        self.seed = seed
        self.drop_last = drop_last

    @property
    def global_batch_size(self) -> int:
        """Samples per step over all ranks."""
        return self.batch_size * self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.dataset.set_epoch(epoch)

    def global_batches(self, epoch: int) -> Iterator[np.ndarray]:
        """The sample numbers of each global batch of an epoch, in order."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        epoch = self.dataset.epoch
        for batch in self.global_batches(epoch):
            for start in range(0, len(batch), self.batch_size):
                yield [SampleIndex(epoch, index) for index in batch[start : start + self.batch_size].tolist()]


class SampleIndexBatchSampler(EpochBatchSampler):
    """Batches of a seeded permutation per epoch (see `EpochBatchSampler` for the arguments).

    With `drop_last=False` the last global batch may be short, so that accelerate fills it up with samples of the
    first one when there are several ranks.

    Args:
        shuffle: Take the samples in the data's own order if False.

    Raises:
        ValueError: If the data does not fill one global batch and `drop_last` is set.
    """

    def __init__(
        self,
        dataset: EpochDataset,
        batch_size: int,
        num_replicas: int = 1,
        seed: int = 0,
        drop_last: bool = True,
        shuffle: bool = True,
    ) -> None:
        super().__init__(dataset, batch_size, num_replicas, seed, drop_last)
        self.shuffle = shuffle
        if len(self) == 0:
            raise ValueError(
                f"The data has {len(dataset)} samples, fewer than one batch of {self.global_batch_size} "
                f"({batch_size} on each of {num_replicas} ranks). Use a smaller batch size."
            )

    def _num_samples(self) -> int:
        samples = len(self.dataset)
        if self.drop_last:
            samples -= samples % self.global_batch_size
        return samples

    def __len__(self) -> int:
        """Batches over all ranks."""
        return -(-self._num_samples() // self.batch_size)

    def global_batches(self, epoch: int) -> Iterator[np.ndarray]:
        """The sample numbers of each global batch of an epoch, in order."""
        if self.shuffle:
            order = np.random.default_rng(stable_seed(self.seed, epoch)).permutation(len(self.dataset))
        else:
            order = np.arange(len(self.dataset))
        order = order[: self._num_samples()]
        for start in range(0, len(order), self.global_batch_size):
            yield order[start : start + self.global_batch_size]
