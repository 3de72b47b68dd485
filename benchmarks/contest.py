"""Run a contest: one process per contestant; compare their values, then measure them in turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environments import python_of
from benchmarks.row import OURS, Contest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("OMP", "MKL", "OPENBLAS", "NUMEXPR")
THREAD_VARIABLES = (*(f"{library}_NUM_THREADS" for library in LIBRARIES), "LANCE_CPU_THREADS")

Measurements = dict[str, list[dict[str, float]]]


class UnequalError(AssertionError):
    """The values of two contestants differ, so that their times cannot be compared."""


def environment_of(threads: int) -> dict[str, str]:
    """Return the variables of a process of ours whose libraries use so many threads."""
    paths = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": f"{ROOT}:{ROOT / 'training'}"}
    return {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)), **paths}


def start(python: str, arguments: list[str], threads: int) -> subprocess.Popen[str]:
    """Start the process of a contestant, `benchmarks.worker`."""
    command = [python, "-m", "benchmarks.worker", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment_of(threads), **pipes)


def answer(worker: subprocess.Popen[str], name: str, request: str = "") -> dict[str, Any]:
    """Send a line to a worker, and return its answer."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(request)
    worker.stdin.flush()
    if not (line := worker.stdout.readline()):
        raise RuntimeError(f"the contestant {name!r} ended with status {worker.wait()}; see above.")
    return json.loads(line)  # type: ignore[no-any-return]


def run_contest(module: str, device: str, contest: Contest) -> Measurements:
    """Measure all contestants.

    The first turn of each contestant yields the values to compare and the memory, because its process has not done
    the work before; the other turns yield the times.

    Returns:
        For each contestant the measurements of every turn, including the first.

    Raises:
        UnequalError: Values differ by more than the tolerance of the contest.
        RuntimeError: A contestant fails.
    """
    turns: Measurements = {name: [] for name in contest.contestants}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = {}
        for number, (name, contestant) in enumerate(contest.contestants.items()):
            arguments = [module, device, contest.title, name, f"{folder}/{number}.npz"]
            workers[name] = stack.enter_context(start(python_of(contestant.environment), arguments, contest.threads))
            answer(workers[name], name)
        for number, name in enumerate(workers):
            turns[name].append(answer(workers[name], name, "run\n"))
            if name != OURS:
                check_equal(f"{folder}/0.npz", f"{folder}/{number}.npz", contest.tolerance, name)
        for number in range(contest.rounds):
            # The order rotates, so that no contestant always runs first.
            for position in range(len(workers)):
                name = list(workers)[(number + position) % len(workers)]
                turns[name].append(answer(workers[name], name, "run\n"))
    return turns


def check_equal(ours: str | Path, theirs: str | Path, tolerance: Mapping[str, float], name: str) -> None:
    """Compare the values of two contestants.

    Raises:
        UnequalError: A value is missing, has another shape, or differs by more than its tolerance.
    """
    if not tolerance:
        raise UnequalError(f"the contest against {name} compares no values.")
    mine, other = dict(np.load(ours)), dict(np.load(theirs))
    for value, allowed in tolerance.items():
        if value not in mine or value not in other or mine[value].shape != other[value].shape:
            shapes = [str(values[value].shape) if value in values else "nothing" for values in (mine, other)]
            raise UnequalError(f"{value}: ours is {shapes[0]}, that of {name} {shapes[1]}.")
        expected = other[value].astype(np.float64)
        difference = np.abs(mine[value].astype(np.float64) - expected).max(initial=0.0)
        if not difference <= allowed * np.abs(expected).max(initial=0.0):
            raise UnequalError(
                f"{value}: ours differs from that of {name} by {difference:.2g}, of values up to "
                f"{np.abs(expected).max(initial=0.0):.2g}; {allowed:g} of that is allowed."
            )


def summarise(turns: Measurements) -> dict[str, dict[str, float]]:
    """Summarize each contestant: memory of the first turn, medians of the later turns for all other metrics."""
    figures: dict[str, dict[str, float]] = {}
    for name, measured in turns.items():
        later = measured[1:] or measured
        figures[name] = {metric: statistics.median(turn[metric] for turn in later) for metric in measured[0]}
        figures[name]["memory"] = measured[0]["memory"]
    return figures


def ratio(turns: Measurements, against: str, metric: str) -> float:
    """Return ours / theirs: for memory in the first turn, for other metrics the median of the ratios of all rounds."""
    if metric == "memory":
        return turns[OURS][0][metric] / turns[against][0][metric]
    pairs = zip(turns[OURS][1:], turns[against][1:], strict=True)
    return statistics.median(mine[metric] / other[metric] for mine, other in pairs)
