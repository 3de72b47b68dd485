"""Whole and damaged checkpoints, and what of its settings and data a resumed run compares."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import numpy as np
import pytest
import torch

from llm2clip.command_line.settings import build_config
from llm2clip.data import CaptionImageDataset, CaptionSource, PairDataset, PairSource
from llm2clip.data.sampling import EpochDataset
from llm2clip.data.table_identity import sampled_files_digest
from llm2clip.files import locks
from llm2clip.files.atomic import read_json
from llm2clip.files.locks import folder_lock
from llm2clip.files.manifests import damage
from llm2clip.trainers import checkpoints
from llm2clip.trainers.checkpoints import SETTINGS, finish_checkpoint, last_checkpoint
from llm2clip.trainers.mntp_data import TokenBlocks
from llm2clip.trainers.run_context import RunContext, keep_global_batch, stage_command
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage1_trainer import Stage1Trainer
from llm2clip.trainers.text_tower_trainer import sampled_digest
from tests.builders import small_runs, tiny
from tests.damage import flip
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.rows import stage1
from tests.llm2clip.trainers.stages import run, steps

FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")
SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


def save(folder: Path, step: int, limit: int | None = None) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in FILES:
        (checkpoint / name).write_text("{}" * 50)
    if (folder / SETTINGS).is_file():
        shutil.copy(folder / SETTINGS, checkpoint)
    finish_checkpoint(checkpoint, limit, None)
    return checkpoint


def settings(folder: Path, **changes: Any) -> Stage1Recipe:
    return build_config(Stage1Recipe, {**small_runs.stage1_fields(folder, "llm"), **changes})


@stage_command()
def start(config: Any, context: RunContext) -> str | None:
    """The command of a stage that only tells where it starts."""
    return None if context.checkpoint is None else str(context.checkpoint)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["missing", "cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(fault: str, name: str, tmp_path: Path, caplog: Any) -> None:
    whole, damaged = save(tmp_path, 9), save(tmp_path, 12)
    with flip(damaged / name):
        if fault == "missing":
            (damaged / name).unlink()
        if fault == "cut":
            (damaged / name).write_bytes((damaged / name).read_bytes()[:40])
        assert start(settings(tmp_path), resume=True) == str(whole)
        assert f"Skipping {damaged}: incomplete or damaged ({name} " in caplog.text
        with pytest.raises(ValueError, match=f"is damaged \\({name}"):
            start(settings(tmp_path, resume_from_checkpoint=str(damaged)), resume=False)
    assert start(settings(tmp_path), resume=True) == str(damaged)


def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    checkpoint, module = save(tmp_path, 9), tmp_path / "1_Normalize"
    module.mkdir()
    files = (tmp_path / ".tmpAbC123", checkpoint / ".tmpAbC123", module / ".tmpAbC123", tmp_path / "notes.tmp")
    for path in files:
        path.touch()
    start(settings(tmp_path), resume=True)
    assert [path.exists() for path in files] == [False, False, False, True]
    assert last_checkpoint(tmp_path) == checkpoint


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


def test_a_full_disk_leaves_the_checkpoint_before_and_a_resumed_run_replaces_both(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, changes = checkpoints.write_manifest, {"save_total_limit": 1, "save_steps": 1, "max_steps": 2}

    def full(folder: Path, command: str) -> None:
        if folder.name == "checkpoint-2":
            (folder / "trainer_state.json").write_bytes(b"")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, command)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_manifest", full)
        with pytest.raises(OSError, match="No space left"):
            run("stage1", tmp_path, inputs, **changes)
    assert steps(tmp_path) == [1, 2]
    assert damage(tmp_path / "checkpoint-1") is None
    run("stage1", tmp_path, inputs, resume=True, **changes)
    assert steps(tmp_path) == [2]
    assert damage(tmp_path / "checkpoint-2") is None


def test_changed_settings_are_printed_and_refused_or_accepted(tmp_path: Path, caplog: Any) -> None:
    assert start(settings(tmp_path), resume=True) is None
    checkpoint = str(save(tmp_path, 3))
    free = {"dataloader_num_workers": 1, "save_steps": 7, "hub_token": "secret"}
    assert start(settings(tmp_path, **free), resume=True) == checkpoint
    stored = (tmp_path / SETTINGS).read_text()
    assert "secret" not in stored
    assert "hub_token" not in json.loads(stored)
    changes = {
        "seed": 8,
        "sources": [{**small_runs.pair_sources()[0], "max_samples": 9}],
        "per_device_train_batch_size": 4,
    }
    for change in [{name: value} for name, value in changes.items()] + [changes]:
        with pytest.raises(ValueError, match="other settings") as error:
            start(settings(tmp_path, **change), resume=True)
        assert all(f"{name}: " in str(error.value) for name in change)
    with caplog.at_level(logging.INFO):
        assert start(settings(tmp_path, resume_anyway=True, **changes), resume=True) == checkpoint
    assert "changed since the run was started: seed: 7 -> 8" in caplog.text
    assert read_json(tmp_path / SETTINGS)["seed"] == 8


def test_a_trainer_in_python_has_its_folder_to_itself(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    trainer = stage1(inputs, tmp_path, max_steps=1)
    # In another thread, since the lock lets the one that holds it in.
    with folder_lock(tmp_path / "out"), ThreadPoolExecutor() as other, pytest.raises(ValueError, match="another run"):
        other.submit(trainer.train).result()
    with monkeypatch.context() as patch:
        patch.setattr(Stage1Trainer, "training_step", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    trainer.train()


def test_a_trainer_in_python_compares_the_settings_of_the_run_that_it_resumes(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no whole checkpoint"):
        stage1(inputs, tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        stage1(inputs, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    stage1(inputs, tmp_path, **{**SAVED, "max_steps": 1}).train()
    with pytest.raises(ValueError, match=r"other settings \(max_steps: 1 -> 2\).*resume_anyway=True"):
        stage1(inputs, tmp_path, **SAVED).train(resume_from_checkpoint=True)
    trainer = stage1(inputs, tmp_path, resume_anyway=True, **SAVED)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]


def test_a_checkpoint_without_the_state_of_the_optimizer_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    stage1(inputs, tmp_path, save_only_model=True, **SAVED).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    message = r"checkpoint-\d has the model alone, as save_only_model saves it"
    for given in (checkpoint, True):
        with pytest.raises(ValueError, match=message):
            stage1(inputs, tmp_path, save_only_model=True, **SAVED).train(resume_from_checkpoint=given)
        with pytest.raises(ValueError, match=message):
            start(settings(tmp_path / "out", resume_from_checkpoint=None if given is True else given), resume=True)


def test_another_number_of_processes_keeps_the_batch_of_all(tmp_path: Path) -> None:
    """A run that two processes with 8 rows each began goes on alone, and so again."""
    assert start(settings(tmp_path), resume=False) is None
    stored = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps({**stored, "number of processes": 2}))
    save(tmp_path, 3)
    for given in (8, 8, 16):
        args = settings(tmp_path, per_device_train_batch_size=given)
        assert start(args, resume=True) is not None
        assert args.per_device_train_batch_size == 16
    with pytest.raises(ValueError, match=r"other settings .*per_device_train_batch_size: 8 -> 4"):
        start(settings(tmp_path, per_device_train_batch_size=4), resume=True)
    three = cast(Any, SimpleNamespace(world_size=3, per_device_train_batch_size=8))
    with pytest.raises(ValueError, match=r"3 processes cannot share batches of 16 rows .* on 1, 2, 4 processes"):
        keep_global_batch(three, {"number of processes": 2, "per_device_train_batch_size": 8})


class _Touch:
    """Its pickle makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_means_harm_is_refused(name: str, inputs: Inputs, tmp_path: Path) -> None:
    stage1(inputs, tmp_path, **SAVED).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    torch.save(_Touch(tmp_path / "touched"), checkpoint / name)
    finish_checkpoint(checkpoint, None, None)
    with pytest.raises(ValueError, match="checkpoint-1: a file cannot be read safely"):
        stage1(inputs, tmp_path, **SAVED).train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "touched").exists()


