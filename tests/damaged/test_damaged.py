"""Damaged and hostile files are read as they were written, or refused by name; `python -m tests.damaged` has more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.damaged import run as harness
from tests.damaged.cases import Door
from tests.damaged.doors import DOORS
from tests.documents.reading import ROOT
from tests.processes import ENVIRONMENT

DRAWS = 40


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command finds, in a process of its own, in which no library has started threads."""
    folder = tmp_path_factory.mktemp("damaged")
    command = [sys.executable, "-m", "tests.damaged", "--draws", str(DRAWS), "--json", str(folder / "found.json")]
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'training'}"}
    more: dict[str, Any] = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--failures", str(folder / "failures")], **more)
    assert (folder / "found.json").is_file(), done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("door", DOORS)
def test_damaged_files_are_read_as_they_were_or_refused_by_name(door: str, found: dict[str, Any]) -> None:
    """Without a crash, a hang, code that runs, a file that is written, or gigabytes of memory."""
    assert found[door]["failures"] == {}
    assert found[door]["tried"] == DRAWS + len(DOORS[door].wrong)
    assert found[door]["refused"] > DRAWS // 4


def killed(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(path: Path) -> None:
    time.sleep(60)


def foreign(path: Path) -> None:
    raise KeyError("x")


def nameless(path: Path) -> None:
    raise ValueError("something is wrong")


def writing(path: Path) -> None:
    path.with_name("b.txt").touch()


def running(path: Path) -> None:
    os.system("true")


def greedy(path: Path) -> None:
    bytes(3 << 30)


def lax(path: Path) -> str:
    return "something else"


@pytest.mark.parametrize(
    ("react", "reason"),
    [
        (killed, "the process died with -11"),
        (hanging, "the process hung for 1 s"),
        (foreign, "KeyError is not an error of ours"),
        (nameless, "does not say what is wrong where"),
        (writing, "a file has changed"),
        (running, "os.system"),
        (greedy, "the memory"),
        (lax, "is read otherwise"),
    ],
)
def test_a_reader_that_breaks_a_promise_is_found(
    react: Callable[[Path], Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: Path) -> None:
        (folder / "sample").mkdir()
        (folder / "sample/a.txt").write_bytes(bytes(range(256)))

    def read(folder: Path) -> Any:
        path = folder / "a.txt"
        return (lambda: "good" if path.read_bytes() == bytes(range(256)) else react(path),)

    monkeypatch.setitem(DOORS, "made", Door(make, read, limit=1, checked=True))
    monkeypatch.setattr(harness, "ENOUGH", 1)
    ((place, text),) = harness.run("made", 9, tmp_path / "work", tmp_path / "failures").failures.items()
    assert reason in text.splitlines()[0]
    assert Path(place, harness.INPUT, "a.txt").is_file()
