"""What a benchmark is made of: a row has contests, a contest has contestants and goals."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = "ours"


@dataclass(frozen=True)
class Outcome:
    """What a contestant's work gives.

    Attributes:
        values: Arrays (or tensors, or numbers) by name, that have to equal those of the other contestants.
        metrics: What was measured besides time and memory, such as bytes written; a metric that the worker measures
            itself (`cpu`, `wall`, `memory`) is replaced by the one here.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


Work = Callable[[], Outcome]


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
        set_up: Makes everything ready, which is not measured, and returns the work, which is.
        environment: Name of the peers' environment to run in (see `benchmarks.environments`); None: this one.
        is_limit: This is no way to do the work but the least that it can cost, such as its matrix products alone;
            its values are not compared.
    """

    set_up: Callable[[], Work]
    environment: str | None = None
    is_limit: bool = False


@dataclass(frozen=True)
class Goal:
    """What is to be reached: ours / another contestant's.

    Attributes:
        against: The other contestant.
        metric: `cpu` (seconds of all threads; on a card `wall` takes its place), `wall` (seconds), `memory` (peak
            above what was there before the work, bytes) or a metric of the outcome.
        at_most: Largest ratio.
    """

    against: str
    metric: str
    at_most: float


@dataclass(frozen=True)
class Contest:
    """The same work, by several contestants.

    Attributes:
        title: The size of the work.
        contestants: By name; the first is ours, named `ours`.
        goals: What is to be reached.
        tolerance: For each value that is compared, the largest difference over the largest magnitude; 0 for equality.
        rounds: How often every contestant does the work; they take turns.
        threads: Threads of torch and of the libraries below it.
        note: What the table says about this contest.
    """

    title: str
    contestants: Mapping[str, Contestant]
    goals: tuple[Goal, ...]
    tolerance: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 5
    threads: int = 1
    note: str = ""

    def __post_init__(self) -> None:
        if next(iter(self.contestants)) != OURS:
            raise ValueError(f"the first contestant of {self.title!r} has to be named {OURS!r}.")
        unknown = {goal.against for goal in self.goals} - set(self.contestants)
        if unknown:
            raise ValueError(f"{self.title!r} has goals against {sorted(unknown)}, who do not take part.")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        id: R1, R2, ...
        work: What is done.
        contests: Makes the contests for a device, `cpu` or `cuda`; sizes may differ between them.
        devices: Where this row means something.
    """

    id: str
    work: str
    contests: Callable[[str], list[Contest]]
    devices: tuple[str, ...] = ("cpu",)


def row_modules() -> dict[str, str]:
    """The module of every row by the row's id, in order."""
    package = importlib.import_module("benchmarks.rows")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    # r04_info_nce holds R4
    return {f"R{int(name[1:3])}": f"benchmarks.rows.{name}" for name in names if name.startswith("r")}


def load_row(module: str) -> Row:
    """The row of a module."""
    row: Row = importlib.import_module(module).ROW
    return row
