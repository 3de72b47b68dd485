"""What waits for the model, and whose turn it is."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Kind = Literal["text", "image"]
# What a batch should take, if its inputs take long: so long do others wait for each request before them.
TURN_SECONDS = 1.0


class Work:
    """The texts, or the prepared images, of one request.

    Args:
        inputs, names: The inputs, and the names of them in errors.
        costs: The cost of each input: about the tokens of a text, values of an image.
        width: Width of the embeddings.

    Attributes:
        rows: Their embeddings, float32 `(inputs, width)`.
        future: Done when all rows are, or one of them failed; cancelled when nobody waits for it any more.
        start: The first input that is in no batch yet.
        tokens: Tokens of the texts, before truncation.
    """

    def __init__(
        self, kind: Kind, inputs: Sequence[Any], names: Sequence[str], costs: Sequence[int], width: int
    ) -> None:
        self.kind, self.inputs, self.names, self.costs = kind, inputs, names, costs
        self.rows = np.empty((len(inputs), width), np.float32)
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self.start, self.tokens = 0, 0
        self.has_failed = False

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it."""
        return self.has_failed or self.future.cancelled()

    @property
    def is_taken(self) -> bool:
        """Whether all inputs are in a batch."""
        return self.start == len(self.inputs)


class Part(NamedTuple):
    """The inputs of one request that are in a batch."""

    work: Work
    rows: range

    @property
    def inputs(self) -> Sequence[Any]:
        return self.work.inputs[self.rows.start : self.rows.stop]

    @property
    def cost(self) -> int:
        return sum(self.work.costs[self.rows.start : self.rows.stop])


class Turns:
    """The requests that wait, in turn: a batch is shared equally, and the rest of a request goes behind the others.

    Args:
        budgets: The cost of a batch of each kind: of a forward pass. Where that takes long, a batch costs less.
    """

    def __init__(self, budgets: Mapping[Kind, int]) -> None:
        self.budgets = budgets
        # Cost that the model computes in a second.
        self._speeds: dict[Kind, float] = dict.fromkeys(budgets, math.inf)
        self._waiting: list[Work] = []
        # Those of which a part was in the last batch: others that arrive until the next one go before them.
        self._begun: list[Work] = []

    def __bool__(self) -> bool:
        return bool(self._waiting or self._begun)

    def measure(self, parts: Sequence[Part], seconds: float) -> None:
        """Learn how long a batch takes."""
        kind = parts[0].work.kind
        speed, old = sum(part.cost for part in parts) / max(seconds, 1e-6), self._speeds[kind]
        self._speeds[kind] = speed if math.isinf(old) else (old + speed) / 2

    def take(self, arrived: Iterable[Work], only_full: bool = False) -> list[Part]:
        """Take the inputs of a batch, of the kind that has waited longest: as many as fit, and at least one.

        Args:
            arrived: Requests that are new.
            only_full: Take nothing if more would fit.
        """
        waiting = [work for work in (*self._waiting, *arrived, *self._begun) if not work.is_over]
        self._waiting, self._begun = waiting, []
        if not waiting:
            return []
        asking = [work for work in waiting if work.kind == waiting[0].kind]
        parts, is_full = self._share(asking)
        if only_full and not is_full:
            return []
        for work, rows in parts:
            work.start = rows.stop
        self._begun = [work for work, _ in parts if not work.is_taken]
        taken = {id(work) for work, _ in parts}
        self._waiting = [work for work in waiting if id(work) not in taken]
        return parts

    def _share(self, asking: list[Work]) -> tuple[list[Part], bool]:
        """Share a batch among requests of one kind; also return whether more would fit into no batch."""
        kind = asking[0].kind
        left = min(self.budgets[kind], TURN_SECONDS * self._speeds[kind])
        stops, share = [work.start for work in asking], left / len(asking)
        is_empty = True
        # Each has one input, or as many as its share; what is left goes to the first ones.
        for most in (share, math.inf):
            for number, work in enumerate(asking):
                used = 0
                for cost in work.costs[stops[number] :]:
                    is_first = stops[number] == work.start
                    if not (is_empty or cost <= left) or not (is_first or used + cost <= most):
                        break
                    left, used, is_empty = left - cost, used + cost, False
                    stops[number] += 1
        parts = [Part(work, range(work.start, stop)) for work, stop in zip(asking, stops, strict=True)]
        is_full = any(part.rows.stop < len(part.work.inputs) for part in parts)
        return [part for part in parts if part.rows], is_full