CHANGES: dict[str, Callable[[datasets.Dataset], datasets.Dataset]] = {
    "reordered": lambda table: table.select(range(len(table))[::-1]),
    "another text": lambda table: table.map(lambda row: {"long": row["long"].replace("thing 3 ", "Thing 3 ")}),
    "fewer rows": lambda table: table.select(range(len(table) - 1)),
}
OPENED: dict[str, Callable[[Path], EpochDataset]] = {
    "pairs": lambda path: PairDataset(PairSource(path=str(path), anchor_column="short", positive_column="long")),
    "captions": lambda path: CaptionImageDataset(
        CaptionSource(path=str(path), caption_columns=["short", "long"]), with_images=False
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", OPENED)
def test_a_digest_of_texts_is_of_the_rows_in_their_order(kind: str, change: str, tmp_path: Path) -> None:
    table = datasets.Dataset.from_parquet(small_runs.write_text_pairs(tmp_path / "a.parquet", 8))
    CHANGES[change](table).to_parquet(tmp_path / "b.parquet")
    table.to_json(tmp_path / "c.jsonl")
    digests = [OPENED[kind](tmp_path / name).content_digest() for name in ("a.parquet", "b.parquet", "c.jsonl")]
    assert digests[0] == digests[2] != digests[1]


def test_a_digest_of_images_is_of_their_bytes(tmp_path: Path) -> None:
    def digest(last: Any, folder: str) -> str:
        (tmp_path / folder).mkdir()
        for name, image in (("a.png", tiny.IMAGES[0]), ("b.png", last)):
            image.save(tmp_path / folder / name)
        rows = {"image": ["a.png", "b.png"], "caption": ["one", "two"]}
        datasets.Dataset.from_dict(rows).to_json(tmp_path / folder / "rows.jsonl")
        source = CaptionSource(path=str(tmp_path / folder / "rows.jsonl"))
        return CaptionImageDataset(source).content_digest()

    first, second = tiny.IMAGES[:2]
    assert digest(second, "x") == digest(second, "y") != digest(first, "z")


def test_digests_of_tokens_and_of_weights_are_of_their_values() -> None:
    tokens = np.arange(12, dtype=np.int32)
    other = tokens.copy()
    other[7] = 0
    digests = [TokenBlocks(one, 4).content_digest() for one in (tokens, tokens.copy(), other)]
    assert digests[0] == digests[1] != digests[2]
    # The embeddings of SmolLM2-135M have as many; the float32 next to their last place is beyond it.
    weight = torch.zeros(28_311_552, dtype=torch.int8)
    before = sampled_digest([("weight", weight)])
    weight[-1] = 1
    assert sampled_digest([("weight", weight)]) != before


def test_a_digest_of_a_stream_is_of_the_content_of_its_files(tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("a.bin", "b.bin", "c.bin")]
    for number, path in enumerate(names):
        path.write_bytes(bytes([number]) * 100)
    first = sampled_files_digest([*map(str, names), "https://example.invalid/d.bin"])
    moved = [str(path.rename(tmp_path / f"x-{path.name}")) for path in names]
    assert sampled_files_digest(moved) == first
    assert sampled_files_digest(moved[::-1]) != first
    (tmp_path / "x-b.bin").write_bytes(bytes([1]) * 99 + b"\2")
    assert sampled_files_digest(moved) != first
