"""What an evaluation is made of: a protocol, and what the protocol finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from llm2clip.evaluation.session import Session


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
