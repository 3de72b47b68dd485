"""Steps run once, continue after an interruption, and start again when something they depend on changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llm2clip.quickstart.ledger import Ledger, Step


class Work:
    """Remembers its calls, and whether each was to continue an interrupted run."""

    def __init__(self, folder: Path, fail: bool = False) -> None:
        self.folder = folder
        self.fail = fail
        self.resumed: list[bool] = []

    def __call__(self, resume: bool) -> dict[str, int]:
        self.resumed.append(resume)
        self.folder.mkdir(exist_ok=True)
        if self.fail:
            raise KeyboardInterrupt
        return {"calls": len(self.resumed)}

    def step(self, setting: int, name: str = "a", after: tuple[str, ...] = ()) -> Step:
        return Step(name, name.upper(), {"x": setting}, self, after, self.folder)


def test_a_step_is_reused_while_its_settings_are_the_same_and_its_folder_is_there(tmp_path: Path) -> None:
    work = Work(tmp_path / "out")
    for _ in range(2):
        ledger = Ledger(tmp_path)
        assert ledger.run(work.step(1)) == {"calls": 1}
    assert ledger.reused == ["a"]
    assert Ledger(tmp_path).run(work.step(2)) == {"calls": 2}
    shutil.rmtree(work.folder)
    assert Ledger(tmp_path).run(work.step(2)) == {"calls": 3}


def test_an_interrupted_step_continues_and_a_step_with_other_settings_starts_again(tmp_path: Path) -> None:
    work = Work(tmp_path / "out", fail=True)
    for setting in (1, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            Ledger(tmp_path).run(work.step(setting))
        assert (work.folder / "old").exists() == (len(work.resumed) == 2)
        (work.folder / "old").touch()
    assert work.resumed == [False, True, False]


def test_a_step_runs_again_when_a_step_it_depends_on_changes(tmp_path: Path) -> None:
    first, second = Work(tmp_path / "1"), Work(tmp_path / "2")
    for setting in (1, 1, 2):
        ledger = Ledger(tmp_path)
        ledger.run(first.step(setting, "first"))
        ledger.run(second.step(0, "second", ("first",)))
    assert (len(first.resumed), len(second.resumed)) == (2, 2)


def test_a_folder_that_the_quickstart_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(FileExistsError, match="was not written by the quickstart"):
        Ledger(tmp_path).run(Work(tmp_path / "out").step(1))
    assert (tmp_path / "out" / "precious").exists()
