"""Type and parameters of the index that finds the nearest embeddings."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llm2clip.utils.settings import check_choices, setting

logger = logging.getLogger(__name__)

# Up to here, comparing a query with every embedding takes at most a tenth of a second.
EXACT_IMAGES = 100_000
# The codes of ivf_rq are made of groups of as many values.
RQ_GROUP = 8
# Largest widths that hnsw of pgvector takes.
HNSW_WIDTHS = {"float16": 4000, "float32": 2000}
PARAMETERS: dict[str, tuple[str, ...]] = {
    "flat": (),
    "ivf_rq": ("cells", "probes", "refine"),
    "faiss": ("cells", "probes"),
    "hnsw": ("m", "ef_construction", "ef_search"),
}


@dataclass
class VectorSettings:
    """Type and parameters of the vector index."""

    index_type: Literal["auto", "flat", "ivf_rq", "faiss", "hnsw"] = setting(
        "auto",
        "flat compares a query with every embedding, on disk: exact, 50 ms for 100,000 images of width 512. ivf_rq "
        "reads codes of 4 bits per value of the nearest cells and compares the best again by their embeddings: on "
        "disk too, 7 ms for a million. auto is flat up to 100,000 images, and ivf_rq above. faiss is its IVF,SQ8: "
        "1 ms for a million, but every search first reads the whole index into memory (8 bits per value). "
        "In PostgreSQL, auto is flat up to 100,000 images, and hnsw above: a graph that pgvector keeps up to date.",
    )
    cells: int | None = setting(
        None,
        "ivf_rq and faiss: number of clusters of images; by default one per 8,192 images, for faiss one per 1,000.",
    )
    probes: int = setting(16, "ivf_rq and faiss: clusters searched per query; raise it for higher recall.")
    refine: int = setting(
        5, "ivf_rq: candidates per result that are compared by their embeddings; raise it for recall."
    )

    m: int = setting(16, "hnsw: neighbors of an image in the graph.")
    ef_construction: int = setting(64, "hnsw: candidates for the neighbors of an image; raise it for recall.")
    ef_search: int = setting(100, "hnsw: candidates compared per query, at most 1000; raise it for higher recall.")

    def __post_init__(self) -> None:
        check_choices(self)
        for name, value in vars(self).items():  # those of a subclass too
            least = 0 if name == "num_workers" else 1
            if type(value) is int and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}.")
        if not (2 <= self.m <= 100 and 2 * self.m <= self.ef_construction <= 1000 and self.ef_search <= 1000):
            raise ValueError(
                f"m, ef_construction and ef_search are {self.m}, {self.ef_construction} and {self.ef_search}, but "
                "hnsw takes m from 2 to 100, ef_construction from twice m to 1000, and ef_search up to 1000."
            )

    def require_width(self, width: int, dtype: str) -> None:
        """Raise ValueError if an index of the chosen type cannot hold embeddings of this width and data type."""
        if self.index_type == "ivf_rq" and width % RQ_GROUP:
            raise ValueError(
                f"ivf_rq needs embeddings whose width is a multiple of {RQ_GROUP}, but it is {width}; use the "
                "index_type flat or faiss."
            )
        if self.index_type == "hnsw" and width > HNSW_WIDTHS[dtype]:
            raise ValueError(
                f"hnsw takes embeddings of up to {HNSW_WIDTHS[dtype]:,} values of {dtype}, but the width is {width:,}"
                f"; use the index_type flat{', or the dtype float16' if width <= HNSW_WIDTHS['float16'] else ''}."
            )

    def index_of(self, images: int, width: int, dtype: str, types: tuple[str, ...]) -> dict[str, Any]:
        """Return the type for so many images, with those parameters that apply to it.

        Args:
            types: Those of the store: flat, and then the one for many images.

        Raises:
            ValueError: There are fewer images than cells, or the type cannot hold embeddings of this width.
        """
        self.require_width(width, dtype)
        kind: str = self.index_type
        if kind == "auto":
            many = types[1]
            fits = width % RQ_GROUP == 0 if many == "ivf_rq" else width <= HNSW_WIDTHS[dtype]
            kind = many if images > EXACT_IMAGES and fits else "flat"
            if images > EXACT_IMAGES and not fits:
                logger.warning("%s cannot index %d values of %s: a search compares all images.", many, width, dtype)
        if "cells" in PARAMETERS[kind] and self.cells is not None and self.cells > images:
            raise ValueError(
                f"an index of {self.cells} cells needs at least {self.cells} images, but there are {images}; lower "
                "cells, or use the index_type flat."
            )
        names = PARAMETERS[kind]
        return {"type": kind, **{name: value for name, value in asdict(self).items() if name in names}}
