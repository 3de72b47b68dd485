"""Parts of a benchmark: a row has contests; a contest has contestants and goals."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = "ours"


@dataclass(frozen=True)
class Outcome:
    """The result of a contestant's work.

    Attributes:
        values: Arrays, tensors or numbers by name, which must equal those of the other contestants.
        metrics: Measurements besides time and memory, such as bytes written. They replace metrics of the worker with
            the same name (`cpu`, `wall`, `memory`).
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


Work = Callable[[], Outcome]


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
        set_up: Prepares everything, which is not measured, and returns the work, which is measured.
        environment: Environment to run in (see `benchmarks.environments`); None for the current one.
    """

    set_up: Callable[[], Work]
    environment: str | None = None


@dataclass(frozen=True)
class Goal:
    """The ratio ours / theirs to reach.

    Attributes:
        against: The other contestant.
        metric: `cpu` (seconds of all threads; on a GPU, `wall` replaces it), `wall` (seconds), `memory` (peak increase
            during the work, bytes), or a metric of the outcome.
        at_most: Largest ratio.
    """

    against: str
    metric: str
    at_most: float


@dataclass(frozen=True)
class Contest:
    """The same work, done by several contestants.

    Attributes:
        title: The size of the work.
        contestants: Contestants by name; the first is named `ours`.
        goals: Ratios to reach.
        tolerance: Largest difference of each compared value, relative to its largest magnitude; 0 requires equality.
        rounds: Number of measured turns of every contestant, after a first one.
        threads: Threads of torch and of its libraries.
        note: Note in RESULTS.md.
    """

    title: str
    contestants: Mapping[str, Contestant]
    goals: tuple[Goal, ...]
    tolerance: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 5
    threads: int = 1
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        id: R1, R2, ...
        work: Description of the work.
        contests: Builds the contests for a device, `cpu` or `cuda`; their sizes may differ.
        devices: Devices that the row applies to.
        shortfall: Why the row misses a goal, for RESULTS.md where it does.
    """

    id: str
    work: str
    contests: Callable[[str], list[Contest]]
    devices: tuple[str, ...] = ("cpu",)
    shortfall: str = ""


def row_modules() -> dict[str, str]:
    """Return the module of every row by its id, in order."""
    package = importlib.import_module("benchmarks.rows")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    # r04_info_nce contains R4
    return {f"R{int(name[1:3])}": f"benchmarks.rows.{name}" for name in names if name.startswith("r")}


def load_row(module: str) -> Row:
    """Import the row of a module."""
    row: Row = importlib.import_module(module).ROW
    return row
