"""faiss indexes by name, with the settings that matter."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llm2clip.utils.settings import check_choices, setting

# Rows that are converted to float32 and passed to faiss in one call.
ROWS_AT_ONCE = 16384
# Upper bound on the images per cell that train an IVF index.
TRAINING_ROWS_PER_CELL = 64


@dataclass
class VectorIndexSettings:
    """Type and parameters of a faiss index."""

    index_type: Literal["flat", "ivf", "hnsw"] = setting(
        "flat",
        "flat is exact: at width 512, one core takes 20 ms per query for 100,000 images and 0.3 s for a million. ivf "
        "and hnsw are approximate; they pay off from about 100,000 images on, with many queries; there ivf takes 0.6 "
        "ms per query and a minute to build, hnsw 3 ms and several minutes.",
    )
    ivf_cells: int | None = setting(
        None, "ivf: number of clusters of images; by default 4 x the square root of the number of images."
    )
    ivf_probes: int = setting(16, "ivf: clusters searched per query; raise it for higher recall.")
    hnsw_links: int = setting(32, "hnsw: number of neighbours linked to each image.")
    hnsw_construction: int = setting(80, "hnsw: candidates examined per image when the index is built.")
    hnsw_search: int = setting(64, "hnsw: candidates examined per query; raise it for higher recall.")

    def __post_init__(self) -> None:
        check_choices(self)
        for name, value in vars(self).items():  # those of a subclass too
            least = 0 if name == "num_workers" else 1
            if type(value) is int and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}.")

    def of_type(self) -> dict[str, Any]:
        """The type, and those parameters that apply to it."""
        own = f"{self.index_type}_"
        return {"type": self.index_type} | {
            name: value for name, value in asdict(self).items() if name.startswith(own)
        }


def require_faiss() -> Any:
    """Import faiss, or raise ImportError with the command that installs it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(f"{error}; install it with: pip install 'llm2clip[search]'") from error
    return faiss


def build_vector_index(settings: VectorIndexSettings, embeds: np.ndarray) -> Any:
    """Build a faiss index that ranks unit vectors by inner product; row i gets number i.

    Args:
        embeds: `(count, width)`, any floating-point type.

    Raises:
        ValueError: There are fewer rows than IVF cells.
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
            raise ValueError(
                f"an ivf index of {cells} cells needs at least {cells} images, but there are {count}; lower "
                "ivf_cells, or use the index_type flat."
            )
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, product)
        index.nprobe = min(settings.ivf_probes, cells)
        # faiss warns below its own minimum of images per cell. The clusters are then coarser, but the search works.
        index.cp.min_points_per_centroid = 1
        sample = np.unique(np.linspace(0, count - 1, min(count, cells * TRAINING_ROWS_PER_CELL)).astype(np.int64))
        index.train(embeds[sample].astype(np.float32))
    else:
        index = faiss.IndexFlatIP(width)
    for start in range(0, count, ROWS_AT_ONCE):
        index.add(embeds[start : start + ROWS_AT_ONCE].astype(np.float32))
    return index


def read_vector_index(path: Path) -> Any:
    """Read a faiss index from a file; raise ValueError if it is missing or damaged."""
    try:
        return require_faiss().read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[-1]}); run llm2clip index again.") from error
