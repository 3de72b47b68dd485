"""A run on a stream that is resumed equals an unbroken one, and decodes nothing again."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.data import tars as tar_reader
from llm2clip.data.captioned_images import SampleMaker
from llm2clip.trainers import run_stage2
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.files import read_json
from llm2clip.utils.manifests import FOLDER_MANIFEST
from llm2clip.utils.processes import leave_process_group
from llm2clip.utils.settings import build_config
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.test_stage2 import losses, weights
from tests.llm2clip.trainers.test_stage2_captions import PER_TAR, TARS, embedded, source, train, write_tars
from tests.processes import run_ranks

STEPS, BATCH = 7, 16


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


@pytest.mark.parametrize("workers", [0, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 2))])
def test_a_resumed_run_equals_an_unbroken_one(
    workers: int, inputs: Inputs, tars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first epoch and in the second, which begins within the fifth step."""
    # Random numbers of the model too.
    changes = {"dataloader_num_workers": workers, "patch_dropout": 0.3, "gradient_accumulation_steps": 1}
    run(tmp_path / "unbroken", inputs, tars, **changes)
    made: list[str] = []
    read: list[str] = []
    make, decoded = SampleMaker.__call__, tar_reader._decoded
    monkeypatch.setattr(SampleMaker, "__call__", lambda self, *a: (made.append(a[1]), make(self, *a))[1])
    monkeypatch.setattr(tar_reader, "_decoded", lambda path, key, *a: (read.append(key), decoded(path, key, *a))[1])
    for step in (3, 6):
        folder = broken_after(tmp_path / "unbroken", tmp_path / str(step), step)
        made.clear()
        read.clear()
        run(folder, inputs, tars, resume=True, **changes)
        assert_equal(folder, tmp_path / "unbroken")
        assert losses(folder) == losses(tmp_path / "unbroken")
        if workers == 0:
            assert len(made) == (STEPS - step) * BATCH
            state = read_json(folder / "checkpoint-7" / "run_state.json")["stream"]
            assert state["rows"] == STEPS * BATCH
            # Lanes of one or two rows here: of each at most what is trained on, and the rest of its block.
            assert len(read) <= len(made) + state["lanes"]["number"]
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


def test_another_order_is_refused_also_with_resume_anyway(inputs: Inputs, tars: str, tmp_path: Path) -> None:
    run(tmp_path / "unbroken", inputs, tars, max_steps=3)
    folder = broken_after(tmp_path / "unbroken", tmp_path / "run", 2)
    changes: dict[str, Any] = {"shuffle_block": 7, "resume": True, "max_steps": 3, "resume_anyway": True}
    with pytest.raises(ValueError, match=r"a stream with shuffle_blocks \[\d+\], now it is \[7\]"):
        run(folder, inputs, tars, **changes)
    run(folder, inputs, tars, **changes, ignore_data_skip=True)


def test_a_checkpoint_without_the_rows_starts_the_stream_over(
    inputs: Inputs, tars: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "unbroken", inputs, tars, max_steps=3)
    folder = broken_after(tmp_path / "unbroken", tmp_path / "run", 2)
    for name in (FOLDER_MANIFEST, "run_state.json"):
        (folder / "checkpoint-2" / name).unlink()
    changes = {"resume_from_checkpoint": str(folder / "checkpoint-2"), "max_steps": 3, "resume_anyway": True}
    with caplog.at_level(logging.WARNING):
        run(folder, inputs, tars, **changes)
    assert "has no position in a stream: training continues from its first row" in caplog.text


def train_noting_keys(path: Path) -> None:
    """Train, and add the keys of every batch of this process to a file."""
    fields = json.loads(path.read_text())
    config = build_config(Stage2Recipe, fields)
    trainer = run_stage2.build_trainer(config)
    collate = trainer.data_collator

    def noting(samples: list[dict[str, Any]]) -> dict[str, Any]:
        with path.with_name(f"keys-{config.process_index}").open("a") as file:
            file.writelines(f"{sample['key']}\n" for sample in samples)
        return collate(samples)

    trainer.data_collator = noting
    trainer.train(resume_from_checkpoint=fields.get("resume_from_checkpoint"))


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
def test_one_process_goes_on_where_two_were(streaming: bool, inputs: Inputs, tars: str, tmp_path: Path) -> None:
    """With the batches of the two, of a stream and of a table."""
    data: dict[str, Any] = {"sources": [source(tars)] if streaming else [tiny.concepts(max_samples=64)]}
    cache = tars if streaming else inputs.cache
    fields = tiny.stage2_fields(tmp_path / "run", inputs.vision, inputs.text, cache) | {"eval_sources": {}, **data}
    fields |= {"per_device_train_batch_size": 8, "max_steps": 4, "save_steps": 2, "shuffle_block": 8}
    recipe = tmp_path / "fields.json"
    recipe.write_text(json.dumps(fields))
    module = ["-m", "tests.llm2clip.trainers.test_stream_resume", str(recipe)]
    run_ranks(module, 2)
    resumed_run = broken_after(tmp_path / "run", tmp_path / "alone", 2)
    first = [(tmp_path / f"keys-{rank}").read_text().split()[:16] for rank in range(2)]
    for rank in range(2):
        (tmp_path / f"keys-{rank}").unlink()
    changes = {"output_dir": str(resumed_run), "resume_from_checkpoint": str(resumed_run / "checkpoint-2")}
    recipe.write_text(json.dumps(fields | changes))
    train_noting_keys(recipe)
    rest = (tmp_path / "keys-0").read_text().split()
    assert len(rest) == 32, "two steps with the batch of two processes"
    assert len({*first[0], *first[1], *rest}) == 64
    state = json.loads((resumed_run / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(64 / (TARS * PER_TAR if streaming else 64))
    assert losses_of(resumed_run) == pytest.approx(losses_of(tmp_path / "run"), abs=1e-4)


def losses_of(folder: Path) -> list[float]:
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


if __name__ == "__main__":
    train_noting_keys(Path(sys.argv[1]))
    leave_process_group()
