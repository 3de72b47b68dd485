"""The results of queries, in the order of their exact scores; near-duplicates of better ones are left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.results import SearchResult
from llm2clip.search.store import VECTOR, IndexStore

# The largest number that databases take.
MAX_K = 2**62
# So many more rows are read where near-duplicates are left out.
MORE_AT_ONCE = 4


@dataclass(frozen=True)
class Ranked:
    """Results, best first, and the unit vectors of their rows `(results, width)`, float64."""

    results: list[SearchResult]
    embeds: np.ndarray

    def choose(self, numbers: list[int]) -> Ranked:
        """Return some of the results."""
        return Ranked([self.results[number] for number in numbers], self.embeds[numbers])


def find(
    store: IndexStore,
    manifest: IndexManifest,
    queries: np.ndarray,
    k: int,
    where: str | None = None,
    distinct: float | None = None,
) -> list[Ranked]:
    """Search a store for all queries at once, and again for those of which near-duplicates have taken places.

    Args:
        queries: `(n, width)` unit vectors, float32.
        distinct: The largest cosine of a result and a better one; None leaves out nothing.
    """
    found = [Ranked([], np.empty((0, manifest.width)))] * len(queries)
    numbers, asked = np.arange(len(queries)), min(k, MAX_K)
    while True:
        nearest = store.search(queries[numbers], asked, where)
        incomplete = []
        for number, near in zip(numbers, nearest, strict=True):
            ranked = _rank(queries[number], near, manifest, asked)
            chosen = range(len(ranked.results)) if distinct is None else _distinct(ranked.embeds, distinct, k)
            found[number] = ranked.choose(list(chosen))
            if len(chosen) < k and len(near) >= asked:
                incomplete.append(number)
        if not incomplete:
            return found
        numbers, asked = np.array(incomplete), min(asked * MORE_AT_ONCE, MAX_K)


def _rank(query: np.ndarray, near: pa.Table, manifest: IndexManifest, k: int) -> Ranked:
    """Compare a query with stored embeddings exactly, so that all stores give equal scores."""
    embeds = near[VECTOR].combine_chunks().flatten().to_numpy().astype(np.float64).reshape(len(near), len(query))
    lengths = np.linalg.norm(embeds, axis=1).clip(min=1e-12)
    # Unlike a matrix product, this is the same wherever a row is among the others.
    scores = (embeds * query).sum(axis=1) / lengths
    rows = near.drop_columns([VECTOR]).to_pylist()
    results = [SearchResult.from_row(*pair, manifest) for pair in zip(rows, scores.tolist(), strict=True)]

    def place(number: int) -> tuple[float, str, str, str]:
        result = results[number]
        return -result.score, result.key, str(result.row), str(result.caption)

    order = sorted(range(len(results)), key=place)[:k]
    return Ranked(results, embeds / lengths[:, None]).choose(order)


def _distinct(embeds: np.ndarray, largest: float, k: int) -> list[int]:
    """Return the first k rows without those whose cosine with one before them exceeds `largest`."""
    chosen: list[int] = []
    for number, embed in enumerate(embeds):
        if len(chosen) == k:
            break
        if not chosen or (embeds[chosen] @ embed).max() <= largest:
            chosen.append(number)
    return chosen
