"""Vectors to index and to search for, an index of them by our own code, and how many of the best it finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, CENTRES, NOISE = 512, 1000, 0.7
# Values of the column `source` and the share of rows that have them.
SHARES = {"one per cent": 0.01, "ten per cent": 0.1, "rest": 0.89}
AT_ONCE = 8192
TOP = 10


class Mixture:
    """Unit vectors around 1,000 random directions, `(count, 512)` float16 as they are stored, and their sources.

    The noise is an isotropic Gaussian, whose norm is 0.7 of that of the direction. Sources are values of a column.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        centres = _unit(np.random.default_rng(7).standard_normal((CENTRES, WIDTH), dtype=np.float32))
        generator, parts = np.random.default_rng(seed), []
        for start in range(0, count, AT_ONCE):
            some = min(AT_ONCE, count - start)
            noise = generator.standard_normal((some, WIDTH), dtype=np.float32)
            chosen = centres[generator.integers(0, CENTRES, some)]
            parts.append(_unit(chosen + np.float32(NOISE / WIDTH**0.5) * noise).astype(np.float16))
        self.vectors = np.concatenate(parts)
        self.sources = np.random.default_rng(seed + 1).choice(list(SHARES), count, p=list(SHARES.values()))

    def batches(self) -> Iterator[np.ndarray]:
        """Return the vectors in order, some at a time."""
        yield from np.array_split(self.vectors, -(-len(self.vectors) // AT_ONCE))


def build_index(folder: Path, mixture: Mixture, **settings: Any) -> Any:
    """Write an index as `llm2clip index` does, with a model that has embedded before; return it open.

    Args:
        settings: Those of [`IndexSettings`].
    """
    from benchmarks.embedded import MixtureEncoder, MixtureItems
    from llm2clip.search.index_settings import IndexSettings
    from llm2clip.search.index_update import update_index
    from llm2clip.search.lance_store import LanceStore
    from llm2clip.search.search_index import SearchIndex

    store, encoder = LanceStore(folder), MixtureEncoder(mixture)
    update_index(store, MixtureItems(mixture), lambda: encoder, IndexSettings(**settings))
    return SearchIndex.open(store, encoder=encoder)


def build_faiss_index(mixture: Mixture, cells: int) -> Any:
    """Build an IVF,SQ8 index with faiss alone, trained on 64 vectors a cell."""
    import faiss

    index = faiss.index_factory(WIDTH, f"IVF{cells},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(mixture.vectors[:: max(1, len(mixture.vectors) // (64 * cells))].astype(np.float32))
    for some in mixture.batches():
        index.add(some.astype(np.float32))
    return index


def build_exact_index(mixture: Mixture) -> Any:
    """Put vectors into faiss' index that compares all."""
    import faiss

    index = faiss.IndexFlatIP(WIDTH)
    for some in mixture.batches():
        index.add(some.astype(np.float32))
    return index


def selection(allowed: np.ndarray | None) -> dict[str, Any]:
    """Search parameters of faiss by which only some vectors may be found; `allowed` is `(count,)` bool."""
    import faiss

    return {} if allowed is None else {"sel": faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))}


def recall(retrieved: np.ndarray, best: np.ndarray) -> float:
    """Return the share of the best numbers that are among the retrieved, both `(n, 10)`."""
    return float((retrieved[:, :, None] == best[:, None, :]).any(axis=1).mean())


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
