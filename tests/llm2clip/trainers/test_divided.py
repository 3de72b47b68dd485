"""Models that FSDP2 and DeepSpeed divide over two processes train as one process does with the whole batch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import Tensor, nn

from llm2clip.trainers.lora import add_lora
from llm2clip.trainers.sharding import give_scalars_a_dimension, with_scalars
from llm2clip.trainers.stage1_config import Stage1Recipe
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers import gloo_as_gpus
from tests.llm2clip.trainers.test_plain_datasets import joint_model
from tests.llm2clip.trainers.test_processes import CLI, launch_configuration, llm2clip, losses, metric
from tests.processes import run_python

NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install --no-build-isolation deepspeed (after torch)",
)
CONFIGURATIONS = [
    "fsdp.yaml",
    *(
        pytest.param(f"deepspeed_zero{stage}.yaml", marks=[NEEDS_DEEPSPEED, pytest.mark.nightly])
        for stage in (1, 2, 3)
    ),
]
# `lora`: stage 2 with LoRA on the LLM.
STAGES = [pytest.param("stage1", marks=pytest.mark.nightly), "stage2", "lora"]


# FSDP2 on CPUs, which nobody trains with, once in a while ends within a thread of gloo that calls malloc.
IN_GLOO = "(SIGSEGV)"


def fields_of(stage: str, folder: Path, inputs: Inputs) -> dict[str, Any]:
    if stage == "stage1":
        fields = tiny.stage1_fields(folder, inputs.llm)
    else:
        fields = tiny.stage2_fields(folder, inputs.vision, inputs.text, inputs.cache)
        fields |= {"embedding_cache": None, "lora_rank": 4} if stage == "lora" else {}
    return {**fields, "max_steps": 3, "save_steps": 2}


def on_two_processes(stage: str, fields: dict[str, Any], configuration: str, *options: str) -> None:
    """Run a stage under `accelerate launch` with a packaged configuration, on two processes of the CPU."""
    launch, recipe = (Path(fields["output_dir"]).with_suffix(end) for end in (".launch.yaml", ".yaml"))
    launch.write_text(yaml.safe_dump({**launch_configuration(configuration), "num_processes": 2, "use_cpu": True}))
    recipe.write_text(yaml.safe_dump(fields))
    command = [gloo_as_gpus.__file__] if configuration == "fsdp.yaml" else CLI
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(launch), "--main_process_port", "0"]
    environment = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [*launcher, *command, "stage2" if stage == "lora" else stage, str(recipe), *options]
    done = run_python(arguments, check=False, **environment)
    if IN_GLOO in done.stderr:
        if "--resume" not in options:
            shutil.rmtree(fields["output_dir"])
        done = run_python(arguments, check=False, **environment)
    assert done.returncode == 0, done.stderr[-4000:]


def weights(stage: str, folder: Path) -> dict[str, Tensor]:
    if stage == "stage1":
        return LLM2CLIPTextModel.from_pretrained(folder).state_dict()
    return LLM2CLIPModel.from_pretrained(folder, text_model=stage == "lora").state_dict()


def assert_equal_runs(stage: str, one: Path, two: Path) -> None:
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    expected, actual = weights(stage, one), weights(stage, two)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=5e-6, rtol=0, msg=name)
    if stage != "stage1":
        name = "eval_validation_text_to_image_mean_rank"
        assert metric(two, name) == pytest.approx(metric(one, name), abs=0.1)


# Of stage 2, the next test has what this one has.
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", pytest.param("stage2", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_two_processes_with_a_part_of_the_model_each_equal_one_with_all_of_it(
    configuration: str, stage: str, inputs: Inputs, tmp_path: Path
) -> None:
    fields = fields_of(stage, tmp_path / "one", inputs)
    llm2clip(stage, {**fields, "per_device_train_batch_size": 2 * fields["per_device_train_batch_size"]})
    on_two_processes(stage, {**fields, "output_dir": str(tmp_path / "two")}, configuration)
    assert_equal_runs(stage, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_shards_is_a_whole_model_and_resumes(stage: str, inputs: Inputs, tmp_path: Path) -> None:
    fields = fields_of(stage, tmp_path / "one", inputs)
    whole_batch = {**fields, "per_device_train_batch_size": 2 * fields["per_device_train_batch_size"]}
    llm2clip("stage2" if stage == "lora" else stage, whole_batch)
    fields["output_dir"] = str(tmp_path / "two")
    on_two_processes(stage, fields, "fsdp.yaml")
    files = {path.name for path in (tmp_path / "two" / "checkpoint-2").iterdir()}
    # With LoRA, the frozen LLM is not in a checkpoint, which reads the adapter.
    assert any(name.startswith("pytorch_model_fsdp") for name in files) == (stage == "stage2")
    saved, whole = (weights(stage, tmp_path / name / "checkpoint-2") for name in ("two", "one"))
    for name, value in whole.items():
        torch.testing.assert_close(saved[name], value, atol=5e-6, rtol=0, msg=name)
    shutil.rmtree(tmp_path / "two" / "checkpoint-3")
    on_two_processes(stage, fields, "fsdp.yaml", "--resume")
    assert_equal_runs(stage, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_divided_model_is_evaluated_before_its_first_step(inputs: Inputs, tmp_path: Path) -> None:
    changes = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    fields = fields_of("stage2", tmp_path / "one", inputs) | changes
    llm2clip("stage2", {**fields, "per_device_train_batch_size": 2 * fields["per_device_train_batch_size"]})
    on_two_processes("stage2", {**fields, "output_dir": str(tmp_path / "two")}, "fsdp.yaml")
    assert_equal_runs("stage2", tmp_path / "one", tmp_path / "two")
    first = [json.loads((tmp_path / n / "trainer_state.json").read_text())["log_history"][0] for n in ("one", "two")]
    assert first[0] == pytest.approx(first[1], abs=1e-6)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("stage", ["stage1", "stage2", "lora"])
@pytest.mark.parametrize("configuration", [CONFIGURATIONS[0], CONFIGURATIONS[2]])
def test_chunks_and_accumulation_of_a_divided_model_equal_whole_batches(
    configuration: str, stage: str, inputs: Inputs, tmp_path: Path
) -> None:
    fields = fields_of(stage, tmp_path / "one", inputs) | {"save_strategy": "no", "gradient_accumulation_steps": 2}
    command = "stage2" if stage == "lora" else stage
    llm2clip(command, {**fields, "per_device_train_batch_size": 2 * fields["per_device_train_batch_size"]})
    on_two_processes(stage, {**fields, "output_dir": str(tmp_path / "two"), "tower_chunk_size": 3}, configuration)
    assert_equal_runs(stage, tmp_path / "one", tmp_path / "two")


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
    add_lora(text, Stage1Recipe(output_dir=str(tmp_path), model_name_or_path=inputs.text, lora_rank=4))
    assert wrapped(text) == ["LlamaDecoderLayer"] * layers
    joint = LLM2CLIPModel.from_pretrained(joint_model(inputs, tmp_path / "model"), text_model=False)
    assert wrapped(joint) == ["EVA02Block"] * joint.config.vision_config.num_hidden_layers


def test_scalars_are_vectors_while_they_are_divided(inputs: Inputs, tmp_path: Path) -> None:
    model = LLM2CLIPModel.from_pretrained(joint_model(inputs, tmp_path / "model"), text_model=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    give_scalars_a_dimension(model)
    assert all(parameter.ndim > 0 for parameter in model.parameters())
    after = with_scalars(model.state_dict())
    assert {name: value.shape for name, value in after.items()} == {name: x.shape for name, x in before.items()}
    assert after["logit_scale"].equal(before["logit_scale"])
