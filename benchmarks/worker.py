"""Process of one contestant: set up, then do the work once for every line on standard input.

    python -m benchmarks.worker MODULE DEVICE CONTEST CONTESTANT VALUES_FILE

Prints one line of JSON per turn; the values of the first turn are written to VALUES_FILE.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from benchmarks.row import Outcome, Work, load_row


def main(module: str, device: str, contest: str, contestant: str, values_file: str) -> None:
    # Output of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contests = {entry.title: entry for entry in load_row(module).contests(device)}
    work = contests[contest].contestants[contestant].set_up()
    _answer(answers, {"ready": True})
    for number, _ in enumerate(sys.stdin):
        outcome, metrics = measure(work, device)
        if number == 0:
            np.savez(Path(values_file), **{name: _array(value) for name, value in outcome.values.items()})
        del outcome
        _answer(answers, metrics)


def measure(work: Work, device: str = "cpu") -> tuple[Outcome, dict[str, float]]:
    """Do the work once; return its outcome with seconds and bytes."""
    gc.collect()
    accelerator = _accelerator(device)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    cpu, wall = _cpu_seconds(), time.perf_counter()
    outcome = work()
    if accelerator is not None:
        accelerator.synchronize()
    cpu, wall = _cpu_seconds() - cpu, time.perf_counter() - wall
    memory = _resident("VmHWM") - before
    if accelerator is not None:
        memory = accelerator.max_memory_allocated() - accelerator.before
    return outcome, {"cpu": cpu, "wall": wall, "memory": float(memory), **outcome.metrics}


class _Accelerator:
    def __init__(self) -> None:
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        self.synchronize = torch.cuda.synchronize
        self.max_memory_allocated = torch.cuda.max_memory_allocated


def _accelerator(device: str) -> _Accelerator | None:
    return None if device == "cpu" else _Accelerator()


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _resident(field: str) -> int:
    """Return a memory figure of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}; the benchmarks need Linux.")


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
    return np.asarray(value)


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
