"""Run a command with all its processes, watch their memory, and kill them in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.contest import ROOT, THREAD_VARIABLES

SECONDS_BETWEEN_LOOKS = 0.2


class Look(NamedTuple):
    """What was seen of a command while it ran.

    Attributes:
        cpu: CPU seconds of all its processes until then.
        done: How much it had done.
    """

    cpu: float
    done: int


@dataclass
class Watched:
    """What a command took.

    Attributes:
        start, end: Seconds since the epoch.
        status: Exit status; negative if it was killed.
        peaks: Peak resident memory of each process in bytes, by process id.
        looks: What was seen every 0.2 seconds.
        output: The last lines that it printed.
    """

    start: float
    end: float = 0.0
    status: int = 0
    peaks: dict[int, int] = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)
    output: str = ""

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self.end - self.start

    @property
    def peak(self) -> int:
        """Peak resident memory of the largest process in bytes."""
        return max(self.peaks.values(), default=0)

    @property
    def cpu_per_unit(self) -> tuple[float, int]:
        """CPU seconds between the first and the last unit of work that was seen, and how many units these were."""
        working = [look for look in self.looks if look.done > self.looks[0].done]
        if not working:
            return 0.0, 0
        return working[-1].cpu - working[0].cpu, working[-1].done - working[0].done


def run_watched(
    arguments: list[str], log: Path, count: Callable[[], int] = int, kill_at: int | None = None, threads: int = 1
) -> Watched:
    """Run a Python command to its end, or until it has done so much: then all its processes are killed by SIGKILL.

    Args:
        arguments: Arguments of the interpreter.
        log: File that its output is appended to.
        count: Counts what is done.
        kill_at: The count at which it is killed.
        threads: Threads of each process.

    Raises:
        RuntimeError: The command failed.
    """
    environment = {
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'training'}",
    }
    watched = Watched(time.time())
    with log.open("ab") as output:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        killed = False
        seconds: dict[int, float] = {}
        while process.poll() is None:
            for pid in descendants(process.pid):
                watched.peaks[pid] = max(watched.peaks.get(pid, 0), peak_memory(pid))
                seconds[pid] = max(seconds.get(pid, 0.0), cpu_seconds(pid))
            watched.looks.append(Look(sum(seconds.values()), count()))
            if kill_at is not None and watched.looks[-1].done >= kill_at:
                killed = True
                # Workers of torchrun have sessions of their own.
                for pid in descendants(process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
        watched.status = process.wait()
    watched.end = time.time()
    watched.output = log.read_text(errors="replace")[-2000:]
    if watched.status and not killed:
        raise RuntimeError(f"{' '.join(command)} ended with status {watched.status}:\n{watched.output}")
    return watched


def descendants(pid: int) -> list[int]:
    """Return the ids of a process and of those that it started, directly or not."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += descendants(int(child))
    return found


def peak_memory(pid: int) -> int:
    """Return the peak resident memory of a process in bytes; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process; 0 if it has ended."""
    with contextlib.suppress(OSError):
        # The name, which may contain spaces, ends with the last parenthesis.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0
