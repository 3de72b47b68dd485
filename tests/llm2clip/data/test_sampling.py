from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from llm2clip.data import SampleIndex, SampleIndexBatchSampler
from llm2clip.data.rows import stable_seed
from llm2clip.data.sampling import EpochDataset, OneSourceBatchSampler


class Echo(EpochDataset):
    """Returns the requested index of sources of the given sizes."""

    def __init__(self, *sizes: int) -> None:
        self.starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: SampleIndex) -> tuple[int, int]:
        return tuple(index)


def test_stable_seed_is_constant_and_differs_between_parts() -> None:
    assert stable_seed(1, "a") == 2969518301517151295
    assert len({stable_seed(1, 2), stable_seed(12), stable_seed("1", 2), stable_seed(2, 1), stable_seed(1, 2, 0)}) == 5


def test_each_epoch_has_every_sample_once_in_a_new_order() -> None:
    sampler = SampleIndexBatchSampler(Echo(50), 8, drop_last=False, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 7
        assert {index.epoch for batch in batches for index in batch} == {epoch}
        orders.append([index.index for batch in batches for index in batch])
        assert sorted(orders[-1]) == list(range(50))
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("one_source", [False, True], ids=["all", "one source"])
def test_one_and_two_ranks_have_the_same_global_batches(one_source: bool) -> None:
    kind: Any = OneSourceBatchSampler if one_source else SampleIndexBatchSampler
    one, two = kind(Echo(41, 20), 8), kind(Echo(41, 20), 4, num_replicas=2)
    halves = list(two)
    assert len(one) == len(list(one)) == 7
    assert [halves[i] + halves[i + 1] for i in range(0, len(two), 2)] == list(one)


def test_fewer_samples_than_a_global_batch_raise() -> None:
    with pytest.raises(ValueError, match=r"7 samples, fewer than one global batch of 8 \(4 on each of 2 ranks\)"):
        SampleIndexBatchSampler(Echo(7), 4, num_replicas=2)
    with pytest.raises(ValueError, match=r"Source 2 of 2 has 7 rows, .* of 8, .* Use mixing: proportional"):
        OneSourceBatchSampler(Echo(41, 7), 4, num_replicas=2)
    with pytest.raises(ValueError, match="needs a single rank"):
        OneSourceBatchSampler(Echo(41, 7), 4, num_replicas=2, drop_last=False)


def _ranks(epoch_calls: list[int], skip: int, world: int, workers: int) -> Iterator[list[list[tuple[int, int]]]]:
    """Return the batches of each rank as in the Trainer's loop: set_epoch on the loader, skip batches, iterate."""
    for rank in range(world):
        dataset = Echo(40)
        sampler = SampleIndexBatchSampler(dataset, 4, num_replicas=world, seed=1)
        loader = prepare_data_loader(
            DataLoader(dataset, batch_sampler=sampler, num_workers=workers), num_processes=world, process_index=rank
        )
        seen = []
        for position, epoch in enumerate(epoch_calls):
            current = skip_first_batches(loader, skip) if skip and position == 0 else loader
            current.set_epoch(epoch)
            for epochs, indices in current:
                seen.append(list(zip(epochs.tolist(), indices.tolist(), strict=True)))
        yield seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_accelerate_passes_on_the_epoch_when_it_skips_batches(world: int, workers: int) -> None:
    unbroken = list(_ranks([0, 1, 2], 0, world, workers))
    resumed = list(_ranks([1, 2], 3, world, workers))
    per_epoch = len(unbroken[0]) // 3
    for rank in range(world):
        assert {epoch for batch in unbroken[rank] for epoch, _ in batch} == {0, 1, 2}
        assert resumed[rank] == unbroken[rank][per_epoch + 3 :]
    samples = [index for seen in unbroken for batch in seen[:per_epoch] for _, index in batch]
    assert len(set(samples)) == len(samples) == 40


def test_batches_of_one_source_are_in_proportion_to_its_size() -> None:
    sampler = OneSourceBatchSampler(Echo(41, 20, 83), 4, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        batches = [[index.index for index in batch] for batch in sampler]
        assert len(batches) == len(sampler) == 10 + 5 + 20
        sources = [{int(np.searchsorted([41, 61], index, side="right")) for index in batch} for batch in batches]
        assert [sources.count({number}) for number in range(3)] == [10, 5, 20]
        samples = [index for batch in batches for index in batch]
        assert len(set(samples)) == len(samples)
        orders.append((samples, sources))
    assert orders[0] == orders[2]
    assert orders[0][1] != orders[1][1] != sorted(orders[1][1], key=min)
    whole = OneSourceBatchSampler(Echo(9, 8), 4, drop_last=False)
    assert sorted(index.index for batch in whole for index in batch) == list(range(17))
    assert len(list(whole)) == len(whole) == 5
