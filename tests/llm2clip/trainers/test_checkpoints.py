"""Whole and damaged checkpoints, and the settings of a resumed run."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoTokenizer

from llm2clip.trainers import checkpoints, run_stage1
from llm2clip.trainers.checkpoints import SETTINGS, finish_checkpoint, last_checkpoint
from llm2clip.trainers.run_context import RunContext, keep_global_batch, stage_command
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage1_trainer import Stage1Trainer
from llm2clip.utils import locks, manifests
from llm2clip.utils.files import read_json, sha256
from llm2clip.utils.manifests import damage
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPTextModel
from tests.damage import flip
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.test_plain_datasets import IterableRows, MapRows
from tests.llm2clip.utils.test_locks import another_run

PAIRS = [{"anchor": f"word {number}", "positive": f"meaning {number * number}"} for number in range(16)]
FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")


def save(folder: Path, step: int, limit: int | None = None) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in FILES:
        (checkpoint / name).write_text("{}" * 50)
    if (folder / SETTINGS).is_file():
        shutil.copy(folder / SETTINGS, checkpoint)
    finish_checkpoint(checkpoint, limit, None)
    return checkpoint


def settings(folder: Path, llm: str = "llm", **changes: Any) -> Stage1Recipe:
    return build_config(Stage1Recipe, {**tiny.stage1_fields(folder, llm), **changes})


@stage_command()
def start(config: Any, context: RunContext) -> str | None:
    """The command of a stage that only tells where it starts."""
    return None if context.checkpoint is None else str(context.checkpoint)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [None, 0, 40])
def test_a_damaged_checkpoint_is_passed_over(
    name: str, size: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, damaged = save(tmp_path, 9), save(tmp_path, 12)
    if size is None:
        (damaged / name).unlink()
    else:
        (damaged / name).write_bytes((damaged / name).read_bytes()[:size])
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) == whole
    assert f"Skipping {damaged}: incomplete or damaged ({name} " in caplog.text
    with pytest.raises(ValueError, match=f"is damaged \\({name}"):
        start(settings(tmp_path, resume_from_checkpoint=str(damaged)), resume=False)


def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 9)
    module = tmp_path / "1_Normalize"
    module.mkdir()
    files = (tmp_path / ".tmpAbC123", checkpoint / ".tmpAbC123", module / ".tmpAbC123", tmp_path / "notes.tmp")
    for path in files:
        path.touch()
    start(settings(tmp_path), resume=True)
    assert [path.exists() for path in files] == [False, False, False, True]
    assert last_checkpoint(tmp_path) == checkpoint


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_flipped_bit_is_passed_over(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, damaged = save(tmp_path, 9), save(tmp_path, 12)
    assert last_checkpoint(tmp_path) == damaged
    with flip(damaged / name):
        assert last_checkpoint(tmp_path) == whole
        assert (
            f"Skipping {damaged}: incomplete or damaged ({name} has changed: its checksum is not that" in caplog.text
        )
        with pytest.raises(ValueError, match=f"is damaged \\({name} has changed"):
            start(settings(tmp_path, resume_from_checkpoint=str(damaged)), resume=False)
        assert start(settings(tmp_path), resume=True) == str(whole)
    assert start(settings(tmp_path), resume=True) == str(damaged)


def test_a_checkpoint_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)
    read: list[str] = []
    monkeypatch.setattr(manifests, "sha256", lambda path: read.append(path.name) or sha256(path))
    start(settings(tmp_path), resume=True)
    start(settings(tmp_path / "other"), resume=False)  # nothing is read where nothing is resumed
    assert sorted(name for name in read if name != SETTINGS) == sorted(FILES)  # and a finished run lists its settings


def test_old_checkpoints_are_deleted_only_for_whole_ones(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, limit=2)
    assert steps(tmp_path) == [4, 6]
    (tmp_path / "checkpoint-8").mkdir()
    save(tmp_path, 10, limit=2)
    assert steps(tmp_path) == [6, 8, 10]
    # A run that started again from an earlier step keeps its own checkpoint.
    save(tmp_path, 3, limit=1)
    assert steps(tmp_path) == [3, 8]
    save(tmp_path, 5)
    finish_checkpoint(tmp_path / "checkpoint-5", 1, str(tmp_path / "checkpoint-3"))
    assert steps(tmp_path) == [3, 5, 8]


def test_a_full_disk_during_a_save_costs_one_checkpoint_and_changed_settings_are_refused(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = checkpoints.write_manifest

    def full(folder: Path, command: str) -> None:
        if folder.name == "checkpoint-6":
            (folder / "trainer_state.json").write_bytes(b"")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, command)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_manifest", full)
        with pytest.raises(OSError, match="No space left"):
            run_stage1.run(settings(tmp_path, inputs.llm, save_total_limit=1))
    assert steps(tmp_path) == [3, 6]
    assert damage(tmp_path / "checkpoint-3") is None
    with pytest.raises(ValueError, match=r"other settings \(learning_rate: 0\.005 -> 0\.01\).*--resume-anyway"):
        run_stage1.run(settings(tmp_path, inputs.llm, learning_rate=1e-2), resume=True)
    changes = {"save_total_limit": 1, "logging_steps": 2}
    with caplog.at_level(logging.INFO):
        run_stage1.run(settings(tmp_path, inputs.llm, **changes), resume=True)
    assert "checkpoint-6: incomplete or damaged" in caplog.text
    assert "changed since the run was started: logging_steps: 1" in caplog.text
    assert "changed since the run was started: save_total_limit" not in caplog.text
    assert steps(tmp_path) == [6]
    assert damage(tmp_path / "checkpoint-6") is None


def test_changed_settings_are_printed_and_refused_or_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert start(settings(tmp_path), resume=True) is None
    checkpoint = str(save(tmp_path, 3))
    stored = read_json(tmp_path / SETTINGS)
    assert stored["learning_rate"] == 5e-3
    assert "hub_token" not in stored
    free = {"dataloader_num_workers": 1, "eval_steps": 7, "loss_chunk_size": 4, "hub_token": "secret"}
    assert start(settings(tmp_path, **free), resume=True) == checkpoint
    assert "secret" not in (tmp_path / SETTINGS).read_text()
    changes = {"seed": 8, "sources": [{**tiny.pair_sources()[0], "max_samples": 9}], "per_device_train_batch_size": 4}
    for change in [{name: value} for name, value in changes.items()] + [changes]:
        with pytest.raises(ValueError, match="other settings") as error:
            start(settings(tmp_path, **change), resume=True)
        assert all(f"{name}: " in str(error.value) for name in change)
    with caplog.at_level(logging.INFO):
        assert start(settings(tmp_path, resume_anyway=True, **changes), resume=True) == checkpoint
    assert "changed since the run was started: seed: 7 -> 8" in caplog.text
    assert read_json(tmp_path / SETTINGS)["seed"] == 8


def stage1_trainer(inputs: Inputs, folder: Path, rows: Any = PAIRS, **changes: Any) -> Stage1Trainer:
    fields = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, **changes}
    return Stage1Trainer(
        model=LLM2CLIPTextModel.from_pretrained(inputs.text),
        args=Stage1Recipe(output_dir=str(folder), report_to="none", use_cpu=True, **fields),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(inputs.text),
    )


def test_a_trainer_in_python_has_its_folder_to_itself(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    trainer = stage1_trainer(inputs, tmp_path)
    with another_run(tmp_path), pytest.raises(ValueError, match="another run is using"):
        trainer.train()
    with monkeypatch.context() as patch:
        patch.setattr(Stage1Trainer, "training_step", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    with another_run(tmp_path):
        pass
    trainer.train()
    assert steps(tmp_path) == [1, 2]


def test_a_trainer_in_python_compares_the_settings_of_the_run_that_it_resumes(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no whole checkpoint"):
        stage1_trainer(inputs, tmp_path).train(resume_from_checkpoint=True)
    stage1_trainer(inputs, tmp_path, max_steps=1).train()
    with pytest.raises(ValueError, match=r"other settings \(max_steps: 1 -> 2\).*resume_anyway=True"):
        stage1_trainer(inputs, tmp_path).train(resume_from_checkpoint=True)
    trainer = stage1_trainer(inputs, tmp_path, resume_anyway=True)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint-1 is damaged \(trainer_state.json"):
        stage1_trainer(inputs, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_number_of_workers_counts_only_in_iterable_data_of_others(inputs: Inputs, tmp_path: Path) -> None:
    def train(kind: type, workers: int, resume: bool = False) -> None:
        trainer = stage1_trainer(inputs, tmp_path / kind.__name__, kind(PAIRS), dataloader_num_workers=workers)
        trainer.train(resume_from_checkpoint=resume)

    for kind in (MapRows, IterableRows):
        train(kind, 0)
    train(MapRows, 1, resume=True)
    with pytest.raises(ValueError, match=r"other settings \(dataloader_num_workers: 0 -> 1\)"):
        train(IterableRows, 1, resume=True)


def test_another_number_of_processes_keeps_the_batch_of_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that two processes with 8 rows each began goes on alone, and so again."""
    assert start(settings(tmp_path), resume=False) is None
    stored = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps({**stored, "number of processes": 2}))
    save(tmp_path, 3)
    for _ in range(2):
        args = settings(tmp_path)
        assert args.per_device_train_batch_size == 8
        with caplog.at_level("INFO"):
            assert start(args, resume=True) is not None
        assert args.per_device_train_batch_size == 16
        assert "2 processes with 8 rows each until now, 1 with 16 from here: a batch has 16 rows" in caplog.text
        caplog.clear()
    assert start(settings(tmp_path, per_device_train_batch_size=16), resume=True) is not None
    with pytest.raises(ValueError, match=r"other settings .*per_device_train_batch_size: 8 -> 4"):
        start(settings(tmp_path, per_device_train_batch_size=4), resume=True)
    with pytest.raises(ValueError, match=r"3 processes cannot share batches of 16 rows .* on 1, 2, 4 processes"):
        keep_global_batch(cast(Any, SimpleNamespace(world_size=3, per_device_train_batch_size=8)), _begun(2, 8))


def _begun(processes: int, rows: int) -> dict[str, int]:
    return {"number of processes": processes, "per_device_train_batch_size": rows}


class _Touch:
    """Its pickle makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_means_harm_is_one_clear_error(name: str, inputs: Inputs, tmp_path: Path) -> None:
    stage1_trainer(inputs, tmp_path).train()
    checkpoint = tmp_path / "checkpoint-1"
    torch.save(_Touch(tmp_path / "touched"), checkpoint / name)
    finish_checkpoint(checkpoint, None, None)
    with pytest.raises(ValueError, match="checkpoint-1: a file of the checkpoint cannot be read safely"):
        stage1_trainer(inputs, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "touched").exists()
