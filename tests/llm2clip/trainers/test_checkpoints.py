"""Whole and damaged checkpoints, and the settings of a resumed run."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from llm2clip.trainers import checkpoints, run_stage1
from llm2clip.trainers.checkpoints import finish_checkpoint, last_checkpoint, resume_point
from llm2clip.trainers.run_settings import SETTINGS
from llm2clip.trainers.stage1_config import Stage1Config
from llm2clip.utils.files import read_json
from llm2clip.utils.manifests import damage
from llm2clip.utils.settings import build_config
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs

FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")


def save(folder: Path, step: int, limit: int | None = None) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in FILES:
        (checkpoint / name).write_text("{}" * 50)
    finish_checkpoint(checkpoint, limit, None)
    return checkpoint


def settings(folder: Path, llm: str = "llm", **changes: Any) -> Stage1Config:
    return build_config(Stage1Config, {**tiny.stage1_fields(folder, llm), **changes})


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
    assert f"{damaged} is incomplete or damaged ({name} " in caplog.text
    with pytest.raises(ValueError, match=f"is damaged \\({name}"):
        resume_point(settings(tmp_path, resume_from_checkpoint=str(damaged)), resume=False)


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
    assert "checkpoint-6 is incomplete or damaged" in caplog.text
    assert "changed since the run was started: logging_steps: 1" in caplog.text
    assert "changed since the run was started: save_total_limit" not in caplog.text
    assert steps(tmp_path) == [6]
    assert damage(tmp_path / "checkpoint-6") is None


def test_changed_settings_are_printed_and_refused_or_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resume_point(settings(tmp_path), resume=True) is None
    checkpoint = str(save(tmp_path, 3))
    stored = read_json(tmp_path / SETTINGS)
    assert stored["learning_rate"] == 5e-3
    assert "hub_token" not in stored
    free = {"dataloader_num_workers": 1, "eval_steps": 7, "loss_chunk_size": 4, "hub_token": "secret"}
    assert resume_point(settings(tmp_path, **free), resume=True) == checkpoint
    assert "secret" not in (tmp_path / SETTINGS).read_text()
    changes = {"seed": 8, "sources": [{**tiny.pair_sources()[0], "max_samples": 9}], "per_device_train_batch_size": 4}
    for change in [{name: value} for name, value in changes.items()] + [changes]:
        with pytest.raises(ValueError, match="other settings") as error:
            resume_point(settings(tmp_path, **change), resume=True)
        assert all(f"{name}: " in str(error.value) for name in change)
    with caplog.at_level(logging.INFO):
        assert resume_point(settings(tmp_path, resume_anyway=True, **changes), resume=True) == checkpoint
    assert "changed since the run was started: seed: 7 -> 8" in caplog.text
    assert read_json(tmp_path / SETTINGS)["seed"] == 8
