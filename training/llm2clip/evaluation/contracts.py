"""What an evaluation is made of: a model, its session of work, a protocol, and what the protocol finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from llm2clip.encoders import Encoder
from llm2clip.encoders.batches import ContentSet


class Session(Protocol):
    """A model at work on benchmarks: its embeddings of images and texts, each computed once and stored.

    Several processes share the work, and each gets all rows.

    Attributes:
        encoder: The model.
        num_workers: Worker processes that decode images; 0 for none.
    """

    encoder: Encoder
    num_workers: int

    def embed_images(self, images: ContentSet) -> Tensor:
        """Embed images: unit rows, float32 `(images, width)` on the CPU, in their order."""
        ...

    def embed_features(self, images: ContentSet, projected: bool = False) -> Tensor:
        """Compute the features of `Encoder.forward_features`, `(images, hidden)`, or projected `(images, width)`."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, in the text format of the session: unit rows, float32 `(texts, width)`, repeats included."""
        ...

    def embed_text_parts(self, texts: Sequence[str], size: int) -> Iterator[Tensor]:
        """Embed texts as `embed_texts` does, and yield `(size, width)` at a time, so that not all are in memory."""
        ...

    def count_in_images(
        self,
        kind: str,
        texts: Sequence[str],
        keys: np.ndarray,
        width: int,
        count: Callable[[Sequence[int]], Iterator[Tensor]],
        title: str,
    ) -> Tensor:
        """Count something in every image, `(images, width)` int64; counts are stored as embeddings are.

        Args:
            kind: A name for what is counted and for all that it depends on besides the model, the images and `texts`.
            texts: Texts that it depends on, as they are before the text format.
            keys: `(images, 2)` int64, which identify the images and whatever belongs to them.
            count: Yields the counts of images at some positions, `(width,)` int64 below 2**31, one after the other.
            title: Title of the progress bar.
        """
        ...

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The same as that of [`Encoder`], for texts in the text format of the session."""
        ...


@dataclass
class SummedCounts:
    """Scores that are ratios of sums over images, such as a mean IoU, for bootstrap intervals.

    Attributes:
        counts: Of each image, `(images, columns)` int64.
        scores: Computes the scores by name, `(...)` float64, from sums of counts `(..., columns)` float64; NaN where
            there is nothing to measure.
    """

    counts: Tensor
    scores: Callable[[Tensor], dict[str, Tensor]]


@dataclass
class Measurement:
    """What a protocol found.

    Attributes:
        protocol: Name and options of the protocol. Scores of two results may be compared if these are equal.
        scores: The scores, 0 to 1, in the order in which they are printed; the first is the one that is compared.
        values: The value of each query, `(queries,)`, whose mean is the score of that name, for bootstrap intervals.
        strata: The part that each value belongs to, `(queries,)` int64, if the score is the mean over parts of their
            means, as over languages or classes; the bootstrap then draws within parts.
        summed: What the scores without `values` are computed from, if they are ratios of sums.
        counts: Numbers of images, texts, queries, tied queries, truncated texts and the like.
        groups: Scores of parts by kind and part, such as `{"language": {"de": {"text_to_image_recall@1": 0.5}}}`.
    """

    protocol: dict[str, Any]
    scores: dict[str, float]
    values: dict[str, Tensor] = field(default_factory=dict)
    strata: dict[str, Tensor] = field(default_factory=dict)
    summed: SummedCounts | None = None
    counts: dict[str, int] = field(default_factory=dict)
    groups: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


class BenchmarkProtocol(Protocol):
    """How a benchmark is measured."""

    def measure(self, session: Session, data: Any) -> Measurement:
        """Measure a model on the data of a benchmark."""
        ...
