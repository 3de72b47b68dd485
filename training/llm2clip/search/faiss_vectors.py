"""faiss' IVF,SQ8 or IVF,RaBitQ as a file beside the rows: fast, and in memory while it is searched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.files.atomic import atomic_path
from llm2clip.files.remote_path import AnyPath, local_copy
from llm2clip.search.index_manifest import REBUILD

# Embeddings that train the index: as many per cell, and at least as many in all. From fewer, the ranges of the 8 bits
# are too narrow for other embeddings.
TRAINING_ROWS_PER_CELL, TRAINING_ROWS = 64, 65_536
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
    """Build an index of unit vectors, and write it to a file; row i gets number i.

    Args:
        embeds: Reads all embeddings in order, `(some, width)` float32 at a time.
        index: `cells` (None for one per 1,000 embeddings), `probes` and `precision`.
    """
    faiss = require_faiss()
    cells, is_binary = index["cells"] or max(1, count // ROWS_PER_CELL), index["precision"] == "binary"
    # Codes of 8 bits have the range of the training embeddings, value by value, in the file. Those of one bit estimate
    # distances, which have the order of cosines, better than inner products: 93% of the ten best against 88%.
    codes, metric = ("RaBitQ", faiss.METRIC_L2) if is_binary else ("SQ8", faiss.METRIC_INNER_PRODUCT)
    built = faiss.index_factory(width, f"IVF{cells},{codes}", metric)
    built.nprobe = min(index["probes"], cells)
    # faiss warns below its own minimum of images per cell. The clusters are then coarser, but the search works.
    built.cp.min_points_per_centroid = 1
    step = max(1, count // max(cells * TRAINING_ROWS_PER_CELL, TRAINING_ROWS))
    built.train(np.concatenate([some[::step] for some in embeds()]))
    for some in embeds():
        built.add(np.ascontiguousarray(some))
    with atomic_path(path) as temporary:
        faiss.write_index(built, str(temporary))


class FaissRows:
    """An index that is read from a file, and the numbers of its rows.

    Args:
        path: The file.
        numbers: Numbers of the rows in a store, `(count,)`.

    Raises:
        ValueError: The file is missing or damaged.
    """

    def __init__(self, path: AnyPath, numbers: np.ndarray) -> None:
        self.numbers = numbers
        try:
            with local_copy(path) as file:
                self.built = require_faiss().read_index(str(file))
        except (RuntimeError, FileNotFoundError) as error:
            raise ValueError(f"{path} is damaged ({str(error).splitlines()[-1]}); {REBUILD}") from error

    def search(self, queries: np.ndarray, k: int, fits: np.ndarray | None = None) -> list[np.ndarray]:
        """Return the numbers of the nearest rows of each query, at most `k`, best first.

        Args:
            queries: `(n, width)`.
            fits: Numbers of the rows that may be found; None for all.
        """
        faiss = require_faiss()
        options = {}
        if fits is not None:
            packed = np.packbits(np.isin(self.numbers, fits), bitorder="little")
            selector = faiss.IDSelectorBitmap(packed)
            options = {"params": faiss.SearchParametersIVF(nprobe=self.built.nprobe, sel=selector)}
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        _, nearest = self.built.search(queries, min(k, len(self.numbers)), **options)
        return [self.numbers[rows[rows >= 0]] for rows in nearest]
