"""A run that was ended after its last step resumes without one more."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file

from llm2clip.trainers import run_stage1
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.utils.files import read_json
from llm2clip.utils.settings import build_config
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs

WEIGHTS = "model.safetensors"


def test_a_run_that_was_killed_while_it_saved_its_result_makes_no_further_step(inputs: Inputs, tmp_path: Path) -> None:
    changes = {"max_steps": 2, "save_steps": 2, "ema_half_life": 1.0}
    config = build_config(Stage1Recipe, {**tiny.stage1_fields(tmp_path, inputs.llm), **changes})
    run_stage1.run(config)
    expected = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    run_stage1.run(config, resume=True)
    found = load_file(tmp_path / WEIGHTS)
    assert all(found[name].equal(value) for name, value in expected.items())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    state = read_json(tmp_path / "trainer_state.json")
    assert state["global_step"] == 2
    assert state["log_history"][-1]["total_flos"] == 0.0


def test_a_resumed_run_logs_the_losses_of_an_unbroken_one(inputs: Inputs, tmp_path: Path) -> None:
    # The checkpoint is between two entries of the log, and some captions are longer than 20 tokens.
    changes = {"max_steps": 5, "save_steps": 3, "logging_steps": 2, "save_total_limit": 2, "max_text_length": 20}
    config = build_config(Stage1Recipe, {**tiny.stage1_fields(tmp_path, inputs.llm), **changes})
    expected = run_stage1.run(config)
    history = read_json(tmp_path / "trainer_state.json")["log_history"]
    shutil.rmtree(tmp_path / "checkpoint-5")
    found = run_stage1.run(config, resume=True)
    resumed = read_json(tmp_path / "trainer_state.json")["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4]
    assert found["train_loss"] == expected["train_loss"]
    for name in ("loss", "train_loss", "cut_captions"):
        values = [entry[name] for entry in history if name in entry]
        assert [entry[name] for entry in resumed if name in entry] == values
        assert values
