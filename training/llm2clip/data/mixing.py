"""How several sources are mixed: how many rows of each come before a place of their stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from llm2clip.data.stream_order import GOLDEN_RATIO

Mixing = Literal["one_source_per_step", "proportional", "weights"]


class Mixture(Protocol):
    """A mixture of sources."""

    def before(self, source: int, places: np.ndarray) -> np.ndarray:
        """Return how many rows of a source come before each of some places, (n,) int64."""


class EvenMixture:
    """Rows of all sources, spread evenly.

    Args:
        weights: Share of each source. If they are its number of rows, all sources end their epochs at the same place.
        period: The sum of the numbers of rows, if the weights are these.
    """

    def __init__(self, weights: Sequence[float], period: int | None = None) -> None:
        self.weights, self.period = weights, period

    def before(self, source: int, places: np.ndarray) -> np.ndarray:
        epochs, left = (0, places) if self.period is None else np.divmod(places, self.period)
        # Each source takes its share of what those before it leave: so the rows of all sources are the places.
        for number, weight in enumerate(self.weights):
            rest = sum(self.weights[number:])
            taken = left if number == len(self.weights) - 1 else self._share(left, weight, rest)
            if number == source:
                return taken + (0 if self.period is None else epochs * np.int64(weight))
            left = left - taken
        raise IndexError(source)

    def _share(self, places: np.ndarray, weight: float, rest: float) -> np.ndarray:
        if self.period is not None and max(weight, rest) < 2**31:
            return places * int(weight) // max(1, int(rest))
        return np.floor(places * (weight / rest)).astype(np.int64)


class StepMixture:
    """Steps of one source each, spread evenly.

    Args:
        weights: Share of each source.
        batch: Rows in a step.
    """

    def __init__(self, weights: Sequence[float], batch: int) -> None:
        self.bounds, self.batch = np.cumsum(weights) / sum(weights), batch
        # (steps + 1, sources) how many steps of each source come before a step.
        self._steps = np.zeros((1, len(weights)), dtype=np.int64)

    def before(self, source: int, places: np.ndarray) -> np.ndarray:
        steps, rest = np.divmod(places, self.batch)
        known = self._known(int(steps.max(initial=0)) + 1)[:, source]
        return known[steps] * self.batch + (known[steps + 1] - known[steps]) * rest

    def _known(self, steps: int) -> np.ndarray:
        if len(self._steps) <= steps:
            drawn = (0.5 + np.arange(max(steps, 2 * len(self._steps))) * GOLDEN_RATIO) % 1
            sources = np.searchsorted(self.bounds[:-1], drawn, side="right")
            counted = np.cumsum(sources[:, None] == np.arange(len(self.bounds)), axis=0)
            self._steps = np.concatenate([np.zeros_like(counted[:1]), counted])
        return self._steps


def checked_weights(names: Sequence[str], mixing: Mixing, weights: Sequence[float | None]) -> list[float] | None:
    """Return the weights of sources, None if there are none.

    Raises:
        ValueError: They do not fit `mixing`, or are not given for every source.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        if mixing == "weights":
            raise ValueError("mixing: weights needs a weight for every source.")
        return None
    if mixing == "proportional":
        raise ValueError(
            "mixing: proportional has no weights; remove weight from the sources, or set mixing: weights."
        )
    if len(given) < len(names):
        missing = next(name for name, weight in zip(names, weights, strict=True) if weight is None)
        raise ValueError(f"the source {missing} has no weight, but others have; set it for every source or for none.")
    return given
