"""Runs in processes of their own that are stopped: SIGTERM, Ctrl-C, SIGKILL, and a process of several that dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm2clip.trainers.checkpoints import last_checkpoint
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import CLI, assert_equal, at_step, fields_of, interrupt, run
from tests.processes import start_python

ENDLESS = {"max_steps": 100_000, "save_steps": 5, "eval_sources": {}, "save_total_limit": 2}


def begin(fields: dict[str, Any], processes: int = 1) -> subprocess.Popen[str]:
    """Start stage 2 in a group of processes of its own, and wait for its first checkpoint."""
    folder = Path(fields["output_dir"])
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(fields))
    process = start_python([*CLI, "stage2", str(recipe)], processes)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-5" / ".llm2clip.json").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def newest(folder: Path) -> Path:
    found = last_checkpoint(folder)
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_job_that_gets_a_signal_goes_on_as_if_unbroken(
    number: signal.Signals, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm sends the signal to all processes of a job, those that read data too."""
    broken = tmp_path / "broken"
    fields = fields_of("stage2", broken, inputs, dataloader_num_workers=2, **ENDLESS)
    process = begin(fields)
    os.killpg(process.pid, number)
    sent = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert time.monotonic() - sent < 30
    assert "Traceback" not in error
    assert not (broken / "model.safetensors").exists()
    stopped = newest(broken)
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert f"SIGTERM: {stopped.name} is saved in {broken}" in error
        assert f"llm2clip stage2: stopped by SIGTERM; add --resume to go on from {stopped}." in error
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert re.search(r"stage2: stopped by Ctrl-C; add --resume to go on from .*checkpoint-\d+\.\n$", error), error
    more = 5 * (int(stopped.name.removeprefix("checkpoint-")) // 5 + 2)
    # The length of the run, which the schedule of the learning rate depends on, is the same one.
    at_step(more + 1, interrupt, monkeypatch)
    for folder in (broken, tmp_path / "unbroken"):
        with pytest.raises(KeyboardInterrupt):
            run("stage2", folder, inputs, resume=folder == broken, dataloader_num_workers=2, **ENDLESS)
    assert_equal(tmp_path / "unbroken" / f"checkpoint-{more}", broken / f"checkpoint-{more}", atol=1e-6)


def children(process: subprocess.Popen[str]) -> list[int]:
    command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(map(int, found.stdout.split()))


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "one"])
def test_all_processes_stop_at_the_same_step(whom: str, inputs: Inputs, tmp_path: Path) -> None:
    process = begin(fields_of("stage2", tmp_path / "run", inputs, **ENDLESS), 2)
    os.kill(process.pid if whom == "launcher" else children(process)[1], signal.SIGTERM)
    error = process.communicate(timeout=90)[1]
    stopped = newest(tmp_path / "run")
    assert f"SIGTERM: {stopped.name} is saved" in error, error[-3000:]
    assert (stopped / "rng_state_1.pth").is_file()
    if whom == "one":
        assert re.search(r"exitcode\s*: 143", error)


@pytest.mark.slow
def test_a_rank_that_dies_brings_the_others_down(inputs: Inputs, tmp_path: Path) -> None:
    process = begin(fields_of("stage2", tmp_path / "run", inputs, **ENDLESS), 2)
    ranks = children(process)
    os.kill(ranks[1], signal.SIGKILL)
    sent = time.monotonic()
    error = process.communicate(timeout=120)[1]
    assert time.monotonic() - sent < 60
    assert process.returncode != 0
    assert f"Signal 9 (SIGKILL) received by PID {ranks[1]}" in error
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)
    newest(tmp_path / "run")
