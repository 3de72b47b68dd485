"""What shards a model: a run that would not be sharded as its launch asks is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState

from llm2clip.trainers import run_mntp, run_stage1, run_stage2
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.settings import build_config
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.test_processes import CLI, launch_configuration
from tests.processes import run_python


def start(stage: str, folder: Path, **fields: Any) -> None:
    """Start a stage whose models do not exist: a refusal comes before they are opened."""
    fields = {"output_dir": str(folder), "sources": [tiny.concepts()], "report_to": "none", **fields}
    if stage == "stage2":
        run_stage2.run(build_config(Stage2Recipe, {**fields, "embedding_cache": "none"}))
    elif stage == "stage1":
        run_stage1.run(build_config(Stage1Recipe, {**fields, "model_name_or_path": "none"}))
    else:
        run_mntp.run(build_config(MNTPRecipe, {**fields, "model_name_or_path": "none"}))


@pytest.mark.parametrize("stage", ["mntp", "stage1", "stage2"])
def test_fsdp_that_accelerate_does_not_give_is_refused_before_anything_is_loaded(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"the launch \(ACCELERATE_USE_FSDP=true\) asks for FSDP.*1 process on CPU"):
        start(stage, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fsdp_as_a_setting_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the setting fsdp asks for FSDP"):
        run_stage1.run(Stage1Recipe(str(tmp_path / "run"), model_name_or_path="none", sources=[{}], fsdp=True))


def test_deepspeed_that_accelerate_does_not_give_is_refused_before_the_first_step(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ACCELERATE_USE_CPU, accelerate ignores a request for DeepSpeed."""
    pytest.importorskip("deepspeed", reason="pip install --no-build-isolation deepspeed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    fields = tiny.stage1_fields(tmp_path / "run", inputs.llm)
    with pytest.raises(ValueError, match=r"the launch \(ACCELERATE_USE_DEEPSPEED=true\) asks for DeepSpeed"):
        run_stage1.run(build_config(Stage1Recipe, fields))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_run_that_asks_for_nothing_is_not_refused(inputs: Inputs, tmp_path: Path) -> None:
    fields = tiny.stage1_fields(tmp_path / "run", inputs.llm) | {"max_steps": 1, "save_strategy": "no"}
    run_stage1.run(build_config(Stage1Recipe, fields))
    assert AcceleratorState._shared_state
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_on_the_cpu_are_told_in_one_line_that_fsdp_needs_gpus(inputs: Inputs, tmp_path: Path) -> None:
    launch, recipe = tmp_path / "launch.yaml", tmp_path / "recipe.yaml"
    launch.write_text(yaml.safe_dump({**launch_configuration("fsdp.yaml"), "num_processes": 2, "use_cpu": True}))
    recipe.write_text(yaml.safe_dump(tiny.stage1_fields(tmp_path / "run", inputs.llm)))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(launch), "--main_process_port", "0"]
    result = run_python([*launcher, *CLI, "stage1", str(recipe)], check=False)
    assert result.returncode != 0
    assert "llm2clip stage1: error: the launch (ACCELERATE_USE_FSDP=true) asks for FSDP" in result.stderr
    assert "here are 2 processes on CPU" in result.stderr
    assert "loss" not in result.stdout
