"""Batch sampler for text pairs that avoids false negatives."""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Iterator

import numpy as np

from llm2clip.data.pairs import PairDataset, PairTable
from llm2clip.data.sampling import EpochBatchSampler, stable_seed

logger = logging.getLogger(__name__)
PLAN_ATTEMPTS = 4


class PairBatchSampler(EpochBatchSampler):
    """Batches from one source each, in which no row is a false negative of another.

    No two rows of a global batch share a text or a group, and no hard negative is a text of another row (see
    [`PairTable`]). A row that conflicts with a batch is moved to a later batch of the epoch, or left out of the epoch
    if it fits into none. A row appears at most once per epoch.

    Every epoch has as many batches as the first one, so that the Trainer computes the correct number of steps. With
    weights, an epoch ends when the first source is used up; the rows of the other sources differ between epochs.

    See [`EpochBatchSampler`] for the arguments and for how ranks share a global batch. With `drop_last=False`, which
    needs a single rank, the last batch of each source may be short.

    Raises:
        ValueError: If a source does not fill a global batch, only some sources have weights, or `drop_last` is False
            with several ranks.
    """

    dataset: PairDataset

    def __init__(
        self, dataset: PairDataset, batch_size: int, num_replicas: int = 1, seed: int = 0, drop_last: bool = True
    ) -> None:
        super().__init__(dataset, batch_size, num_replicas, seed, drop_last)
        if not drop_last and num_replicas > 1:
            raise ValueError("drop_last=False needs a single rank, because ranks would get batches of different size.")
        self._planners = [
            BatchPlanner(table, self.global_batch_size, drop_last, stable_seed(seed, "plan", number))
            for number, table in enumerate(dataset.tables)
        ]
        self._quotas = self._share_out([planner.num_batches for planner in self._planners])
        self._plan: tuple[int, list[np.ndarray]] | None = None

    def _share_out(self, available: list[int]) -> list[int]:
        weights = [table.source.weight for table in self.dataset.tables]
        given = [weight for weight in weights if weight is not None]
        if not given:
            return available
        if len(given) < len(weights):
            without = [table.label for table in self.dataset.tables if table.source.weight is None]
            raise ValueError(f"Set weight for all pair sources or for none; {', '.join(without)} have none.")
        epoch = min(count * sum(given) / weight for count, weight in zip(available, given, strict=True))
        return [max(1, int(epoch * weight / sum(given) + 1e-9)) for weight in given]

    def __len__(self) -> int:
        """Number of batches of all ranks together; the same in every epoch."""
        return self.num_replicas * sum(self._quotas)

    def global_batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Yield the sample indices of each global batch of an epoch."""
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, self._make_plan(epoch))
        yield from self._plan[1]

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        batches: list[np.ndarray] = []
        for planner, quota, start in zip(self._planners, self._quotas, self.dataset.starts[:-1], strict=True):
            own = planner.plan(epoch)
            chosen = np.random.default_rng(stable_seed(planner.seed, "choice", epoch)).permutation(len(own))
            batches += [own[number] + start for number in chosen[:quota]]
            rows, label = len(planner.table), planner.table.label
            left_out = rows - sum(map(len, own))
            if left_out:
                message = "Epoch %d leaves out %d of %d rows of %s, which do not fit into any batch."
                logger.info(message, epoch, left_out, rows, label)
        order = np.random.default_rng(stable_seed(self.seed, "order", epoch)).permutation(len(batches))
        return [batches[number] for number in order]


class BatchPlanner:
    """Plans the batches of one source so that the rows of a batch do not conflict.

    Rows are taken in random order. A row that conflicts with the current batch is queued under the shared key. Each
    new batch first takes one row from every queue, since rows in the same queue exclude each other.

    Raises:
        ValueError: If the rows do not fill a batch.
    """

    def __init__(self, table: PairTable, batch_size: int, drop_last: bool, seed: int) -> None:
        self.table = table
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.seed = seed
        self._own, self._own_starts, self._negative, self._negative_starts = _shared_keys(table)
        self.num_batches = len(self._attempt(0, 0))
        if self.num_batches == 0:
            raise ValueError(
                f"The {len(table)} usable rows of {table.label} fill no batch of {batch_size} in which no two rows "
                "share a text or a group. Use a smaller batch size or more data."
            )

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Return the `num_batches` batches of an epoch as indices of rows in the source."""
        for attempt in range(PLAN_ATTEMPTS):
            batches = self._attempt(epoch, attempt)
            if len(batches) >= self.num_batches:
                return batches[: self.num_batches]
        # Rare: if many rows share few keys, these orders can give fewer batches than that of the first epoch.
        return self._attempt(0, 0)

    def _attempt(self, epoch: int, attempt: int) -> list[np.ndarray]:
        order = _compact(np.random.default_rng(stable_seed(self.seed, epoch, attempt)).permutation(len(self.table)))
        waiting: dict[int, deque[int]] = {}
        batches: list[np.ndarray] = []
        taken = 0
        while taken < len(order) or waiting:
            batch: list[int] = []
            own: set[int] = set()
            negative: set[int] = set()
            for key in list(waiting):
                if len(batch) == self.batch_size:
                    break
                row = waiting[key].popleft()
                if not waiting[key]:
                    del waiting[key]
                self._place(row, batch, own, negative, waiting)
            while len(batch) < self.batch_size and taken < len(order):
                self._place(order[taken], batch, own, negative, waiting)
                taken += 1
            is_short = len(batch) < self.batch_size
            if not (is_short and self.drop_last):
                batches.append(np.array(batch, dtype=np.int64))
            if is_short:
                break
        return batches

    def _place(
        self, row: int, batch: list[int], own: set[int], negative: set[int], waiting: dict[int, deque[int]]
    ) -> None:
        own_keys = self._own[self._own_starts[row] : self._own_starts[row + 1]]
        negative_keys = self._negative[self._negative_starts[row] : self._negative_starts[row + 1]]
        for key in own_keys:
            if key in own or key in negative:
                waiting.setdefault(key, deque()).append(row)
                return
        for key in negative_keys:
            if key in own:
                waiting.setdefault(key, deque()).append(row)
                return
        batch.append(row)
        own.update(own_keys)
        negative.update(negative_keys)


def _compact(numbers: np.ndarray) -> array[int]:
    """Copy to an array that Python indexes faster than NumPy's, in the same amount of memory."""
    return array("q", numbers.astype(np.int64).tobytes())


def _shared_keys(table: PairTable) -> tuple[array[int], ...]:
    """Renumber the keys of a table without those of a single row, which cannot conflict; returns keys and starts."""
    both = np.concatenate([table.own_keys, table.negative_keys])
    _, numbers, counts = np.unique(both, return_inverse=True, return_counts=True)
    shared = counts[numbers] > 1
    split = len(table.own_keys)
    result: list[array[int]] = []
    for part, starts in ((slice(0, split), table.own_starts), (slice(split, None), table.negative_starts)):
        kept = np.concatenate([[0], np.cumsum(shared[part])])
        result += [_compact(numbers[part][shared[part]]), _compact(kept[starts])]
    return tuple(result)
