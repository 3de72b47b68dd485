"""Type and parameters of the index that finds the nearest embeddings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from llm2clip.utils.settings import check_choices, setting

# Up to here, comparing a query with every embedding takes at most a tenth of a second.
EXACT_IMAGES = 100_000
# The codes of ivf_rq are made of groups of as many values.
RQ_GROUP = 8


@dataclass
class VectorSettings:
    """Type and parameters of the vector index."""

    index_type: Literal["auto", "flat", "ivf_rq", "faiss"] = setting(
        "auto",
        "flat compares a query with every embedding, on disk: exact, 50 ms for 100,000 images of width 512. ivf_rq "
        "reads codes of 4 bits per value of the nearest cells and compares the best again by their embeddings: on "
        "disk too, 5 ms for a million. auto is flat up to 100,000 images, and ivf_rq above. faiss is its IVF,SQ8: "
        "0.2 ms for a million, but every search first reads the whole index into memory (8 bits per value).",
    )
    cells: int | None = setting(
        None,
        "ivf_rq and faiss: number of clusters of images; by default one per 8,192 images, for faiss one per 1,000.",
    )
    probes: int = setting(16, "ivf_rq and faiss: clusters searched per query; raise it for higher recall.")
    refine: int = setting(
        5, "ivf_rq: candidates per result that are compared by their embeddings; raise it for recall."
    )

    def __post_init__(self) -> None:
        check_choices(self)
        for name, value in vars(self).items():  # those of a subclass too
            least = 0 if name == "num_workers" else 1
            if type(value) is int and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}.")

    def index_of(self, images: int, width: int) -> dict[str, Any]:
        """Return the type for so many images, with those parameters that apply to it.

        Raises:
            ValueError: There are fewer images than cells, or ivf_rq cannot index embeddings of this width.
        """
        kind: str = self.index_type
        if kind == "auto":
            kind = "ivf_rq" if images > EXACT_IMAGES and width % RQ_GROUP == 0 else "flat"
        if kind == "ivf_rq" and width % RQ_GROUP:
            raise ValueError(
                f"ivf_rq needs embeddings whose width is a multiple of {RQ_GROUP}, but it is {width}; use the "
                "index_type flat or faiss."
            )
        if kind != "flat" and self.cells is not None and self.cells > images:
            raise ValueError(
                f"an index of {self.cells} cells needs at least {self.cells} images, but there are {images}; lower "
                "cells, or use the index_type flat."
            )
        names = {"flat": (), "ivf_rq": ("cells", "probes", "refine"), "faiss": ("cells", "probes")}[kind]
        return {"type": kind, **{name: value for name, value in asdict(self).items() if name in names}}
