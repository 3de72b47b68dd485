"""The fuzz run, and that it sees what it is meant to see."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import run as fuzz
from tests.fuzz.__main__ import SECONDS
from tests.fuzz.cases import Seeds
from tests.fuzz.doors import Door
from tests.processes import ENVIRONMENT

FOLDER = Path(__file__).parents[2]


def make(folder: Path) -> None:
    (folder / "sample").mkdir()
    (folder / "sample/a.txt").write_bytes(bytes(range(256)) * 4)


def killed(content: bytes, path: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(content: bytes, path: Path) -> None:
    time.sleep(60)


def foreign(content: bytes, path: Path) -> None:
    raise KeyError("x")


def nameless(content: bytes, path: Path) -> None:
    raise ValueError("something is wrong")


def refusing(content: bytes, path: Path) -> None:
    raise ValueError(f"{path} is damaged")


def accepting(content: bytes, path: Path) -> None:
    pass


def door(react: Callable[[bytes, Path], None]) -> Door:
    """A reader that behaves so where a file is shorter than it was."""

    def read(folder: Path) -> Any:
        def reader() -> None:
            if len(content := (folder / "a.txt").read_bytes()) < 1000:
                react(content, folder / "a.txt")

        return (reader,)

    return Door("made", make, read, limit=1)


@pytest.mark.parametrize(
    ("react", "reason"),
    [
        (killed, "the process died with -11"),
        (hanging, "the process hung for 1 s"),
        (foreign, "KeyError is not an error of ours: 'x'"),
        (nameless, "its message does not say what is wrong where: ValueError: something is wrong"),
    ],
)
def test_a_fault_is_found_and_its_input_kept(
    react: Callable[[bytes, Path], None], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "DOORS", (door(react),))
    monkeypatch.setattr(fuzz, "ENOUGH", 1)
    found = fuzz.run(20, tmp_path / "work", tmp_path / "failures")
    ((place, text),) = found.failures.items()
    assert text.splitlines()[0] == reason
    assert (place / fuzz.INPUT / "a.txt").stat().st_size < 1000
    if react in (foreign, nameless):
        assert fuzz.replay(place, tmp_path / "again")[0] == "failed"


@pytest.mark.parametrize("react", [refusing, accepting])
def test_what_is_ours_is_no_fault(
    react: Callable[[bytes, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "DOORS", (door(react),))
    found = fuzz.run(1, tmp_path / "work", tmp_path / "failures")
    assert not found.failures
    assert found.tried["made"] > 30
    assert (found.refused["made"] > 5) == (react is refusing)


def test_the_same_number_is_the_same_input(tmp_path: Path) -> None:
    (tmp_path / "seeds").mkdir()
    make(tmp_path / "seeds")
    seeds, contents = Seeds(tmp_path / "seeds"), []
    for number in (*range(40), *range(40)):
        seeds.case(number, tmp_path / "input")
        contents.append((tmp_path / "input/a.txt").read_bytes())
    assert contents[:40] == contents[40:]
    assert len(set(contents)) > 35


@pytest.mark.slow
def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    seconds = float(os.environ.get(SECONDS, 30))
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", str(seconds)]
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{FOLDER}:{FOLDER / 'training'}", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=seconds + 600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    print(done.stdout)
