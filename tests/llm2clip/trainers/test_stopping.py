"""Runs that are stopped from outside: SIGTERM, Ctrl-C, and a process of several that dies."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from llm2clip.trainers import run_stage1, run_stage2, step_guard
from llm2clip.trainers.checkpoints import last_checkpoint
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage1_trainer import Stage1Trainer
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.trainers.stage2_trainer import Stage2Trainer
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPModel
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.processes import start_python


class AtStep(TrainerCallback):
    """Does something within a step."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.action()


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def stage1(folder: Path, inputs: Inputs, resume: bool = False, **changes: Any) -> Any:
    fields = {**tiny.stage1_fields(folder, inputs.llm), **changes}
    return run_stage1.run(build_config(Stage1Recipe, fields), resume=resume)


def at_step(trainer: type, step: int, action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trainers of a class do something within a step."""
    train = trainer.train_in

    def with_action(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(AtStep(step, action))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(trainer, "train_in", with_action)


def test_sigterm_saves_the_present_step_and_exits_with_143(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stage1(tmp_path / "unbroken", inputs)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        # The second signal, of somebody who does not want to wait, changes nothing.
        at_step(Stage1Trainer, 2, lambda: [send(signal.SIGTERM)(), send(signal.SIGTERM)()], patch)
        with pytest.raises(SystemExit) as stop:
            stage1(tmp_path / "broken", inputs)
    assert stop.value.code == 143
    assert f"SIGTERM: checkpoint-2 is saved in {tmp_path / 'broken'}" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before
    assert last_checkpoint(tmp_path / "broken") == tmp_path / "broken" / "checkpoint-2"
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    stage1(tmp_path / "broken", inputs, resume=True)
    unbroken, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("unbroken", "broken"))
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_the_process_ends_after_the_grace_seconds_in_any_case(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(step_guard.os, "_exit", ended.append)

    def long_step() -> None:
        send(signal.SIGTERM)()
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)

    at_step(Stage1Trainer, 5, long_step, monkeypatch)
    with pytest.raises(SystemExit):
        stage1(tmp_path, inputs, grace_seconds=0.2)
    assert ended == [143]
    assert "SIGTERM came 0 seconds ago, and no checkpoint" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grace_seconds": 0}, "grace_seconds must be a number of seconds above 0"),
        ({"enable_jit_checkpoint": True}, "leave enable_jit_checkpoint off"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(Stage1Recipe, {**tiny.stage1_fields(tmp_path, "llm"), **fields})


def begin(fields: dict[str, Any], processes: int = 1) -> subprocess.Popen[str]:
    """Start stage 2 in a group of processes of its own."""
    recipe = Path(fields["output_dir"]).with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(fields))
    return start_python(["-m", "llm2clip", "stage2", str(recipe)], processes)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def endless(inputs: Inputs, folder: Path, **changes: Any) -> dict[str, Any]:
    fields = tiny.stage2_fields(folder, inputs.vision, inputs.text, inputs.cache)
    return {**fields, "max_steps": 100_000, "save_steps": 5, "eval_sources": {}, "save_total_limit": 2, **changes}


def newest(folder: Path) -> Path:
    found = last_checkpoint(folder)
    assert found is not None
    return found


def joint_weights(folder: Path) -> dict[str, torch.Tensor]:
    return LLM2CLIPModel.from_pretrained(folder, text_model=False).state_dict()


@pytest.mark.slow
def test_a_job_that_gets_sigterm_goes_on_as_if_unbroken(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm sends the signal to all processes of a job, those that read data too."""
    broken = tmp_path / "broken"
    fields = endless(inputs, broken, dataloader_num_workers=2)
    process = begin(fields)
    wait_for(broken / "checkpoint-5" / "trainer_state.json", process)
    os.killpg(process.pid, signal.SIGTERM)
    resumed_run = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143, error[-3000:]
    assert time.monotonic() - resumed_run < 30
    assert "Traceback" not in error
    stopped = newest(broken)
    assert f"SIGTERM: {stopped.name} is saved in {broken}" in error
    assert f"llm2clip stage2: stopped by SIGTERM; add --resume to go on from {stopped}." in error
    more = 5 * (int(stopped.name.removeprefix("checkpoint-")) // 5 + 2)
    # The length of the run, which the schedule of the learning rate depends on, is the same one.
    for folder, resume in ((broken, True), (tmp_path / "unbroken", False)):
        with monkeypatch.context() as patch:
            at_step(Stage2Trainer, more + 1, lambda: (_ for _ in ()).throw(KeyboardInterrupt), patch)
            with pytest.raises(KeyboardInterrupt):
                run_stage2.run(build_config(Stage2Recipe, {**fields, "output_dir": str(folder)}), resume)
    unbroken, resumed = (joint_weights(folder / f"checkpoint-{more}") for folder in (tmp_path / "unbroken", broken))
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_ctrl_c_is_one_line_that_says_how_to_go_on(inputs: Inputs, tmp_path: Path) -> None:
    process = begin(endless(inputs, tmp_path / "run", dataloader_num_workers=1))
    wait_for(tmp_path / "run" / "checkpoint-5" / ".llm2clip.json", process)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error[-3000:]
    assert "Traceback" not in error
    assert re.search(r"stage2: stopped by Ctrl-C; add --resume to go on from .*checkpoint-\d+\.\n$", error), error


def children(process: subprocess.Popen[str]) -> list[int]:
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    return sorted(map(int, found.stdout.split()))


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "one"])
def test_all_processes_stop_at_the_same_step(whom: str, inputs: Inputs, tmp_path: Path) -> None:
    process = begin(endless(inputs, tmp_path / "run"), 2)
    wait_for(tmp_path / "run" / "checkpoint-5" / "trainer_state.json", process)
    os.kill(process.pid if whom == "launcher" else children(process)[1], signal.SIGTERM)
    error = process.communicate(timeout=90)[1]
    stopped = newest(tmp_path / "run")
    assert f"SIGTERM: {stopped.name} is saved" in error, error[-3000:]
    assert (stopped / "rng_state_1.pth").is_file()
    if whom == "one":
        assert re.search(r"exitcode\s*: 143", error)


@pytest.mark.slow
def test_a_rank_that_dies_brings_the_others_down(inputs: Inputs, tmp_path: Path) -> None:
    process = begin(endless(inputs, tmp_path / "run"), 2)
    wait_for(tmp_path / "run" / "checkpoint-5" / ".llm2clip.json", process)
    ranks = children(process)
    os.kill(ranks[1], signal.SIGKILL)
    resumed_run = time.monotonic()
    error = process.communicate(timeout=120)[1]
    assert time.monotonic() - resumed_run < 60
    assert process.returncode != 0
    assert f"Signal 9 (SIGKILL) received by PID {ranks[1]}" in error
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)
    newest(tmp_path / "run")
