"""Run a contest: a process for each contestant, whose values are compared."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

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


def run_contest(module: str, device: str, contest: Contest) -> Measurements:
    """Measure all contestants, one after the other, each in a process of its own.

    The first turn of each yields the values to compare and the memory, because its process has not done the work
    before; the other turns yield the times.

    Returns:
        For each contestant the measurements of every turn, including the first.

    Raises:
        UnequalError: Values differ by more than the tolerance of the contest.
        RuntimeError: A contestant fails.
    """
    turns: Measurements = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, contestant) in enumerate(contest.contestants.items()):
            arguments = [module, device, contest.title, name, f"{folder}/{number}.npz"]
            command = [python_of(contestant.environment), "-m", "benchmarks.worker", *arguments]
            environment = environment_of(contest.threads)
            worker = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
            if worker.returncode:
                raise RuntimeError(f"the contestant {name!r} ended with status {worker.returncode}; see above.")
            turns[name] = json.loads(worker.stdout)
            if name != OURS:
                check_equal(f"{folder}/0.npz", f"{folder}/{number}.npz", contest.tolerance, name)
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
