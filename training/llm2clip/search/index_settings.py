"""How an index is built and brought up to date: the type of its vector index, data type, batches, shards."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from llm2clip.command_line.settings import check_choices, refuse, setting

logger = logging.getLogger(__name__)

# Images per forward pass, by default.
IMAGES_AT_ONCE = 64
# Up to here, comparing a query with every embedding takes at most a tenth of a second.
EXACT_IMAGES = 100_000
# The codes of ivf_rq are made of groups of as many values.
RQ_GROUP = 8
# Largest widths that hnsw of pgvector takes.
HNSW_WIDTHS = {"float16": 4000, "float32": 2000}
PARAMETERS: dict[str, tuple[str, ...]] = {
    "flat": (),
    "ivf_rq": ("cells", "probes", "refine"),
    "hnsw": ("m", "ef_construction", "ef_search"),
}


@dataclass
class IndexSettings:
    """How an index is built and updated."""

    index_type: Literal["auto", "flat", "ivf_rq", "hnsw"] = setting(
        "auto",
        "flat compares a query with every embedding, on disk: exact, 0.1 s for 100,000 images of width 512. ivf_rq "
        "reads codes of 4 bits per value of the nearest cells and compares the best again by their embeddings: on "
        "disk too, 7 ms for a million. auto is flat up to 100,000 images, and ivf_rq above. "
        "In PostgreSQL, auto is flat up to 100,000 images, and hnsw above: a graph of pgvector.",
    )
    cells: int | None = setting(None, "ivf_rq: number of clusters of images; by default one per 8,192 images.")
    probes: int = setting(16, "ivf_rq: clusters searched per query; raise it for higher recall.")
    refine: int = setting(
        5, "ivf_rq: candidates per result that are compared by their embeddings; raise it for higher recall."
    )
    m: int = setting(16, "hnsw: neighbors of an image in the graph.")
    ef_construction: int = setting(64, "hnsw: candidates for the neighbors of an image; raise it for recall.")
    ef_search: int = setting(100, "hnsw: candidates compared per query, at most 1000; raise it for higher recall.")
    stored_dtype: Literal["float16", "float32"] = setting("float16", "Data type of the stored embeddings.")
    batch_size: int | None = setting(
        None,
        "Images per forward pass, by default 64; captions, which are grouped by length, by default as many as 512 "
        "tokens on a CPU and 16,384 elsewhere allow.",
    )
    num_workers: int | None = setting(
        None,
        "Threads that decode images, or processes with PostgreSQL; by default one per core, at most 8; 0 for none.",
    )
    shard_size: int = setting(
        4096, "Images or captions per file of stored embeddings; a killed run loses at most one."
    )
    rows_dir: str | None = setting(
        None,
        "Of an index at a URL or in PostgreSQL, the local folder of the stored embeddings, from which its table is "
        "made; by default one in runs/index, named after the index. An index in a folder has them in it.",
    )
    overwrite: bool = setting(False, "Embed everything again; the existing index stays until that is done.")
    allow_removals: bool = setting(
        False, "Update the index although more than half of its images are gone, as they are when a disk is missing."
    )

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

    def type_of(self, types: tuple[str, ...], width: int | None = None) -> str:
        """Return the chosen type, which is `auto` while the number of images decides.

        Args:
            types: Those of the store: flat, and then the one for many images.
            width: That of the embeddings, if it is known.

        Raises:
            ValueError: It has no index for this width, or does not use a setting.
        """
        kind = self.index_type
        if kind not in ("auto", *types):
            raise ValueError(f"index_type is {kind}, but such an index has one of auto, {', '.join(types)}.")
        most = types[1] if kind == "auto" else kind  # what uses the most settings
        others = {name for names in PARAMETERS.values() for name in names} - {*PARAMETERS[most]}
        refuse(self, sorted(others), f"an index of the type {most} does not use it")
        if width is not None and (limit := self._limit(kind, width)):
            raise ValueError(f"{kind} takes {limit}, but the width is {width:,}; use the index_type flat.")
        return kind

    def index_of(self, images: int, width: int, types: tuple[str, ...]) -> dict[str, Any]:
        """Return the type for so many images, with those parameters that apply to it.

        Raises:
            ValueError: There are fewer images than cells; otherwise see `type_of`.
        """
        kind = self.type_of(types, width)
        if kind == "auto":
            kind = "flat" if images <= EXACT_IMAGES else types[1]
            if limit := self._limit(kind, width):
                logger.warning("%s takes %s, not %d: a search compares all.", kind, limit, width)
                kind = "flat"
        if "cells" in PARAMETERS[kind] and self.cells is not None and self.cells > images:
            raise ValueError(
                f"an index of {self.cells} cells needs at least {self.cells} images, but there are {images}; lower "
                "cells, or use the index_type flat."
            )
        return {"type": kind, **{name: getattr(self, name) for name in PARAMETERS[kind]}}

    def _limit(self, kind: str, width: int) -> str:
        """Say which embeddings a type takes; empty if it takes those of a width."""
        if kind == "ivf_rq" and width % RQ_GROUP:
            return f"widths that are multiples of {RQ_GROUP}"
        if kind == "hnsw" and width > HNSW_WIDTHS[self.stored_dtype]:
            return f"up to {HNSW_WIDTHS[self.stored_dtype]:,} values of {self.stored_dtype}"
        return ""
