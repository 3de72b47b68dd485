"""What a process holds while it does the same thing again and again: memory, open files, threads, tensors."""

from __future__ import annotations

import gc
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

PAGE = os.sysconf("SC_PAGE_SIZE")
# Memory may grow by this part.
LIMIT = 0.02
# Threads that the pools of libraries may start later, when the machine is busy. One for each call would be thousands.
POOL = 8
# Levels that are compared, at the beginning and at the end; of each the median counts.
ENDS = 5


@dataclass(frozen=True)
class Level:
    """What a process and those that it has started hold.

    Attributes:
        memory: Resident bytes.
        handles, threads: Open files and sockets, and threads, of the process alone.
        tensors: Tensors that are alive in this process; 0 for another one.
    """

    memory: int
    handles: int
    threads: int
    tensors: int = 0

    @classmethod
    def of(cls, process: int | None = None) -> Level:
        """Measure a process, by default this one, in which tensors are counted too."""
        tensors = 0
        if process is None:
            gc.collect()
            tensors = sum(isinstance(entry, torch.Tensor) for entry in gc.get_objects())
        root = Path(f"/proc/{process or os.getpid()}")
        handles, threads = (len(os.listdir(root / name)) for name in ("fd", "task"))
        return cls(sum(map(_resident, _family(root))), handles, threads, tensors)


@dataclass(frozen=True)
class Soak:
    """Levels of a process, from the end of its warm-up to the end of its work.

    Attributes:
        calls: How often something was done between the first and the last level.
    """

    calls: int
    levels: list[Level]

    @classmethod
    def of(cls, call: Callable[[int], Any], calls: int, warm_up: int, process: int | None = None) -> Soak:
        """Call a function with the numbers 0, 1, ..., and measure a process 20 times on the way.

        Args:
            calls: Calls after the warm-up.
            warm_up: Calls before, in which caches fill and the allocator finds its size.
            process: Whom to measure, by default this one.
        """
        for number in range(warm_up):
            call(number)
        levels, every = [Level.of(process)], calls // 20
        for number in range(warm_up, warm_up + calls):
            call(number)
            if (number - warm_up + 1) % every == 0:
                levels.append(Level.of(process))
        return cls(calls, levels)

    def growth(self, name: str) -> float:
        """Return by which part of itself a level has grown."""
        values = [getattr(level, name) for level in self.levels]
        before, after = statistics.median(values[:ENDS]), statistics.median(values[-ENDS:])
        return (after - before) / max(before, 1)

    def faults(self) -> list[str]:
        """Say what has grown."""
        found = []
        pool = POOL / max(1, self.levels[0].threads)
        for name, limit in (("memory", LIMIT), ("handles", 0), ("threads", pool), ("tensors", 0)):
            if self.growth(name) > limit:
                values = [getattr(level, name) for level in self.levels]
                found.append(f"{name} grew by {self.growth(name):.1%} in {self.calls} calls: {values}")
        return found

    def report(self, title: str) -> str:
        """Return a line for people."""
        last = self.levels[-1]
        held = f"{last.memory / 2**20:.0f} MiB, {last.handles} handles, {last.threads} threads"
        return f"soak: {title}: {self.calls} calls, memory {self.growth('memory'):+.2%} ({held})"

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Soak:
        """Read what another process has measured."""
        return cls(fields["calls"], [Level(**level) for level in fields["levels"]])


def cycle(values: Sequence[Any]) -> Callable[[int], Any]:
    """Return a function that returns one value after the other, by number."""
    return lambda number: values[number % len(values)]


def _resident(root: Path) -> int:
    try:
        return int((root / "statm").read_text().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0


def _family(root: Path) -> Iterator[Path]:
    yield root
    for task in (root / "task").glob("*/children"):
        for child in task.read_text().split():
            yield from _family(Path("/proc", child))


if sys.platform != "linux":
    raise ImportError("memory and handles are read from /proc, which Linux has.")
