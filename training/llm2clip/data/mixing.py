"""How several sources are mixed: of which source each row of a reader is, computed without reading anything."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from llm2clip.data.sampling import stable_seed
from llm2clip.data.stream_plan import DRAWN, RowPlan

Mixing = Literal["one_source_per_step", "proportional", "weights"]


class Schedule(Protocol):
    """Of which source each row of a reader is."""

    def delivered(self, rows: int) -> list[int]:
        """Return how many of the reader's first rows are of each source."""

    def sources(self, rows: int) -> Iterator[int]:
        """Yield the source of each row, after the first ones."""


class OneSource:
    """The schedule of a single source."""

    def delivered(self, rows: int) -> list[int]:
        return [rows]

    def sources(self, rows: int) -> Iterator[int]:
        return itertools.repeat(0)


class Blocks:
    """A schedule of blocks of sources, each of which is drawn alone.

    Args:
        num_sources: Number of sources.
        repeat: Rows that have each of the drawn sources.
    """

    def __init__(self, num_sources: int, repeat: int = 1) -> None:
        self.num_sources, self.repeat = num_sources, repeat

    def size(self, block: int) -> int:
        """Return the length of a block."""
        raise NotImplementedError

    def draw(self, block: int) -> np.ndarray:
        """Draw a block, (size,)."""
        raise NotImplementedError

    def counts(self, block: int) -> np.ndarray:
        """Return how often each source is in a block, (sources,)."""
        return np.bincount(self.draw(block), minlength=self.num_sources)

    def delivered(self, rows: int) -> list[int]:
        drawn, total = rows // self.repeat, np.zeros(self.num_sources, dtype=np.int64)
        for block in itertools.count():
            if drawn < self.size(block):
                total += np.bincount(self.draw(block)[:drawn], minlength=self.num_sources)
                return (total * self.repeat).tolist()
            total += self.counts(block)
            drawn -= self.size(block)
        raise AssertionError

    def sources(self, rows: int) -> Iterator[int]:
        drawn = rows // self.repeat
        for block in itertools.count():
            if drawn < self.size(block):
                for source in self.draw(block)[drawn:].tolist():
                    yield from itertools.repeat(source, self.repeat)
            drawn = max(0, drawn - self.size(block))


class Proportional(Blocks):
    """All rows of all sources in an epoch, in random order.

    Args:
        plans: The plans of the sources.
        num_readers, reader, depth: See [`RowPlan.share_size`].
        seed: Seed of the order.
    """

    def __init__(self, plans: Sequence[RowPlan], num_readers: int, reader: int, depth: int, seed: int) -> None:
        super().__init__(len(plans))
        self.plans, self.place = plans, (num_readers, reader, depth)
        self.seed = stable_seed(seed, "proportional", reader, depth)

    def counts(self, block: int) -> np.ndarray:
        return np.array([plan.share_size(plan.first_epoch + block, *self.place) for plan in self.plans])

    def size(self, block: int) -> int:
        return int(self.counts(block).sum())

    def draw(self, block: int) -> np.ndarray:
        sources = np.repeat(np.arange(self.num_sources, dtype=np.uint16), self.counts(block))
        return np.random.default_rng(stable_seed(self.seed, block)).permutation(sources)


class Weighted(Blocks):
    """Sources drawn with probabilities.

    Args:
        weights: Weight of each source.
        seed: Seed of the draws.
        repeat: Rows of each draw.
    """

    def __init__(self, weights: Sequence[float], seed: int, repeat: int = 1) -> None:
        super().__init__(len(weights), repeat)
        self.shares, self.seed = np.array(weights) / sum(weights), seed

    def size(self, block: int) -> int:
        return DRAWN

    def draw(self, block: int) -> np.ndarray:
        generator = np.random.default_rng(stable_seed(self.seed, "weights", block))
        return generator.choice(self.num_sources, size=DRAWN, p=self.shares)


class BatchesInProportion(Blocks):
    """Batches of one source each, in proportion to the sizes of the sources: exactly so in the long run.

    Args:
        batches: Batches of each source in an epoch, not necessarily whole ones.
        seed: Seed of the order.
        repeat: Rows of a batch.
    """

    def __init__(self, batches: Sequence[float], seed: int, repeat: int) -> None:
        super().__init__(len(batches), repeat)
        self.batches, self.seed = np.array(batches), seed

    def counts(self, block: int) -> np.ndarray:
        counts: Any = np.floor((block + 1) * self.batches) - np.floor(block * self.batches)
        return counts.astype(np.int64)

    def size(self, block: int) -> int:
        return int(self.counts(block).sum())

    def draw(self, block: int) -> np.ndarray:
        sources = np.repeat(np.arange(self.num_sources), self.counts(block))
        return np.random.default_rng(stable_seed(self.seed, "batches", block)).permutation(sources)
