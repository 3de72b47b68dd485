"""The harness of `make test-faults` sees what it is meant to see: lost work, halves, left-overs, tracebacks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.documents.shell import Result
from tests.faults import record, verdicts
from tests.faults.commands import ATTACKED, WORK
from tests.faults.content import content, differences
from tests.faults.injection import Change, Plan, preloaded, read_changes
from tests.faults.trials import Baseline, Trial, make_trials
from tests.processes import ENVIRONMENT

# Writes one file in place and one under another name.
WRITER = """
import json, os, sys
from tests.faults.injection import Plan
Plan(**json.loads(sys.argv[1])).arm()
os.chdir(sys.argv[2])
with open("in place", "wb", buffering=0) as file:
    file.write(b"1234")
with open("temporary", "wb", buffering=0) as file:
    file.write(b"1234")
    os.fsync(file.fileno())
os.rename("temporary", "renamed")
"""
FINISHED: dict[str, Any] = {"a.json": "1", "b.json": "2"}


def write(folder: Path, **plan: Any) -> tuple[int, str, dict[str, bytes], list[Change]]:
    """Run the writer by a plan; returns exit status, errors, files and changes."""
    work = folder / "work"
    work.mkdir()
    made = Plan(str(work), str(folder / "log"), **plan)
    command = [sys.executable, "-c", WRITER, made.to_json(), str(work)]
    done = subprocess.run(command, env=preloaded(folder, ENVIRONMENT), capture_output=True, text=True)
    files = {path.name: path.read_bytes() for path in work.iterdir()}
    return done.returncode, done.stderr, files, read_changes(made)


def test_changes_are_counted(tmp_path: Path) -> None:
    status, errors, files, changes = write(tmp_path, mode="count")
    assert (status, errors) == (0, "")
    assert files == {"in place": b"1234", "renamed": b"1234"}
    kinds = [(change.kind, change.path) for change in changes]
    assert kinds == [
        *(("create", "in place"), ("write", "in place"), ("create", "temporary"), ("write", "temporary")),
        *(("fsync", "temporary"), ("rename", "renamed")),
    ]


@pytest.mark.parametrize(
    ("at", "files"),
    [
        (1, {"in place": b""}),
        (2, {"in place": b"12"}),
        (5, {"in place": b"1234", "temporary": b"1234"}),
        (6, {"in place": b"1234", "temporary": b"1234"}),
    ],
)
def test_a_process_is_killed_at_a_change_and_in_the_middle_of_a_write(
    at: int, files: dict[str, bytes], tmp_path: Path
) -> None:
    status, _, found, (change,) = write(tmp_path, mode="kill", at=at)
    assert (status, found, change.number) == (-9, files, at)


@pytest.mark.parametrize(
    ("plan", "message", "files"),
    [
        ({"mode": "once", "at": 5, "error": 5}, "Input/output error", {"in place": b"1234", "temporary": b"1234"}),
        ({"mode": "from", "at": 1, "error": 30}, "Read-only file system", {}),
        ({"mode": "from", "at": 3, "error": 28}, "No space left", {"in place": b"1234"}),
        # A disk that fills up takes the first half; this writer does not look at how much was taken.
        ({"mode": "from", "at": 4, "error": 28}, "", {"in place": b"1234", "renamed": b"12"}),
        ({"file_size": 0}, "File too large", {"in place": b""}),
    ],
)
def test_system_calls_fail(plan: dict[str, Any], message: str, files: dict[str, bytes], tmp_path: Path) -> None:
    status, errors, found, _ = write(tmp_path, **plan)
    assert message in errors
    assert (status, found) == (int(bool(message)), files)


def test_only_what_a_run_made_counts(tmp_path: Path) -> None:
    def state(name: str, value: float, runtime: float) -> dict[str, str]:
        folder = tmp_path / name
        folder.mkdir()
        save_file({"weight": torch.full((2,), value)}, folder / "model.safetensors")
        torch.save({"step": torch.tensor(value)}, folder / "optimizer.pt")
        (folder / "state.json").write_text(f'{{"loss": {value}, "train_runtime": {runtime}}}')
        (folder / "log.txt").write_text(name)
        return content(folder)

    first, slower, other = state("a", 1.0, 1.0), state("b", 1.0, 2.0), state("c", 2.0, 1.0)
    assert not differences(slower, first)
    assert differences(other, first) == ["model.safetensors differs", "optimizer.pt differs", "state.json differs"]
    assert differences({"x": "1"}, {"y": "1"}) == ["x is left over", "y is missing"]


class FakeBench:
    """A bench whose command writes files without a process; `first` and `second` are its two runs."""

    def __init__(self, folder: Path, *runs: tuple[int, str, dict[str, str]]) -> None:
        self.folder, self.runs = folder, iter(runs)

    def run(self, shell: Any, command: str, folder: Path, *_: Any, **__: Any) -> Result:
        code, errors, files = next(self.runs)
        (folder / WORK / "out").mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / WORK / "out" / name).write_text(text)
        (folder / "changes.log").write_text("1\twrite\tout\n")
        return Result(code, "", errors)

    def content(self, command: str, folder: Path) -> dict[str, str]:
        return content(folder / WORK)


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., verdicts.Verdict]:
    def judge(kind: Any, *runs: tuple[int, str, dict[str, str]]) -> verdicts.Verdict:
        whole = tmp_path / "whole" / "out"
        whole.mkdir(parents=True)
        for name, text in FINISHED.items():
            (whole / name).write_text(text)
        baseline = Baseline(content(whole.parent), [], 8, 4)
        bench: Any = FakeBench(tmp_path, *runs)
        trial = Trial("build", 1, kind, Change(1, "write", "out"))
        return verdicts.judge(bench, None, trial, baseline)  # type: ignore[arg-type]

    return judge


CLEAR = "llm2clip build: error: the disk is full"
TRACEBACK = f"Traceback (most recent call last):\n{CLEAR}"


@pytest.mark.parametrize(
    ("kind", "runs", "outcome", "reason"),
    [
        ("kill", [(-9, "", FINISHED), (2, CLEAR, {})], "refused", "the disk is full"),
        ("kill", [(-9, "", {"a.json": "1"}), (0, "", FINISHED)], "lost", "a reader takes for whole what is not"),
        ("kill", [(-9, "", FINISHED), (2, TRACEBACK, {})], "lost", "the same command again"),
        ("kill", [(-9, "", FINISHED), (0, "", {".tmp": "1"})], "lost", ".tmp is left over"),
        ("kill", [(2, CLEAR, {})], "lost", "exit 2"),
        ("full disk", [(0, "", FINISHED)], "equal", ""),
        ("full disk", [(0, "", {"a.json": "1"})], "lost", "exit 0, but out/b.json is missing"),
        ("full disk", [(1, TRACEBACK, {})], "lost", "no clear message"),
        ("full disk", [(-7, "", {})], "lost", "no clear message"),
        ("full disk", [(2, CLEAR, FINISHED), (0, "", FINISHED)], "equal", "the disk is full"),
    ],
)
def test_what_becomes_of_a_struck_command_is_judged(
    kind: str, runs: list[Any], outcome: str, reason: str, judged: Callable[..., verdicts.Verdict]
) -> None:
    verdict = judged(kind, *runs)
    assert verdict.outcome == outcome
    assert reason in verdict.reason


def test_the_same_seed_strikes_the_same_places() -> None:
    changes = [Change(number, kind, str(number % 3)) for number, kind in enumerate(["write", "rename"] * 9, start=1)]
    baseline = Baseline({}, changes, 1000, 400)
    first, again, other = (
        make_trials("embed", ATTACKED["embed"], baseline, seed, 6, 10, can_mount=True) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(first) == 16
    assert {trial.kind for trial in first} >= {"kill", "full disk", "I/O error", "small disk", "read-only", "quota"}
    without = make_trials("embed", ATTACKED["embed"], baseline, 1, 6, 10, can_mount=False)
    assert "small disk" not in {trial.kind for trial in without}


def test_the_profile_of_ci_has_what_is_promised() -> None:
    assert sum(attacked.kills for attacked in ATTACKED.values()) >= 40
    assert sum(attacked.faults for attacked in ATTACKED.values()) >= 80


def test_the_page_has_the_last_record() -> None:
    page = record.PAGE.read_text(encoding="utf-8")
    assert record.fill(page, record.read()) == page
    with pytest.raises(ValueError, match="has 0 places for the record"):
        record.fill("# Nothing\n", record.read())


def test_lost_work_shows_in_the_record() -> None:
    found = record.count([("embed", "kills", "equal"), ("embed", "kills", "lost"), ("index", "faults", "refused")])
    stored = {
        "profile": "ci",
        "seed": 1,
        "minutes": 1.0,
        "machine": "m",
        "date": "d",
        "commit": "c",
        "commands": found,
    }
    assert "   2 kills: 1 equal, 0 refused, 1 lost" in record.summary(stored)
    assert "| embed | 2 (1 + 0) |  |  | 1 |" in record.table(stored)
    assert "| all | 2 (1 + 0) | 1 (0 + 1) |  | 1 |" in record.table(stored)


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_without_the_shim_nothing_is_armed(tmp_path: Path) -> None:
    script = "from tests.faults.injection import Plan\nPlan('/', '/dev/null').arm()"
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert "was not started with the shim" in done.stderr
