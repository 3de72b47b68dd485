"""Process of one contestant: set up, then do the work a first time and in every round.

    python -m benchmarks.worker MODULE DEVICE CONTEST CONTESTANT VALUES_FILE

Prints the measurements of every turn as JSON; the values of the first turn are written to VALUES_FILE.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.row import Outcome, Work, load_row


def main(module: str, device: str, contest: str, contestant: str, values_file: str) -> None:
    # Output of libraries must not mix with the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    chosen = next(entry for entry in load_row(module).contests(device) if entry.title == contest)
    work, turns = chosen.contestants[contestant].set_up(), []
    for number in range(1 + chosen.rounds):
        outcome, metrics = measure(work, device)
        if number == 0:
            np.savez(Path(values_file), **{name: _array(value) for name, value in outcome.values.items()})
        del outcome
        turns.append(metrics)
    answer.write(json.dumps(turns))
    answer.close()


def measure(work: Work, device: str = "cpu") -> tuple[Outcome, dict[str, float]]:
    """Do the work once; return its outcome with seconds and bytes."""
    gc.collect()
    if on_gpu := device != "cpu":
        from torch import cuda

        cuda.synchronize()
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated() if on_gpu else resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    cpu, wall = _cpu_seconds(), time.perf_counter()
    outcome = work()
    if on_gpu:
        cuda.synchronize()
    cpu, wall = _cpu_seconds() - cpu, time.perf_counter() - wall
    memory = (cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - before
    return outcome, {"cpu": cpu, "wall": wall, "memory": float(memory), **outcome.metrics}


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def resident(field: str, process: int | str = "self") -> int:
    """Return a memory figure of a process in bytes, 0 if it has ended."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
    return np.asarray(value)


if __name__ == "__main__":
    main(*sys.argv[1:])
