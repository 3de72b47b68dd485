"""Batches of text pairs without false negatives."""

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
    """Batches of one source each, in which no row is a false negative of another.

    No two rows of a global batch share a group or a text on either side, and no hard negative is another row's text
    (see `PairTable`). A row that conflicts with a batch goes into a later one of the epoch; what does not fit
    anywhere at the end is left out, and comes again in the next epoch's order. Every row comes at most once per
    epoch.

    Every epoch has the same number of batches, so that the Trainer's count of steps holds: that of the first
    epoch's plan. With weights, an epoch ends when the source that lasts shortest has been seen once; each epoch
    takes other rows of the rest.

    See `EpochBatchSampler` for the arguments and for how a global batch is cut into ranks. With `drop_last=False`,
    possible on one rank only, each source's last batch may be short.

    Raises:
        ValueError: If a source fills no global batch, weights are given for some sources only, or `drop_last` is
            False with several ranks.
    """

    dataset: PairDataset

    def __init__(
        self,
        dataset: PairDataset,
        batch_size: int,
        num_replicas: int = 1,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        super().__init__(dataset, batch_size, num_replicas, seed, drop_last)
        if not drop_last and num_replicas > 1:
            raise ValueError(
                "drop_last=False needs a single rank: the ranks' slices of a short batch would differ in size."
            )
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
            raise ValueError(f"Give every pair source a weight, or none: {', '.join(without)} have none.")
        epoch = min(count * sum(given) / weight for count, weight in zip(available, given, strict=True))
        return [max(1, int(epoch * weight / sum(given) + 1e-9)) for weight in given]

    def __len__(self) -> int:
        """Batches over all ranks; the same for every epoch, and exact."""
        return self.num_replicas * sum(self._quotas)

    def global_batches(self, epoch: int) -> Iterator[np.ndarray]:
        """The sample numbers of each global batch of an epoch, in order."""
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, self._make_plan(epoch))
        yield from self._plan[1]

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        batches: list[np.ndarray] = []
        for planner, quota, start in zip(self._planners, self._quotas, self.dataset.starts[:-1], strict=True):
            own = planner.plan(epoch)
            chosen = np.random.default_rng(stable_seed(planner.seed, "choice", epoch)).permutation(len(own))
            batches += [own[number] + start for number in chosen[:quota]]
            left_out = len(planner.table) - sum(map(len, own))
            if left_out:
                logger.info(
                    "Epoch %d leaves out %d of %d rows of %s, which fill no batch without a conflict.",
                    epoch,
                    left_out,
                    len(planner.table),
                    planner.table.label,
                )
        order = np.random.default_rng(stable_seed(self.seed, "order", epoch)).permutation(len(batches))
        return [batches[number] for number in order]


class BatchPlanner:
    """Cuts one source's rows into batches without conflicts, anew each epoch.

    Rows are taken in random order. One that conflicts with the batch at hand waits under the key that it shares
    with it; each new batch first takes one row from every waiting line, since rows that wait under one key need a
    batch each.

    Args:
        table: The source.
        batch_size: Rows per batch.
        drop_last: Leave out the last, short batch.
        seed: Seed of the order.
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
        """The epoch's batches, `num_batches` of them; each holds row numbers within the source."""
        for attempt in range(PLAN_ATTEMPTS):
            batches = self._attempt(epoch, attempt)
            if len(batches) >= self.num_batches:
                return batches[: self.num_batches]
        # Rare: many rows share few keys, and this order packs worse than the first epoch's. Its batches are valid.
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
            if len(batch) < self.batch_size:
                if not self.drop_last:
                    batches.append(np.array(batch, dtype=np.int64))
                break
            batches.append(np.array(batch, dtype=np.int64))
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
    """An array that is read one by one faster than numpy's, in the same memory."""
    return array("q", numbers.astype(np.int64).tobytes())


def _shared_keys(table: PairTable) -> tuple[array[int], array[int], array[int], array[int]]:
    """A table's keys and starts, numbered anew, without the keys that one row alone has: they cannot conflict."""
    both = np.concatenate([table.own_keys, table.negative_keys])
    _, numbers, counts = np.unique(both, return_inverse=True, return_counts=True)
    shared = counts[numbers] > 1
    split = len(table.own_keys)
    result: list[array[int]] = []
    for part, starts in (
        (slice(0, split), table.own_starts),
        (slice(split, None), table.negative_starts),
    ):
        kept = np.concatenate([[0], np.cumsum(shared[part])])
        result += [_compact(numbers[part][shared[part]]), _compact(kept[starts])]
    return result[0], result[1], result[2], result[3]
