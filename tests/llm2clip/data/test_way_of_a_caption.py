"""From a row of an open stream to the loss of stage 2, traced: what CONTRIBUTING.md says of it is true."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import llm2clip
import modeling_llm2clip
from llm2clip.command_line.settings import build_config
from llm2clip.trainers import run_stage2
from llm2clip.trainers.stage2_config import Stage2Recipe
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.test_contributing import PAGE, TOOLBOX, cells, named
from tests.llm2clip.trainers.stages import embedded, fields_of, source, write_tars

TITLE = "The way of a caption"
MODEL = Path(modeling_llm2clip.__file__).parent
MOST_FILES, MOST_TYPES = 15, 12


@dataclass
class Trace:
    """The files and the types of the toolbox, and the files of the model, whose code ran before the loss did.

    A type is the class of an object, or a class, whose method ran.
    """

    files: set[str] = field(default_factory=set)
    types: set[str] = field(default_factory=set)
    of_model: set[str] = field(default_factory=set)
    reached: bool = False

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event != "call" or self.reached:
            return
        if path.is_relative_to(MODEL):
            self.of_model.add(path.name)
        if not path.is_relative_to(TOOLBOX):
            return
        self.files.add(path.relative_to(TOOLBOX).as_posix())
        owner = frame.f_locals.get("self", frame.f_locals.get("cls"))
        kind = owner if isinstance(owner, type) else type(owner)
        if kind.__module__.startswith(f"{llm2clip.__name__}."):
            self.types.add(kind.__name__)
        self.reached = frame.f_code is llm2clip.clip_loss.__code__


@pytest.fixture(scope="module")
def traces(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Trace]:
    """The first batch of a stream of tars with sidecars, which opens files, and the second, as training takes them."""
    folder = tmp_path_factory.mktemp("way")
    tars = write_tars(folder / "tars")
    embedded(inputs, Path(), source(tars), output_dir="")
    data = {"sources": [source(tars)], "embedding_cache": tars, "eval_sources": {}, "shuffle_block": 8}
    trainer = run_stage2.build_trainer(build_config(Stage2Recipe, fields_of("stage2", folder / "run", inputs, **data)))
    loader, model, found = trainer.get_train_dataloader(), trainer.model.train(), (Trace(), Trace())
    batches: Any = None
    for trace in found:
        sys.setprofile(trace.note)
        try:
            batches = iter(loader) if batches is None else batches
            trainer.compute_loss(model, trainer._prepare_inputs(next(batches)))
        finally:
            sys.setprofile(None)
        assert trace.reached
    return found


def test_a_caption_passes_few_files_and_types(traces: tuple[Trace, Trace]) -> None:
    _, second = traces
    assert len(second.files) <= MOST_FILES, second.files
    assert len(second.types) <= MOST_TYPES, second.types


def test_the_files_that_a_caption_passes_are_listed(traces: tuple[Trace, Trace]) -> None:
    first, second = traces
    assert {name for cell in cells(TITLE, 1) for name in named(cell)} == second.files
    section = PAGE.split(f"\n## {TITLE}\n")[1].split("\n## ")[0]
    assert f"{len(second.files)} files and {len(second.types)} types" in section
    assert len(re.findall(r"\d+ (?:files|types)", section)) == 2, "one count"
    paragraphs = {text.partition(":")[0]: set(named(text)) for text in section.split("\n\n") if ".py`" in text}
    assert paragraphs["A file that is opened on the way"] == first.files - second.files
    assert {name.rpartition("/")[2] for name in paragraphs["The model"]} == second.of_model
