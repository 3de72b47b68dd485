"""Run a command with all its processes, watch their memory and CPU time, and kill them in the middle."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.contest import environment_of
from benchmarks.worker import resident


@dataclass
class Watched:
    """What a command took.

    Attributes:
        start, end: Seconds since the epoch.
        peaks: Peak resident memory of each of its processes in bytes.
        looks: CPU seconds of all its processes, and how much was done, every 0.2 seconds.
    """

    start: float
    end: float = 0.0
    peaks: dict[int, int] = field(default_factory=dict)
    looks: list[tuple[float, int]] = field(default_factory=list)

    @property
    def cpu_per_unit(self) -> tuple[float, int]:
        """CPU seconds between the first and the last unit of work that was seen, and how many units these were."""
        working = [look for look in self.looks if look[1] > self.looks[0][1]]
        return (working[-1][0] - working[0][0], working[-1][1] - working[0][1]) if working else (0.0, 0)


def run_watched(
    arguments: list[str], log: Path, count: Callable[[], int] = int, kill_at: int | None = None
) -> Watched:
    """Run a Python command to its end, or until it has done so much: then all its processes are killed by SIGKILL.

    Args:
        arguments: Arguments of the interpreter.
        log: File that its output is appended to.
        count: Counts what is done.
        kill_at: The count at which it is killed.

    Raises:
        RuntimeError: The command failed.
    """
    watched, seconds, killed = Watched(time.time()), dict[int, float](), False
    with log.open("ab") as output:
        process = psutil.Popen(
            [sys.executable, *arguments], env=environment_of(1), stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        while process.poll() is None:
            for member in family(process):
                with contextlib.suppress(psutil.Error, OSError):
                    seconds[member.pid] = sum(member.cpu_times()[:2])
                    # A process that has just ended has no memory any more.
                    watched.peaks[member.pid] = max(watched.peaks.get(member.pid, 0), resident("VmHWM", member.pid))
            watched.looks.append((sum(seconds.values()), count()))
            if killed := kill_at is not None and watched.looks[-1][1] >= kill_at:
                kill(process)
                break
            time.sleep(0.2)
    status, watched.end = process.wait(), time.time()
    if status and not killed:
        printed = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{Path(sys.executable).name} {' '.join(arguments)} ended with status {status}:\n{printed}")
    return watched


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and those that it started, directly or not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def kill(process: psutil.Process) -> int:
    """Kill a process and those that it started, which may have sessions of their own; return how many these were."""
    members = family(process)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    return len(members)
