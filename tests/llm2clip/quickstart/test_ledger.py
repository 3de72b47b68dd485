"""Interrupted steps continue, or start again with other settings; test_pipeline.py has what is reused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm2clip.quickstart.ledger import Ledger, Step


class Work:
    """A step that is interrupted, and remembers whether it was to continue."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.resumed: list[bool] = []

    def __call__(self, resume: bool) -> dict[str, Any]:
        self.resumed.append(resume)
        self.folder.mkdir(exist_ok=True)
        raise KeyboardInterrupt

    def step(self, setting: int) -> Step:
        return Step("a", "A", {"x": setting}, self, folder=self.folder)


def test_an_interrupted_step_continues_and_a_step_with_other_settings_starts_again(tmp_path: Path) -> None:
    work = Work(tmp_path / "out")
    for setting in (1, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            Ledger(tmp_path).run(work.step(setting))
        assert (work.folder / "old").exists() == (len(work.resumed) == 2)
        (work.folder / "old").touch()
    assert work.resumed == [False, True, False]


def test_a_folder_that_the_quickstart_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(FileExistsError, match="was not written by the quickstart"):
        Ledger(tmp_path).run(Work(tmp_path / "out").step(1))
    assert (tmp_path / "out" / "precious").exists()
