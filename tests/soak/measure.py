"""What a process holds while it does the same thing again and again: memory, open files, threads, tensors."""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    """Bytes of a process and those that it has started; its open files and sockets, threads, and tensors if known."""

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
    """Levels of a process, from the end of its warm-up to the end of its work, and how many calls that was."""

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

    def faults(self, title: str) -> list[str]:
        """Say what has grown; prints the growth of memory."""
        last = self.levels[-1]
        held = f"{last.memory / 2**20:.0f} MiB, {last.handles} handles, {last.threads} threads"
        print(f"soak: {title}: {self.calls} calls, memory {self.growth('memory'):+.2%} ({held})")
        pool = POOL / max(1, self.levels[0].threads)
        limits = {"memory": LIMIT, "handles": 0, "threads": pool, "tensors": 0}
        return [
            f"{name} grew by {self.growth(name):.1%}: {[getattr(level, name) for level in self.levels]}"
            for name, limit in limits.items()
            if self.growth(name) > limit
        ]


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
