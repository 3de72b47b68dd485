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
        scores: The scores, 0 to 1, in the order in which they are printed; by default the means of `values`.
        compared: Those that reports compare, in the order of papers; by default the first.
        values: The value of each query, `(queries,)`, whose mean is the score of that name, for bootstrap intervals.
        strata: The part that each value belongs to, `(queries,)` int64, if the score is the mean over parts of their
            means, as over languages or classes.
        clusters: The image that each value belongs to, `(queries,)` int64, if images have several queries; see
            [`bootstrap_interval`].
        summed: What the scores without `values` are computed from, if they are ratios of sums.
        ranks: Mean and median ranks, from 1.
        counts: Numbers of images, texts, queries, tied queries, truncated texts and the like.
        groups: Scores of parts by kind and part, such as `{"language": {"de": {"text_to_image_recall@1": 0.5}}}`.
    """

    protocol: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    compared: tuple[str, ...] = ()
    values: dict[str, Tensor] = field(default_factory=dict)
    strata: dict[str, Tensor] = field(default_factory=dict)
    clusters: dict[str, Tensor] = field(default_factory=dict)
    summed: SummedCounts | None = None
    ranks: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    groups: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scores = self.scores or {name: values.mean().item() for name, values in self.values.items()}
        self.compared = self.compared or tuple(self.scores)[:1]


class BenchmarkProtocol(Protocol):
    """How a benchmark is measured."""

    def measure(self, session: Session, data: Any) -> Measurement:
        """Measure a model on the data of a benchmark."""
        ...
