"""Vectors as what an index is of, and as the model that embeds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from llm2clip.encoders import Encoder
from llm2clip.encoders.loop import TokenizedTexts
from llm2clip.search.folder_items import BINARY, TEXT, Items, digest
from llm2clip.search.listing import Listing
from llm2clip.search.store import DIGEST, KEY
from llm2clip.store.shards import ComputedRows

if TYPE_CHECKING:
    from benchmarks.search_inputs import Mixture

AT_ONCE = 4096


class MixtureItems(Items):
    """Numbered vectors, with their sources.

    Args:
        seeds: What the vectors whose seed is not 0 are of, by number: other ones are embedded anew.
    """

    def __init__(self, mixture: Mixture, seeds: dict[int, int] | None = None) -> None:
        self.mixture, self.seeds = mixture, seeds or {}
        self.source = {"kind": "folder", "path": "none"}
        self.columns = {KEY: TEXT, "source": TEXT, DIGEST: BINARY}
        self.metadata_columns, self.max_pixels, self.failures = [], 1, {}

    def __len__(self) -> int:
        return len(self.mixture.vectors)

    def batches(self, before: Sequence[Listing]) -> Iterator[pa.Table]:
        for start in range(0, len(self), AT_ONCE):
            numbers = range(start, min(len(self), start + AT_ONCE))
            keys = [f"{number:09}" for number in numbers]
            digests = [digest(f"{number} {self.seeds.get(number, 0)}") for number in numbers]
            columns = {KEY: keys, "source": self.mixture.sources[start : numbers.stop].tolist(), DIGEST: digests}
            yield pa.table(columns, pa.schema(list(self.columns.items())))

    def choose(self, rows: pa.Table) -> list[int]:
        return [int(key) for key in rows[KEY].to_pylist()]


class MixtureEncoder(Encoder):
    """A model that has the embeddings already."""

    library, commit = "none", None

    def __init__(self, mixture: Mixture) -> None:
        super().__init__("mixture", torch.nn.Identity(), mixture.vectors.shape[1], torch.device("cpu"), "float32")
        self.mixture = mixture

    def fingerprint(self) -> str:
        return "mixture"

    def encode_image_parts(self, images: Any, rows: Sequence[int], *_: Any, **__: Any) -> Iterator[ComputedRows]:
        for start in range(0, len(rows), AT_ONCE):
            chosen = [images[row] for row in rows[start : start + AT_ONCE]]
            yield ComputedRows(torch.from_numpy(self.mixture.vectors[chosen]))

    def settings(self) -> dict[str, Any]:
        return {}

    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    pooled_features = image_features

    def tokenized(self, texts: list[str]) -> TokenizedTexts:
        raise NotImplementedError

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError
