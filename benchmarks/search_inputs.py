"""Vectors to index and to search for, an index of them by our own code, and how many of the best it finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, CENTRES, NOISE = 512, 1000, 0.7
# Values of the column `source` and the share of rows that have them.
SHARES = {"one per cent": 0.01, "ten per cent": 0.1, "rest": 0.89}
AT_ONCE = 8192
TOP = 10


@dataclass
class Mixture:
    """Unit vectors around 1,000 random directions, made again from the seed each time that they are read.

    The noise is an isotropic Gaussian, whose norm is 0.7 of that of the direction.
    """

    count: int
    seed: int = 0
    centres: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.centres = _unit(np.random.default_rng(7).standard_normal((CENTRES, WIDTH), dtype=np.float32))

    def batches(self) -> Iterator[np.ndarray]:
        """Return the vectors in order, `(some, 512)` float16 as they are stored."""
        generator = np.random.default_rng(self.seed)
        for start in range(0, self.count, AT_ONCE):
            some = min(AT_ONCE, self.count - start)
            noise = generator.standard_normal((some, WIDTH), dtype=np.float32)
            chosen = self.centres[generator.integers(0, CENTRES, some)]
            yield _unit(chosen + np.float32(NOISE / WIDTH**0.5) * noise).astype(np.float16)

    def sources(self) -> np.ndarray:
        """Return a value of the column `source` for each vector."""
        generator = np.random.default_rng(self.seed + 1)
        return generator.choice(list(SHARES), self.count, p=list(SHARES.values()))

    def queries(self, count: int) -> np.ndarray:
        """Return other vectors of the same kind, `(count, 512)` float32."""
        return next(Mixture(count, self.seed + 1000).batches()).astype(np.float32)


def write_vectors(path: Path, vectors: Mixture) -> None:
    """Write vectors to a file, so that making them costs nothing later."""
    with path.open("wb") as file:
        for some in vectors.batches():
            file.write(some.tobytes())


def read_vectors(path: Path) -> Iterator[np.ndarray]:
    """Read the vectors of a file, `(some, 512)` float16; a memory map would count as memory."""
    with path.open("rb") as file:
        while block := file.read(AT_ONCE * WIDTH * 2):
            yield np.frombuffer(block, np.float16).reshape(-1, WIDTH)


def build_index(folder: Path, path: Path, vectors: Mixture, **settings: Any) -> Any:
    """Write an index as `llm2clip index` does, except for the model; return it open.

    Args:
        path: File of the vectors.
        settings: Those of [`VectorSettings`].
    """
    import pyarrow as pa

    from llm2clip.search.image_index import ImageIndex
    from llm2clip.search.index_manifest import IndexManifest
    from llm2clip.search.index_rows import ID, KEY, REASON, VECTOR
    from llm2clip.search.lance_store import LanceStore
    from llm2clip.search.row_digests import BINARY, row_digests
    from llm2clip.search.vector_settings import VectorSettings

    manifest = IndexManifest("benchmark", None, "none", WIDTH, "float16", {"kind": "folder", "path": "none"}, {})
    kind = pa.list_(pa.float16(), WIDTH)
    schema = pa.schema(
        [(KEY, pa.string()), ("source", pa.string()), (ID, BINARY), (REASON, pa.string()), (VECTOR, kind)]
    )
    store, sources, start = LanceStore(folder), vectors.sources(), 0
    with store.lock():
        rows = store.create(manifest, schema)
        for some in read_vectors(path):
            keys = [f"{number:09}" for number in range(start, start + len(some))]
            columns = [keys, sources[start : start + len(some)]]
            embeds = pa.FixedSizeListArray.from_arrays(pa.array(some.reshape(-1)), WIDTH)
            reasons = pa.nulls(len(some), pa.string())
            arrays = [*(pa.array(column) for column in columns), row_digests(columns), reasons, embeds]
            rows.append(pa.table(arrays, schema))
            start += len(some)
        manifest.images = start
        manifest.index = VectorSettings(**settings).index_of(start, WIDTH, "float16", store.index_types)
        rows.publish(manifest, [])
    return ImageIndex.of_store(store)


def build_faiss_index(path: Path, count: int, cells: int) -> Any:
    """Build an IVF,SQ8 index of the vectors of a file with faiss alone, trained on 64 vectors a cell."""
    import faiss

    index = faiss.index_factory(WIDTH, f"IVF{cells},SQ8", faiss.METRIC_INNER_PRODUCT)
    step = max(1, count // (64 * cells))
    index.train(np.concatenate([some[::step] for some in read_vectors(path)]).astype(np.float32))
    for some in read_vectors(path):
        index.add(some.astype(np.float32))
    return index


def exact_best(path: Path, queries: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """Return the numbers of the 10 best vectors of a file for each query, `(n, 10)`, by comparing all.

    Args:
        allowed: `(count,)` bool, which vectors may be among them.
    """
    best = np.full((len(queries), TOP), -np.inf, np.float32)
    numbers, start = np.zeros((len(queries), TOP), np.int64), 0
    for some in read_vectors(path):
        scores = queries @ some.astype(np.float32).T
        if allowed is not None:
            scores[:, ~allowed[start : start + len(some)]] = -np.inf
        joined = np.concatenate([best, scores], axis=1)
        chosen = np.argpartition(-joined, TOP - 1, axis=1)[:, :TOP]
        their_numbers = np.broadcast_to(np.arange(start, start + len(some)), scores.shape)
        numbers = np.take_along_axis(np.concatenate([numbers, their_numbers], axis=1), chosen, axis=1)
        best = np.take_along_axis(joined, chosen, axis=1)
        start += len(some)
    return numbers


def recall(found: np.ndarray, best: np.ndarray) -> float:
    """Return the share of the best numbers that are among the found, both `(n, 10)`."""
    return float((found[:, :, None] == best[:, None, :]).any(axis=1).mean())


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
