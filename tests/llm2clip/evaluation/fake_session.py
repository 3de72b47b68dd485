"""A model whose embeddings are given in tables, for tests of protocols.

    session = FakeSession(images=[[1, 0], [0, 1]], texts={"a dog": [1, 0], "a cat": [1, 1]})

Images are found by their position, or by content or key:

    session = FakeSession(images={b"first": [1, 0], "folder/second.png": [0, 1]}, texts=...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from llm2clip.encoders.batches import ImageSet
from llm2clip.evaluation.session import Stopwatch

Rows = Sequence[Sequence[float]] | Tensor
Table = Rows | Mapping[Any, Sequence[float] | Tensor]


class FakeEncoder:
    """An [`Encoder`] from tables.

    Args:
        texts: Embedding of each text; a text that is not in it is a KeyError. It is normalised.
        max_words: A text of more words is cut; a token is a word.
        patches: Computes `forward_patches` from the inputs, for segmentation.
        name: Its name, also its fingerprint.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        texts: Mapping[str, Sequence[float] | Tensor],
        max_words: int = 77,
        patches: Callable[[dict[str, Tensor]], Tensor] | None = None,
        name: str = "fake",
    ) -> None:
        self.texts = {text: torch.as_tensor(row, dtype=torch.float32) for text, row in texts.items()}
        self.max_words = max_words
        self.patches = patches
        self.name = name
        self.width = len(next(iter(self.texts.values()))) if self.texts else 0

    def identity(self) -> dict[str, str]:
        return {"library": "tests", "name": self.name, "revision": "0" * 40, "dtype": "float32"}

    def fingerprint(self) -> str:
        return self.name

    def prepare(self, image: Any, key: str) -> dict[str, Tensor]:
        return {"pixel_values": torch.tensor(list(image.convert("RGB").tobytes())).view(image.height, image.width, 3)}

    def forward_images(self, inputs: dict[str, Tensor]) -> Tensor:
        raise AssertionError("a protocol embeds images through its session")

    def forward_features(self, inputs: dict[str, Tensor], projected: bool = False) -> Tensor:
        raise AssertionError("a protocol computes features through its session")

    def prepare_pixels(self, image: Any) -> dict[str, Tensor]:
        return {"pixel_values": self.prepare(image, "image")["pixel_values"].permute(2, 0, 1).float()}

    def forward_patches(self, inputs: dict[str, Tensor]) -> Tensor:
        assert self.patches is not None, "this encoder has no patches"
        return normalize(self.patches(inputs), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        if not texts:
            return torch.zeros(0, self.width)
        return normalize(torch.stack([self.texts[text] for text in texts]), dim=1)

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(text.split()) for text in texts], dtype=torch.int64)
        return lengths, lengths > self.max_words


class FakeSession:
    """A [`Session`] from tables.

    Args:
        images: Embeddings of the images: rows in their order, or by content (bytes or path) or key. Normalised.
        texts: Embedding of each text, or an encoder.
        features: As `images`, for linear probes; by default the embeddings. They are not normalised.
        projected: As `features`, of the features after the projection.
        text_format: Applied to every text first.

    Attributes:
        embedded: The lists of texts that were embedded, call by call, and the numbers of images.
    """

    def __init__(
        self,
        images: Table,
        texts: Mapping[str, Sequence[float] | Tensor] | FakeEncoder,
        features: Table | None = None,
        projected: Table | None = None,
        text_format: Callable[[str], str] = str,
        **encoder: Any,
    ) -> None:
        self.num_workers, self.watch = 0, Stopwatch()
        self.images = images
        self.features = images if features is None else features
        self.projected = images if projected is None else projected
        self.encoder = texts if isinstance(texts, FakeEncoder) else FakeEncoder(texts, **encoder)
        self.text_format = text_format
        self.embedded: list[list[str] | int] = []

    def embed_images(self, images: ImageSet) -> Tensor:
        self.embedded.append(len(images))  # type: ignore[arg-type]
        with self.watch.measure("images"):
            return normalize(_find(self.images, images), dim=1)

    def embed_features(self, images: ImageSet, projected: bool = False) -> Tensor:
        return _find(self.projected if projected else self.features, images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self.embedded.append(list(texts))
        with self.watch.measure("texts"):
            return self.encoder.encode_text([self.text_format(text) for text in texts])

    def embed_text_parts(self, texts: Sequence[str], size: int) -> Iterator[Tensor]:
        yield from self.embed_texts(texts).split(size)

    def count_in_images(
        self,
        kind: str,
        texts: Sequence[str],
        keys: np.ndarray,
        width: int,
        count: Callable[[Sequence[int]], Iterator[Tensor]],
        title: str,
    ) -> Tensor:
        assert keys.shape[1] == 2
        return torch.stack([*count(range(len(keys)))]).view(len(keys), width)

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.encoder.text_lengths([self.text_format(text) for text in texts])


def _find(table: Table, images: Any) -> Tensor:
    if not isinstance(table, Mapping):
        rows = torch.as_tensor(table, dtype=torch.float32)
        assert len(rows) == len(images), f"the table has {len(rows)} rows for {len(images)} images"
        return rows
    found = [table[image] if image in table else table[images.key(row)] for row, image in enumerate(images.images)]
    return torch.stack([torch.as_tensor(row, dtype=torch.float32) for row in found])
