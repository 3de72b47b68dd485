"""The run: every door reads damaged files in a process of its own, with limits of time and memory, and is watched."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import multiprocessing
import os
import resource
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import datasets

from tests.damaged.cases import Case, Cases, write
from tests.damaged.doors import DOORS, Door
from tests.damaged.watch import watch
from tests.refusals import fault

# Bytes of address space that a process may take for a file of a few KiB, besides what good files have taken.
MEMORY = 2 << 30
# Failures of a door after which it is left: they are most often the same one.
ENOUGH = 12
# No message has this name by chance.
INPUT = "damaged-files"
REFUSED = "refused"
FORK: Any = multiprocessing.get_context("fork")


@dataclass
class Found:
    """What a run has found of a door: inputs, those that a reader refused, and stored failures with their reasons."""

    tried: int = 0
    refused: int = 0
    failures: dict[str, str] = field(default_factory=dict)


def run(door: str, draws: int, work: Path, failures: Path, first: int = 0) -> Found:
    """Let a door read its wrong files, and so many damaged ones.

    Args:
        work: A folder for good files and inputs.
        failures: Folder in which the inputs of failures are stored.
        first: Number of the first draw; the same numbers are the same inputs.
    """
    # LanceDB is used in children alone, since its threads do not survive a fork.
    maker = FORK.Process(target=_make, args=(door, work))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise RuntimeError(f"the good files of {door} could not be made")
    found, cases = Found(), Cases(DOORS[door], work)
    numbers = [*range(-len(DOORS[door].wrong), 0), *range(first, first + draws)]
    while numbers and len(found.failures) < ENOUGH:
        for number, outcome, reason in _outcomes(door, work, numbers):
            numbers.remove(number)
            found.tried += 1
            found.refused += outcome == REFUSED
            if outcome == "failed":
                place = failures / f"{door}-{number}"
                shutil.rmtree(place, ignore_errors=True)
                write(place / INPUT, cases.case(number).files)
                (place / "reason.txt").write_text(reason)
                found.failures[str(place)] = reason
    return found


def _make(door: str, work: Path) -> None:
    (work / "good").mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):
        DOORS[door].make(work / "good")


def _outcomes(door: str, work: Path, numbers: list[int]) -> Iterator[tuple[int, str, str]]:
    """Yield the outcomes of inputs until a failure, after which a new process is needed."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_read_all, args=(door, work, [*numbers], theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        for number in [*numbers]:
            # The first one imports libraries, and reads the good files.
            if _receive(ours, DOORS[door].limit + 120) is None:
                raise RuntimeError(f"the process of {door} has ended without an input")
            outcome = _receive(ours, DOORS[door].limit)
            if outcome is None:
                process.join(1)
                how = f"hung for {DOORS[door].limit} s" if process.is_alive() else f"died with {process.exitcode}"
                outcome = ("failed", f"the process {how}")
            yield number, *outcome
            if outcome[0] == "failed":
                return
    finally:
        process.kill()
        process.join()


def _receive(pipe: Connection, patience: float) -> Any:
    with contextlib.suppress(EOFError, ConnectionError):
        if pipe.poll(patience):
            return pipe.recv()
    return None


def _read_all(door: str, work: Path, numbers: list[int], pipe: Connection) -> None:
    faulthandler.disable()  # its report of a crash would be taken for one of the tests
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        reading = Reading(DOORS[door], work)
        os.dup2(nothing.fileno(), 2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    for number in numbers:
        case = reading.cases.case(number)
        pipe.send(number)
        pipe.send(reading.outcome(case))


class Reading:
    """A process in which a door reads inputs.

    Args:
        work: Where its good files are; the only folder that it may write to.
    """

    def __init__(self, door: Door, work: Path) -> None:
        self.door, self.work, self.cases = door, work, Cases(door, work)
        os.environ["XDG_CACHE_HOME"] = tempfile.tempdir = str(work)
        datasets.config.HF_DATASETS_CACHE = work / "cache"
        self.seen: list[str] = []
        self.good = {name: self._good(name) for name in self.cases.samples}
        self.seen = watch(work)

    def _good(self, sample: str) -> list[Any]:
        """Let the readers read a sample; returns what each returns, or `REFUSED`, which one of them may be."""
        write(self.work / INPUT, self.cases.samples[sample])
        results, reasons = self._read()
        if all(reasons) or (any(reasons) and not self.door.several):
            raise ValueError(f"the good files {sample} are refused, so that they test nothing: {reasons}")
        return results

    def _read(self) -> tuple[list[Any], list[str]]:
        """Return what each reader returns, or `REFUSED`; and its error, empty if there is none."""
        results, reasons = [], []
        folder = self.work / INPUT
        names = [INPUT, *(path.name for path in folder.rglob("*")), *self.door.names]
        for read in self.door.read(folder):
            try:
                results.append(read())
                reasons.append("")
            except BaseException as error:
                if (reason := fault(error, names)) is not None:
                    raise AssertionError(f"{reason}\n\n{traceback.format_exc()}") from error
                results.append(REFUSED)
                reasons.append(str(error) or type(error).__name__)
        return results, reasons

    def outcome(self, case: Case) -> tuple[str, str]:
        """Let the door read an input; returns `accepted`, `refused` or `failed`, and for the last what was wrong."""
        folder = self.work / INPUT
        write(folder, case.files)
        before = _state(folder)
        self.seen.clear()
        try:
            results, _ = self._read()
        except AssertionError as error:
            return "failed", str(error)
        good = self.good[case.sample]
        if _state(folder) != before:
            return "failed", "a file has changed while it was read"
        if self.seen:
            return "failed", f"what is read must not do this: {self.seen}"
        refused = [one is REFUSED for one, expected in zip(results, good, strict=True) if expected is not REFUSED]
        if case.refused_by is not None and not case.refused_by(refused):
            return "failed", f"the readers of {case.changed} accept what is wrong: {refused}"
        is_checked = case.by_bytes and self.door.checked and not case.matches(self.door.unchecked)
        if is_checked and results[0] is not REFUSED and repr(results) != repr(good):
            return "failed", f"the checksums fit, but {case.changed} is read otherwise: {results} and not {good}"
        return (REFUSED if any(refused) else "accepted"), ""


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    files = ((path, path.stat()) for path in folder.rglob("*"))
    return {str(path): (found.st_size, found.st_mtime_ns) for path, found in files if path.is_file()}
