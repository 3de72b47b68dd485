"""faiss' IVF,SQ8 as a file beside the rows: fast, and in memory while it is searched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.utils.files import atomic_path

# Embeddings per cell that train the index.
TRAINING_ROWS_PER_CELL = 64
ROWS_PER_CELL = 1000
Embeds = Callable[[], Iterator[np.ndarray]]


def require_faiss() -> Any:
    """Import faiss, or raise ImportError with the command that installs it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(f"{error}; install it with: pip install 'llm2clip[search]'") from error
    return faiss


def build_faiss(path: Path, embeds: Embeds, count: int, width: int, index: dict[str, Any]) -> None:
    """Build an index of unit vectors by inner product, and write it to a file; row i gets number i.

    Args:
        embeds: Reads all embeddings in order, `(some, width)` float32 at a time.
        index: `cells` (None for one per 1,000 embeddings) and `probes`.
    """
    faiss = require_faiss()
    cells = index["cells"] or max(1, count // ROWS_PER_CELL)
    built = faiss.index_factory(width, f"IVF{cells},SQ8", faiss.METRIC_INNER_PRODUCT)
    built.nprobe = min(index["probes"], cells)
    # faiss warns below its own minimum of images per cell. The clusters are then coarser, but the search works.
    built.cp.min_points_per_centroid = 1
    step = max(1, count // (cells * TRAINING_ROWS_PER_CELL))
    built.train(np.concatenate([some[::step] for some in embeds()]))
    for some in embeds():
        built.add(np.ascontiguousarray(some))
    with atomic_path(path) as temporary:
        faiss.write_index(built, str(temporary))


def read_faiss(path: Path) -> Any:
    """Read an index from a file; raise ValueError if it is missing or damaged."""
    try:
        return require_faiss().read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[-1]})") from error


def search_faiss(
    built: Any, queries: np.ndarray, top: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest embeddings.

    Args:
        queries: `(n, width)`.
        allowed: `(count,)` bool, which rows may be found; None for all.

    Returns:
        Cosines and row numbers, each `(n, top)`; the number is -1 where there are too few rows.
    """
    faiss = require_faiss()
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if allowed is None:
        return built.search(queries, top)
    packed = np.packbits(allowed, bitorder="little")
    selector = faiss.IDSelectorBitmap(packed)
    parameters = faiss.SearchParametersIVF(nprobe=built.nprobe, sel=selector)
    return built.search(queries, top, params=parameters)
