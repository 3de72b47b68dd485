"""A model whose embeddings are given in tables, for tests of protocols.

    session = FakeSession(images=[[1, 0], [0, 1]], texts={"a dog": [1, 0], "a cat": [1, 1]})

Images are found by their position, or by content or key:

    session = FakeSession(images={b"first": [1, 0], "folder/second.png": [0, 1]}, texts=...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.v2.functional import pil_to_tensor

from llm2clip.data import OnError
from llm2clip.encoders import Encoder
from llm2clip.evaluation.data import BenchmarkImages
from llm2clip.evaluation.session import Session
from llm2clip.store.shards import ComputedRows

Table = Sequence[Sequence[float]] | Tensor | Mapping[Any, Sequence[float] | Tensor]


class FakeEncoder(Encoder):
    """An [`Encoder`] from tables.

    Args:
        images: Features of the images after the projection: rows in their order, or by content (bytes or path) or key.
        texts: Embedding of each text; a text that is not in it is a KeyError. It is normalised.
        features: As `images`, before the projection; by default the same.
        max_words: A text of more words is cut; a token is a word.
        patches: Computes `forward_patches` from the inputs, for segmentation.
        name: Its name, also its fingerprint.

    Attributes:
        embedded: The lists of texts that were embedded, call by call, and the numbers of images.
    """

    library = "tests"

    def __init__(
        self,
        images: Table,
        texts: Mapping[str, Sequence[float] | Tensor],
        features: Table | None = None,
        max_words: int = 77,
        patches: Callable[[dict[str, Tensor]], Tensor] | None = None,
        name: str = "fake",
    ) -> None:
        self.texts = {text: torch.as_tensor(row, dtype=torch.float32) for text, row in texts.items()}
        width = len(next(iter(self.texts.values()))) if self.texts else 0
        super().__init__(name, torch.nn.Module(), width, torch.device("cpu"), "float32")
        self.images, self.features = images, images if features is None else features
        self.max_words, self.patches = max_words, patches
        self.embedded: list[list[str] | int] = []

    @cached_property
    def commit(self) -> str | None:
        return None

    def fingerprint(self) -> str:
        return self.name

    def settings(self) -> dict[str, Any]:
        return {}

    def prepare_pixels(self, image: Any) -> dict[str, Tensor]:
        return {"pixel_values": pil_to_tensor(image).float()}

    def prepare(self, image: Any, key: str) -> dict[str, Tensor]:
        return self.prepare_pixels(image)

    def encode_image_parts(
        self,
        images: Any,
        rows: Sequence[int],
        batch_size: int = 64,
        num_workers: int = 0,
        on_error: OnError = "raise",
        forward: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> Iterator[ComputedRows]:
        if not len(rows):
            return
        self.embedded.append(len(rows))
        yield ComputedRows((forward or self.forward_images)({"images": images, "rows": rows}))

    def image_features(self, inputs: dict[str, Any]) -> Tensor:
        return _find(self.images, **inputs)

    def pooled_features(self, inputs: dict[str, Any]) -> Tensor:
        return _find(self.features, **inputs)

    def forward_patches(self, inputs: dict[str, Tensor]) -> Tensor:
        assert self.patches is not None, "this encoder has no patches"
        return normalize(self.patches(inputs), dim=-1)

    def tokenized(self, texts: list[str]) -> Any:
        raise NotImplementedError

    def encode_text(
        self, texts: Sequence[str] | str, batch_size: int | None = None, show_progress_bar: bool = False
    ) -> Tensor:
        self.embedded.append(list(texts))
        return normalize(torch.stack([self.texts[text] for text in texts]), dim=1)

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(text.split()) for text in texts], dtype=torch.int64)
        return lengths, lengths > self.max_words


class FakeSession(Session):
    """A [`Session`] of a [`FakeEncoder`], whose arguments it takes; and a folder, `store`."""

    encoder: FakeEncoder

    def __init__(self, images: Table, texts: Mapping[str, Any], store: Path | None = None, **encoder: Any) -> None:
        super().__init__(FakeEncoder(images, texts, **encoder), store, show_progress_bar=False)

    @property
    def embedded(self) -> list[list[str] | int]:
        return self.encoder.embedded


def numbered_images(count: int) -> BenchmarkImages:
    """Images of the contents `0`, `1` and so on."""
    return BenchmarkImages([str(number).encode() for number in range(count)])


def _find(table: Table, images: Any, rows: Sequence[int]) -> Tensor:
    if isinstance(table, Mapping):
        found = [table.get(images.images[row], table.get(images.key(row))) for row in rows]
        return torch.stack([torch.as_tensor(row, dtype=torch.float32) for row in found])
    assert len(table) == len(images), f"the table has {len(table)} rows for {len(images)} images"
    return torch.as_tensor(table, dtype=torch.float32)[list(rows)]
