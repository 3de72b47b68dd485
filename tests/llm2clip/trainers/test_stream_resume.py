"""A run on a stream that is resumed equals an unbroken one, and decodes nothing again."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.data import numbered_tar_rows
from llm2clip.data.captioned_images import SampleMaker
from llm2clip.utils.manifests import FOLDER_MANIFEST
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.test_stage2 import losses, weights
from tests.llm2clip.trainers.test_stage2_captions import PER_TAR, TARS, embedded, source, train, write_tars

STEPS, BATCH, BUFFER = 7, 16, 16


@pytest.fixture(scope="module")
def tars(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards with their sidecars beside them; 72 rows, four and a half batches."""
    folder = write_tars(tmp_path_factory.mktemp("stream") / "tars")
    embedded(inputs, Path(), source(folder), output_dir="")
    return folder


def run(folder: Path, inputs: Inputs, tars: str, resume: bool = False, **changes: Any) -> None:
    fields = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS, **changes}
    train(folder, inputs, Path(tars), tars, resume, **fields)


def broken_after(unbroken: Path, folder: Path, step: int) -> Path:
    """A copy of a run as if it had been killed after a step."""
    shutil.copytree(unbroken, folder)
    for path in folder.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return folder


def assert_equal(folder: Path, unbroken: Path) -> None:
    expected = weights(unbroken)
    for name, value in weights(folder).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resumed_run_equals_an_unbroken_one(
    workers: int, inputs: Inputs, tars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first epoch and in the second, which begins within the fifth step."""
    # Random numbers of the model too.
    changes = {"dataloader_num_workers": workers, "patch_dropout": 0.3, "gradient_accumulation_steps": 1}
    run(tmp_path / "unbroken", inputs, tars, **changes)
    made: list[str] = []
    read: list[str] = []
    make, decoded = SampleMaker.__call__, numbered_tar_rows._decoded
    monkeypatch.setattr(SampleMaker, "__call__", lambda self, *a: (made.append(a[1]), make(self, *a))[1])
    monkeypatch.setattr(
        numbered_tar_rows, "_decoded", lambda path, key, *a: (read.append(key), decoded(path, key, *a))[1]
    )
    for step in (3, 6):
        folder = broken_after(tmp_path / "unbroken", tmp_path / str(step), step)
        made.clear()
        read.clear()
        run(folder, inputs, tars, resume=True, **changes)
        assert_equal(folder, tmp_path / "unbroken")
        assert losses(folder) == losses(tmp_path / "unbroken")
        if workers == 0:
            assert len(made) == (STEPS - step) * BATCH
            assert len(read) <= len(made) + BUFFER * (1 + (step == 3))  # a buffer is filled in each epoch
    state = json.loads((tmp_path / "6" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(STEPS * BATCH / (TARS * PER_TAR))


def test_steps_of_several_batches_are_resumed(inputs: Inputs, tars: str, tmp_path: Path) -> None:
    changes = {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "max_steps": 4}
    run(tmp_path / "unbroken", inputs, tars, **changes)
    folder = broken_after(tmp_path / "unbroken", tmp_path / "broken", 2)
    run(folder, inputs, tars, resume=True, **changes)
    assert_equal(folder, tmp_path / "unbroken")


def test_changed_shards_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars")
    embedded(inputs, Path(), source(tars), output_dir="")
    run(tmp_path / "unbroken", inputs, tars, max_steps=3)
    folder = broken_after(tmp_path / "unbroken", tmp_path / "run", 2)
    (tmp_path / "tars" / "2.tar").unlink()
    with pytest.raises(ValueError, match=r"the files of .*tars, or their numbers of rows, are not those of the run"):
        run(folder, inputs, tars, resume=True, max_steps=3)
    run(folder, inputs, tars, resume=True, max_steps=3, ignore_data_skip=True, resume_anyway=True)


def test_a_checkpoint_without_a_place_starts_the_stream_over(
    inputs: Inputs, tars: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "unbroken", inputs, tars, max_steps=3)
    folder = broken_after(tmp_path / "unbroken", tmp_path / "run", 2)
    for name in (FOLDER_MANIFEST, "stream.json"):
        (folder / "checkpoint-2" / name).unlink()
    changes = {"resume_from_checkpoint": str(folder / "checkpoint-2"), "max_steps": 3, "resume_anyway": True}
    with caplog.at_level(logging.WARNING):
        run(folder, inputs, tars, **changes)
    assert "stream.json is missing: training goes on from the first row" in caplog.text
