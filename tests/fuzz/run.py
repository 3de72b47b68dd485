"""The run: every door in a process of its own, with a time limit for each input."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import multiprocessing
import os
import resource
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.fuzz.cases import Seeds
from tests.fuzz.doors import DOORS, Door
from tests.refusals import fault

# Bytes of address space of a process. An input that takes more is a fault, since a file of a few KiB never needs it.
MEMORY = 24 << 30
# Failures of a door after which it is left: they are most often the same one.
ENOUGH = 12
# No message has this name by chance.
INPUT = "fuzzed-files"
FORK: Any = multiprocessing.get_context("fork")


@dataclass
class Found:
    """What a run has found.

    Attributes:
        tried: Inputs by door.
        refused: Those that a door refused.
        failures: The stored inputs of failures, and what was wrong.
    """

    tried: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: dict[Path, str] = field(default_factory=dict)


def open_input(door: Door, folder: Path, every: bool = False) -> tuple[str, str]:
    """Let a door read an input; returns `accepted`, `refused` or `failed`, and for the last one what was wrong.

    An input is refused if no reader of the door accepts it; with `every`, if one does not.
    """
    names = [folder.name, *(path.name for path in folder.rglob("*")), *door.names]
    readers = door.read(folder)
    refusals = 0
    for read in readers:
        try:
            read()
        except BaseException as error:
            if (reason := fault(error, names)) is not None:
                return "failed", f"{reason}\n\n{traceback.format_exc()}"
            refusals += 1
    return ("refused" if refusals >= (1 if every else len(readers)) else "accepted"), ""


def run(seconds: float, work: Path, failures: Path, first: int = 0, names: list[str] | None = None) -> Found:
    """Fuzz all doors, or those of these names, for so many seconds together.

    Args:
        work: A folder for the seeds and inputs.
        failures: Folder in which the inputs of failures are stored.
        first: Number of the first input; the same numbers are the same inputs.
    """
    found = Found()
    chosen = [door for door in DOORS if names is None or door.name in names]
    for door in chosen:
        _in_child(_make_seeds, door, work / door.name)
    total = sum(door.share for door in chosen)
    for door in chosen:
        _fuzz(door, seconds * door.share / total, work / door.name, failures, first, found)
    return found


def _in_child(target: Any, *arguments: Any) -> None:
    # LanceDB is imported in children alone, since its threads do not survive a fork.
    process = FORK.Process(target=target, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the seeds could not be made: {arguments}")


def _make_seeds(door: Door, folder: Path) -> None:
    (folder / "seeds").mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):
        door.make(folder / "seeds")
    for sample in (folder / "seeds").iterdir():
        shutil.copytree(sample, folder / INPUT)
        with contextlib.redirect_stdout(io.StringIO()):
            outcome, reason = open_input(door, folder / INPUT, not door.several)
        if outcome != "accepted":
            raise ValueError(f"the good files {sample} are {outcome}, so that they test nothing: {reason}")
        shutil.rmtree(folder / INPUT)


def _fuzz(door: Door, seconds: float, folder: Path, failures: Path, first: int, found: Found) -> None:
    deadline, following = time.monotonic() + seconds, first
    before = len(found.failures)
    while time.monotonic() < deadline and len(found.failures) - before < ENOUGH:
        for number, outcome, reason in _outcomes(door, folder, following, deadline):
            found.tried[door.name] += 1
            found.refused[door.name] += outcome == "refused"
            if outcome == "failed":
                place = _store(door, number, folder / INPUT, failures, reason)
                found.failures[place] = reason
            following = number + 1


def _store(door: Door, number: int, source: Path, failures: Path, reason: str) -> Path:
    place = failures / f"{door.name}-{number}"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place / INPUT)
    (place / "reason.txt").write_text(reason)
    return place


def _outcomes(door: Door, folder: Path, number: int, deadline: float) -> Iterator[tuple[int, str, str]]:
    """Yield the outcomes of inputs from a number on, until a failure, after which a new process is needed."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_read_all, args=(door, folder, number, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        while time.monotonic() < deadline:
            begun = _receive(ours, door.limit + 60)  # the first one imports libraries
            if begun is None:
                raise RuntimeError(f"the process of {door.name} has ended without an input")
            number = begun
            outcome = _receive(ours, door.limit)
            if outcome is None:
                process.join(1)
                how = f"hung for {door.limit} s" if process.is_alive() else f"died with {process.exitcode}"
                outcome = ("failed", f"the process {how}")
            yield number, *outcome
            if outcome[0] == "failed":
                return
            ours.send(True)
    finally:
        process.kill()
        process.join()


def _receive(pipe: Connection, patience: float) -> Any:
    with contextlib.suppress(EOFError, ConnectionError):
        if pipe.poll(patience):
            return pipe.recv()
    return None


def _read_all(door: Door, folder: Path, number: int, pipe: Connection) -> None:
    faulthandler.disable()  # its report of a crash would be taken for one of the tests
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    seeds = Seeds(folder / "seeds")
    while True:
        seeds.case(number, folder / INPUT, door.unchanged)
        pipe.send(number)
        pipe.send(open_input(door, folder / INPUT))
        if not pipe.recv():
            return
        number += 1


def replay(place: Path, work: Path) -> tuple[str, str]:
    """Let the door of a stored failure read its input again, in this process."""
    door = next(door for door in DOORS if door.name == place.name.rpartition("-")[0])
    shutil.copytree(place / INPUT, work / INPUT, dirs_exist_ok=True)
    return open_input(door, work / INPUT)


def report(found: Found) -> str:
    """One line for each door, and one for each failure."""
    lines = [f"{name}: {count} inputs, {found.refused[name]} refused" for name, count in found.tried.items()]
    lines += [f"FAILED {place}: {reason.splitlines()[0]}" for place, reason in found.failures.items()]
    return "\n".join([*lines, f"{sum(found.tried.values())} inputs, {len(found.failures)} failures"])
