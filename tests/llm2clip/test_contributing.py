"""What CONTRIBUTING.md says of the files of the toolbox is true."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, TrainerCallback

import llm2clip
from llm2clip import LLM2CLIPModel, Stage2Trainer
from tests.builders import small_runs, tiny
from tests.documents.reading import ROOT
from tests.llm2clip.trainers.rows import settings

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TOOLBOX = Path(llm2clip.__file__).parent


def cells(title: str, column: int) -> list[str]:
    """A column of the table of a section."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [line.split("|")[column] for line in section.splitlines() if line.startswith("| ")][2:]


def named(cell: str, folder: str = "") -> list[str]:
    """The files that a cell names; one without a folder lies beside the one before it."""
    found: list[str] = []
    for name in re.findall(r"`([\w/]+\.py)`", cell):
        folder = name.rpartition("/")[0] or folder
        found.append(f"{folder}/{name.rpartition('/')[2]}")
    return found


def test_the_files_of_trainers_are_listed_once() -> None:
    listed = [name for cell in cells("The files of trainers", 2) for name in named(cell, "trainers")]
    files = [path for path in (TOOLBOX / "trainers").glob("*.py") if path.name != "__init__.py"]
    assert sorted(listed) == sorted(path.relative_to(TOOLBOX).as_posix() for path in files)


class Profile(TrainerCallback):
    """Notes the files of the toolbox that the second step passes."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def note(self, frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(TOOLBOX):
            self.files.add(path.relative_to(TOOLBOX).as_posix())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        sys.setprofile(self.note if state.global_step == 1 else None)


def test_a_step_passes_the_files_that_are_listed(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    model, processor = (
        LLM2CLIPModel.from_pretrained(tmp_path / "model"),
        AutoProcessor.from_pretrained(tmp_path / "model"),
    )
    rows, profile = small_runs.rows_of_concepts(":32"), Profile()
    args = llm2clip.Stage2Config(**{**settings(tmp_path), "logging_steps": 5})
    Stage2Trainer(model, args, train_dataset=rows, processing_class=processor, callbacks=[profile]).train()
    listed = {name for cell in cells("The way of a step", 1) for name in named(cell)}
    assert listed == profile.files
    assert f"passes {len(listed)} files" in PAGE
