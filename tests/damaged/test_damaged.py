"""Damaged and hostile files are read as they were written, or refused by name; `python -m tests.damaged` has more."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.damaged import run as harness
from tests.damaged.cases import Door
from tests.damaged.doors import DOORS
from tests.processes import run_ranks

DRAWS = 40


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command finds, in a process of its own, in which no library has started threads."""
    folder = tmp_path_factory.mktemp("damaged")
    paths = ["--json", str(folder / "found.json"), "--failures", str(folder / "failures")]
    done = run_ranks(["-m", "tests.damaged", "--draws", str(DRAWS), *paths], check=False)
    assert (folder / "found.json").is_file(), done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("door", DOORS)
def test_damaged_files_are_read_as_they_were_or_refused_by_name(door: str, found: dict[str, Any]) -> None:
    """Without a crash, a hang, code that runs, a file that is written, or gigabytes of memory."""
    assert found[door]["failures"] == {}
    assert found[door]["tried"] == DRAWS + len(DOORS[door].wrong)
    assert found[door]["refused"] > DRAWS // 4


def fail(error: Exception) -> None:
    raise error


BROKEN: dict[str, Callable[[Path], Any]] = {
    "the process died with -11": lambda path: os.kill(os.getpid(), signal.SIGSEGV),
    "the process hung for 3 s": lambda path: time.sleep(60),
    "KeyError is not an error of ours": lambda path: fail(KeyError("x")),
    "does not say what is wrong where": lambda path: fail(ValueError("something is wrong")),
    "a file has changed": lambda path: path.with_name("b.txt").touch(),
    "os.system": lambda path: os.system("true"),
    "the memory": lambda path: bytes(3 << 30),
    "is read otherwise": lambda path: "something else",
}


@pytest.mark.parametrize("promise", BROKEN)
def test_a_reader_that_breaks_a_promise_is_found(
    promise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: Path) -> None:
        (folder / "sample").mkdir()
        (folder / "sample/a.txt").write_bytes(bytes(range(256)))

    def read(folder: Path) -> Any:
        path = folder / "a.txt"
        return (lambda: "good" if path.read_bytes() == bytes(range(256)) else BROKEN[promise](path),)

    monkeypatch.setitem(DOORS, "made", Door(make, read, limit=3, checked=True))
    monkeypatch.setattr(harness, "ENOUGH", 1)
    ((place, reason),) = harness.run("made", 9, tmp_path / "work", tmp_path / "failures").failures.items()
    assert promise in reason.splitlines()[0]
    assert Path(place, harness.INPUT, "a.txt").is_file()
