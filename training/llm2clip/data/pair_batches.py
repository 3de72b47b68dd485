"""Batch sampler for text pairs that avoids false negatives."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator

import numpy as np

from llm2clip.data.pairs import PairDataset, PairTable
from llm2clip.data.rows import stable_seed
from llm2clip.data.sampling import EpochBatchSampler

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
    short_batches_need_one_rank = True

    def __init__(
        self, dataset: PairDataset, batch_size: int, num_replicas: int = 1, seed: int = 0, drop_last: bool = True
    ) -> None:
        super().__init__(dataset, batch_size, num_replicas, seed, drop_last)
        self._planners = [
            BatchPlanner(table, self.global_batch_size, drop_last, stable_seed(seed, "plan", number))
            for number, table in enumerate(dataset.tables)
        ]
        self._quotas = self._share_out([planner.num_batches for planner in self._planners])

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
        rows, batches = self._plan(epoch)
        for source, number in batches:
            batch = rows[source][number * self.global_batch_size : (number + 1) * self.global_batch_size]
            yield batch + self.dataset.starts[source]

    def _plan(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Plan an epoch.

        Returns:
            Of each source, the rows of all batches, one batch after another; and (batches, 2), the number of the
            source and of its batch, in the order of the epoch.
        """
        rows: list[np.ndarray] = []
        batches: list[np.ndarray] = []
        for source, (planner, quota) in enumerate(zip(self._planners, self._quotas, strict=True)):
            planned = planner.plan(epoch)
            rows.append(planned)
            num_batches = planner.count(planned)
            chosen = np.random.default_rng(stable_seed(planner.seed, "choice", epoch)).permutation(num_batches)[:quota]
            batches.append(np.stack([np.full_like(chosen, source), chosen], axis=1))
            left_out, label = len(planner.table) - len(planned), planner.table.label
            if left_out:
                message = "Epoch %d leaves out %d of %d rows of %s, which do not fit into any batch."
                logger.info(message, epoch, left_out, len(planner.table), label)
        numbers = np.concatenate(batches)
        order = np.random.default_rng(stable_seed(self.seed, "order", epoch)).permutation(len(numbers))
        return rows, numbers[order]


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
        # Python indexes views of the memory faster than arrays.
        self._own, self._own_starts = table.own_keys.data, table.own_starts.data
        self._negative, self._negative_starts = table.negative_keys.data, table.negative_starts.data
        self.num_batches = self.count(self._attempt(0, 0))
        if self.num_batches == 0:
            raise ValueError(
                f"The {len(table)} usable rows of {table.label} fill no batch of {batch_size} in which no two rows "
                "share a text or a group. Use a smaller batch size or more data."
            )

    def count(self, rows: np.ndarray) -> int:
        """Return the number of batches that rows make, of which the last may be short."""
        return -(-len(rows) // self.batch_size)

    def plan(self, epoch: int) -> np.ndarray:
        """Return the rows of the `num_batches` batches of an epoch, one batch after another."""
        for attempt in range(PLAN_ATTEMPTS):
            rows = self._attempt(epoch, attempt)
            if self.count(rows) >= self.num_batches:
                return rows[: self.num_batches * self.batch_size]
        # Rare: if many rows share few keys, these orders can give fewer batches than that of the first epoch.
        return self._attempt(0, 0)

    def _attempt(self, epoch: int, attempt: int) -> np.ndarray:
        generator = np.random.default_rng(stable_seed(self.seed, epoch, attempt))
        shuffled = generator.permutation(len(self.table))
        order = shuffled.data
        placed = np.empty_like(shuffled)
        waiting: dict[int, deque[int]] = {}
        taken = count = 0
        while taken < len(order) or waiting:
            batch: list[int] = []
            keys: set[int] = set()
            negatives: set[int] = set()
            for key in list(waiting):
                if len(batch) == self.batch_size:
                    break
                row = waiting[key].popleft()
                if not waiting[key]:
                    del waiting[key]
                self._place(row, batch, keys, negatives, waiting)
            while len(batch) < self.batch_size and taken < len(order):
                self._place(order[taken], batch, keys, negatives, waiting)
                taken += 1
            is_short = len(batch) < self.batch_size
            if not (is_short and self.drop_last):
                placed[count : count + len(batch)] = batch
                count += len(batch)
            if is_short:
                break
        return placed[:count]

    def _place(
        self, row: int, batch: list[int], keys: set[int], negatives: set[int], waiting: dict[int, deque[int]]
    ) -> None:
        own_keys = self._own[self._own_starts[row] : self._own_starts[row + 1]].tolist()
        negative_keys = self._negative[self._negative_starts[row] : self._negative_starts[row + 1]].tolist()
        for key in own_keys:
            if key in keys or key in negatives:
                waiting.setdefault(key, deque()).append(row)
                return
        for key in negative_keys:
            if key in keys:
                waiting.setdefault(key, deque()).append(row)
                return
        batch.append(row)
        keys.update(own_keys)
        negatives.update(negative_keys)
