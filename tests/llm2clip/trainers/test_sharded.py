"""Models that FSDP2 shards over two processes train as one process does with the whole batch."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn

from llm2clip.trainers.lora import add_lora
from llm2clip.trainers.sharding import prepare_for_fsdp
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModelWithProjection
from tests.builders import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers import gloo_as_gpus
from tests.llm2clip.trainers.stages import (
    assert_equal,
    fields_of,
    history,
    joint_model,
    launch_configuration,
    llm2clip,
    losses,
)
from tests.processes import run_python

# `lora`: stage 2 with LoRA on the LLM.
STAGES = [pytest.param("stage1", marks=pytest.mark.nightly), "stage2", "lora"]


# FSDP2 on CPUs, which nobody trains with, once in a while ends within a thread of gloo that calls malloc.
IN_GLOO = "(SIGSEGV)"


def fields(stage: str, folder: Path, inputs: Inputs, **changes: Any) -> dict[str, Any]:
    lora = {"embedding_cache": None, "lora_rank": 4} if stage == "lora" else {}
    command = "stage2" if stage == "lora" else stage
    return fields_of(command, folder, inputs, max_steps=3, save_steps=2, **lora, **changes)


def on_two_processes(stage: str, settings: dict[str, Any], *options: str) -> None:
    """Run a stage under `accelerate launch` with the packaged configuration, on two processes of the CPU."""
    launch, recipe = (Path(settings["output_dir"]).with_suffix(end) for end in (".launch.yaml", ".yaml"))
    launch.write_text(yaml.safe_dump({**launch_configuration("fsdp.yaml"), "num_processes": 2, "use_cpu": True}))
    recipe.write_text(yaml.safe_dump(settings))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(launch), "--main_process_port", "0"]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [*launcher, gloo_as_gpus.__file__, "stage2" if stage == "lora" else stage, str(recipe), *options]
    done = run_python(arguments, check=False, **environment)
    if IN_GLOO in done.stderr:
        if "--resume" not in options:
            shutil.rmtree(settings["output_dir"])
        done = run_python(arguments, check=False, **environment)
    assert done.returncode == 0, done.stderr[-4000:]


def assert_equal_runs(one: Path, two: Path) -> None:
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert_equal(one, two, atol=5e-6)
    # The first evaluation, perhaps before the first step, and the last one.
    first, other = (
        [value for entry in history(run) for name, value in entry.items() if name.endswith("mean_rank")]
        for run in (one, two)
    )
    assert len(first) <= len(other), "a resumed run is evaluated where it starts, too"
    assert other[:1] + other[-1:] == pytest.approx(first[:1] + first[-1:], abs=0.1)


# Chunks and accumulation of stage 2, of which the next test has what else is here.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("stage1", {}),
        *(
            pytest.param(stage, {"gradient_accumulation_steps": 2}, marks=pytest.mark.nightly)
            for stage in ("stage1", "stage2", "lora")
        ),
    ],
)
def test_two_processes_with_a_part_of_the_model_each_equal_one_with_all_of_it(
    stage: str, changes: dict[str, Any], inputs: Inputs, tmp_path: Path
) -> None:
    whole = fields(stage, tmp_path / "one", inputs, save_strategy="no", **changes)
    chunked = {"tower_chunk_size": 3} if changes else {}
    half = {
        "output_dir": str(tmp_path / "two"),
        "per_device_train_batch_size": whole["per_device_train_batch_size"] // 2,
    }
    llm2clip("stage2" if stage == "lora" else stage, whole)
    on_two_processes(stage, {**whole, **half, **chunked})
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_shards_is_a_whole_model_and_resumes(stage: str, inputs: Inputs, tmp_path: Path) -> None:
    """Also where it is evaluated before its first step."""
    first = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2} if stage == "stage2" else {}
    whole = fields(stage, tmp_path / "one", inputs, **first)
    llm2clip("stage2" if stage == "lora" else stage, whole)
    half = {
        "output_dir": str(tmp_path / "two"),
        "per_device_train_batch_size": whole["per_device_train_batch_size"] // 2,
    }
    on_two_processes(stage, {**whole, **half})
    files = {path.name for path in (tmp_path / "two" / "checkpoint-2").iterdir()}
    # With LoRA, the frozen LLM is not in a checkpoint, which reads the adapter.
    assert any(name.startswith("pytorch_model_fsdp") for name in files) == (stage == "stage2")
    assert_equal(tmp_path / "one" / "checkpoint-2", tmp_path / "two" / "checkpoint-2", atol=5e-6)
    shutil.rmtree(tmp_path / "two" / "checkpoint-3")
    on_two_processes(stage, {**whole, **half}, "--resume")
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


def wrapped(model: nn.Module) -> list[str]:
    """The classes of the modules that the packaged configuration makes units of FSDP."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    plugin.set_auto_wrap_policy(model)
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, model)
    return [type(module).__name__ for module in model.modules() if is_unit(module)]


def test_fsdp_finds_the_layers_of_every_tower(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The plugin sets variables of the process.
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "false")
    text = LLM2CLIPTextModel.from_pretrained(inputs.text)
    layers = text.config.decoder_config.num_hidden_layers
    assert wrapped(text) == ["LlamaDecoderLayer"] * layers
    add_lora(text, rank=4)
    assert wrapped(text) == ["LlamaDecoderLayer"] * layers
    joint = LLM2CLIPModel.from_pretrained(joint_model(inputs, tmp_path / "model"), text_model=False)
    assert wrapped(joint) == ["EVA02Block"] * joint.config.vision_config.num_hidden_layers
    for kind, layer in [("clip_vision_model", "CLIPEncoderLayer"), ("dinov2", "Dinov2Layer")]:
        tower = tiny.joint_model(vision=tiny.other_vision_config(kind))
        assert {layer, "LlamaDecoderLayer"} <= {*wrapped(tower)}
        assert "EVA02Block" not in tower._no_split_modules
        assert {layer} <= {*wrapped(LLM2CLIPVisionModelWithProjection(tower.config))}


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version is 1; set it to 2"),
        ({"fsdp_version": 2, "ignored_modules": "text_adapter"}, "leave fsdp_ignored_modules unset"),
    ],
)
def test_what_fsdp_would_not_train_as_ddp_does_is_refused(plugin: dict[str, Any], message: str) -> None:
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin))
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)
    with pytest.raises(ValueError, match=message):
        prepare_for_fsdp(accelerator, tiny.joint_model())
