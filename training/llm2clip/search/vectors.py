"""faiss indexes by name, with the settings that matter."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

INDEX_TYPES = ("flat", "ivf", "hnsw")
# Rows that faiss is given at once, in float32.
ROWS_AT_ONCE = 16384
# faiss learns the cells of an IVF index from so many images per cell, at most.
TRAINING_ROWS_PER_CELL = 64


@dataclass
class VectorIndexSettings:
    """How the nearest images are found."""

    index_type: str = field(
        default="flat",
        metadata={
            "help": "flat is exact: at width 512 one core needs 20 ms for a query among 100,000 images, 0.3 s among a "
            "million. ivf and hnsw are approximate and pay from some 100,000 images on, where many queries come: "
            "ivf needs 0.6 ms there and is built in a minute, hnsw 3 ms with several minutes to build."
        },
    )
    ivf_cells: int | None = field(
        default=None,
        metadata={"help": "ivf: cells that the images are sorted into; unset: 4 x the root of their number."},
    )
    ivf_probes: int = field(default=16, metadata={"help": "ivf: cells that a query looks into; more find more."})
    hnsw_links: int = field(default=32, metadata={"help": "hnsw: neighbours that every image is linked to."})
    hnsw_construction: int = field(default=80, metadata={"help": "hnsw: candidates per image while it is built."})
    hnsw_search: int = field(default=64, metadata={"help": "hnsw: candidates per query; more find more."})

    def __post_init__(self) -> None:
        if self.index_type not in INDEX_TYPES:
            raise ValueError(f"index_type {self.index_type!r} is unknown; choose one of {', '.join(INDEX_TYPES)}.")
        for name in ("ivf_cells", "ivf_probes", "hnsw_links", "hnsw_construction", "hnsw_search"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")

    def of_type(self) -> dict[str, Any]:
        """The settings that the chosen type has."""
        own = {name: value for name, value in asdict(self).items() if name.startswith(f"{self.index_type}_")}
        return {"type": self.index_type, **own}


def require_faiss() -> Any:
    """The faiss module.

    Raises:
        ImportError: It is not installed; the message says how to get it.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'llm2clip[search]' brings it") from error
    return faiss


def build_vector_index(settings: VectorIndexSettings, embeds: np.ndarray) -> Any:
    """Build an index of unit vectors by inner product.

    Args:
        settings: Which kind.
        embeds: `(count, width)`, of any floating-point type.

    Returns:
        A faiss index that holds row i under number i.

    Raises:
        ValueError: There are too few rows for the settings.
    """
    count, width = embeds.shape
    faiss = require_faiss()
    product = faiss.METRIC_INNER_PRODUCT
    if settings.index_type == "hnsw":
        index = faiss.IndexHNSWFlat(width, settings.hnsw_links, product)
        index.hnsw.efConstruction, index.hnsw.efSearch = settings.hnsw_construction, settings.hnsw_search
    elif settings.index_type == "ivf":
        cells = settings.ivf_cells or max(1, round(4 * math.sqrt(count)))
        if cells > count:
            raise ValueError(f"an ivf index of {cells} cells needs as many images, but there are {count}; use flat.")
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, product)
        index.nprobe = min(settings.ivf_probes, cells)
        # Fewer images than faiss' own minimum per cell make a worse clustering, which is no reason for a warning.
        index.cp.min_points_per_centroid = 1
        sample = np.unique(np.linspace(0, count - 1, min(count, cells * TRAINING_ROWS_PER_CELL)).astype(np.int64))
        index.train(embeds[sample].astype(np.float32))
    else:
        index = faiss.IndexFlatIP(width)
    for start in range(0, count, ROWS_AT_ONCE):
        index.add(embeds[start : start + ROWS_AT_ONCE].astype(np.float32))
    return index


def write_vector_index(index: Any, path: Path) -> None:
    """Write an index to a file."""
    require_faiss().write_index(index, str(path))


def read_vector_index(path: Path) -> Any:
    """Read an index.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        return require_faiss().read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[-1]}); run llm2clip index again.") from error
