"""Steps run once, continue after an interruption, and start again when something they depend on changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.quickstart.ledger import Ledger, Step


class Work:
    """Counts its calls and records whether each was to continue an interrupted run."""

    def __init__(self, folder: Path, fail: bool = False) -> None:
        self.folder = folder
        self.fail = fail
        self.resumed: list[bool] = []

    def __call__(self, resume: bool) -> dict[str, int]:
        self.resumed.append(resume)
        self.folder.mkdir(exist_ok=True)
        (self.folder / "part").touch()
        if self.fail:
            raise KeyboardInterrupt
        return {"calls": len(self.resumed)}


def test_a_step_is_reused_while_its_settings_are_the_same(tmp_path: Path) -> None:
    work = Work(tmp_path / "out")
    for _ in range(2):
        ledger = Ledger(tmp_path)
        assert ledger.run(Step("a", "A", {"x": 1}, work, folder=work.folder)) == {"calls": 1}
    assert ledger.reused == ["a"]
    assert Ledger(tmp_path).run(Step("a", "A", {"x": 2}, work, folder=work.folder)) == {"calls": 2}
    (work.folder / "part").unlink()
    work.folder.rmdir()
    assert Ledger(tmp_path).run(Step("a", "A", {"x": 2}, work, folder=work.folder)) == {"calls": 3}


def test_an_interrupted_step_continues_and_a_step_with_other_settings_starts_again(tmp_path: Path) -> None:
    work = Work(tmp_path / "out", fail=True)
    with pytest.raises(KeyboardInterrupt):
        Ledger(tmp_path).run(Step("a", "A", {"x": 1}, work, folder=work.folder))
    with pytest.raises(KeyboardInterrupt):
        Ledger(tmp_path).run(Step("a", "A", {"x": 1}, work, folder=work.folder))
    (work.folder / "old").touch()
    with pytest.raises(KeyboardInterrupt):
        Ledger(tmp_path).run(Step("a", "A", {"x": 2}, work, folder=work.folder))
    assert work.resumed == [False, True, False]
    assert not (work.folder / "old").exists()


def test_a_step_runs_again_when_a_step_it_depends_on_changes(tmp_path: Path) -> None:
    first, second = Work(tmp_path / "1"), Work(tmp_path / "2")
    for setting in (1, 1, 2):
        ledger = Ledger(tmp_path)
        ledger.run(Step("first", "First", {"x": setting}, first))
        ledger.run(Step("second", "Second", {}, second, ("first",)))
    assert (len(first.resumed), len(second.resumed)) == (2, 2)


def test_a_folder_that_the_quickstart_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    work = Work(tmp_path / "out")
    work.folder.mkdir()
    (work.folder / "precious").touch()
    with pytest.raises(FileExistsError, match="was not written by the quickstart"):
        Ledger(tmp_path).run(Step("a", "A", {}, work, folder=work.folder))
    assert (work.folder / "precious").exists()
