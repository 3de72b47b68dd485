"""What every stage promises: results that load, runs that resume as if unbroken, refusals before the first step."""

from __future__ import annotations

import math
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import AutoModel, AutoProcessor, AutoTokenizer, LlamaForCausalLM

from llm2clip.command_line.settings import build_config
from llm2clip.data import table_identity
from llm2clip.files.atomic import read_json
from llm2clip.files.manifests import FOLDER_MANIFEST
from llm2clip.recipes import find_recipe, load_recipe
from llm2clip.trainers import sharding
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.run_state import INPUTS, read_run_state
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage1_trainer import Stage1Trainer
from llm2clip.trainers.stage2_config import Stage2Recipe
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import (
    CLI,
    GLOSS_TEST,
    RECIPES,
    assert_equal,
    fields_of,
    interrupt,
    launch_configuration,
    run,
    steps,
    weights,
)
from tests.processes import run_python


@pytest.mark.parametrize("stage", RECIPES)
def test_a_finished_run_is_not_overwritten_and_resumes_without_a_further_step(
    stage: str, inputs: Inputs, tmp_path: Path
) -> None:
    folder, copy, changes = tmp_path / "run", tmp_path / "copy", {"max_steps": 2, "save_steps": 1}
    run(stage, folder, inputs, **changes)
    with pytest.raises(FileExistsError, match=r"already contains a run \(checkpoint-2\); add --resume"):
        run(stage, folder, inputs, **changes)
    with pytest.raises(ValueError, match=r"other settings \(.*learning_rate: .*--resume-anyway"):
        run(stage, folder, inputs, resume=True, **{**changes, "learning_rate": 1e-2})
    shutil.copytree(folder, copy)
    # Killed while it saved its result, and then while it saved its last checkpoint.
    for lost in ("model.safetensors", "checkpoint-2/trainer_state.json"):
        (folder / "model.safetensors").unlink()
        (folder / lost).unlink(missing_ok=True)
        run(stage, folder, inputs, resume=True, **changes)
        assert_equal(copy, folder)
        assert (steps(folder), read_json(folder / "trainer_state.json")["global_step"]) == ([1, 2], 2)
    for step in (1, 2):
        shutil.rmtree(folder / f"checkpoint-{step}")
    saved = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    for resume in (False, True):
        with pytest.raises(
            FileExistsError, match=r"contains a finished run without a whole checkpoint.* another output_dir"
        ):
            run(stage, folder, inputs, resume=resume, **changes)
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == saved
    (folder / FOLDER_MANIFEST).unlink()  # as a run that is killed while it saves its result
    with pytest.raises(FileExistsError, match=r"a run \(model.safetensors\); add --resume to begin it again"):
        run(stage, folder, inputs, **changes)
    run(stage, folder, inputs, resume=True, **changes)


def data_of(stage: str, path: Path, rows: int) -> dict[str, Any]:
    """Write the data of a stage, and return its source."""
    if stage == "stage2":
        table = datasets.load_dataset(
            "parquet", data_files=f"{small_runs.CONCEPTS}/train.parquet", split=f"train[:{rows}]"
        )
        table.to_parquet(path)
        return {"path": str(path), "caption_columns": ["caption", "keywords"]}
    small_runs.write_text_pairs(path, rows)
    return {"path": str(path), **({"anchor_column": "short", "positive_column": "long"} if stage == "stage1" else {})}


@pytest.mark.parametrize("stage", RECIPES)
def test_changed_data_is_refused_or_accepted(stage: str, inputs: Inputs, tmp_path: Path) -> None:
    folder, data = tmp_path / "run", tmp_path / "rows.parquet"
    source = data_of(stage, data, 40)
    if stage in ("mntp", "distill"):
        source["caption_columns"] = ["short", "long"]
    changes = {"sources": [source], "max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 4}
    run(stage, folder, inputs, **changes)
    before = read_run_state(folder / "checkpoint-1")[INPUTS]
    data_of(stage, data, 36)
    more = {**changes, "max_steps": 2}
    with pytest.raises(ValueError, match=r"checkpoint-1 had other inputs \(rows of the training data: .*any"):
        run(stage, folder, inputs, resume=True, **changes)
    with pytest.raises(ValueError, match="started with other settings"):
        run(stage, folder, inputs, resume=True, **more)
    run(stage, folder, inputs, resume=True, **more, resume_anyway=True)
    after = read_run_state(folder / "checkpoint-2")[INPUTS]
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"rows of the training data", "content of the training data"}


def test_a_moved_llm_is_the_same_run_and_another_one_in_its_place_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    llm = str(shutil.copytree(inputs.llm, tmp_path / "llm"))
    changes = {"max_steps": 1, "save_steps": 1}
    run("stage1", tmp_path / "run", inputs, model_name_or_path=llm, **changes)
    moved = {**changes, "model_name_or_path": inputs.llm, "logging_steps": 3}
    run("stage1", tmp_path / "run", inputs, resume=True, **moved)
    model = LlamaForCausalLM.from_pretrained(llm)
    model.model.layers[1].mlp.up_proj.weight.data += 1e-3
    model.save_pretrained(llm)
    with pytest.raises(ValueError, match=r"other inputs \(frozen weights: \w+ -> \w+\)"):
        run("stage1", tmp_path / "run", inputs, resume=True, model_name_or_path=llm, **changes)


def test_a_checkpoint_is_compared_with_the_settings_that_it_was_trained_with(inputs: Inputs, tmp_path: Path) -> None:
    changes = {"max_steps": 2, "save_steps": 1}
    run("stage1", tmp_path, inputs, **changes)
    # It starts again from an earlier checkpoint, and is killed before its own first one.
    branch = {**changes, "learning_rate": 1e-4, "resume_anyway": True}
    branch["resume_from_checkpoint"] = str(tmp_path / "checkpoint-1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage1Trainer, "training_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("stage1", tmp_path, inputs, **branch)
    with pytest.raises(ValueError, match=r"checkpoint-2 was started with other settings \(.*learning_rate: 0.005 -> "):
        run("stage1", tmp_path, inputs, resume=True, **{**changes, "learning_rate": 1e-4})


@pytest.mark.parametrize("stage", ["mntp", "stage1", "stage2"])
def test_results_and_checkpoints_load_with_auto_classes_and_are_measured(
    stage: str, inputs: Inputs, tmp_path: Path
) -> None:
    sets = {} if stage == "stage2" else {"eval_sources": {"glosses": GLOSS_TEST}}
    changes = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 3, "report_to": "tensorboard", **sets}
    metrics = run(stage, tmp_path, inputs, **changes)
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    if stage == "stage2":
        assert 0 <= metrics["eval_validation_text_to_image_recall@10"] <= 1
    else:
        assert metrics["eval_glosses_num_targets"] == 100
    code = "modeling_llm2clip.py" if stage == "stage2" else "modeling_llm2clip_text.py"
    found = []
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        assert (folder / code).exists()
        # A checkpoint with LoRA is its adapter, a result is whole.
        is_adapter = folder != tmp_path and stage != "stage2"
        assert (folder / "adapter_model.safetensors").exists() == is_adapter
        assert (folder / "model.safetensors").exists() != is_adapter
        model = AutoModel.from_pretrained(folder).eval()
        texts = ["a dog", "a cat"]
        if stage == "stage2":
            found.append(model.encode_text(texts, AutoProcessor.from_pretrained(folder)))
        else:
            found.append(model.encode(texts, AutoTokenizer.from_pretrained(folder)))
    assert found[0].sub(found[1]).abs().max() < 1e-5


@pytest.mark.parametrize("stage", ["stage1", "stage2", "distill"])
def test_the_best_checkpoint_is_the_result(stage: str, inputs: Inputs, tmp_path: Path) -> None:
    # By a measure that is not best in the last checkpoint.
    concepts = small_runs.concepts("validation", caption_columns=["caption"], max_samples=20)
    name, own = {
        "stage1": ("glosses_recall@10", {"lora_rank": 0, "eval_sources": {"glosses": GLOSS_TEST}}),
        # Its weights have other names in files than in transformers 5.23.
        "stage2": (
            "validation_text_to_image_mean_rank",
            {"vision_model_name_or_path": small_runs.save_dinov2_tower(tmp_path / "vision")},
        ),
        "distill": ("concepts_cosine", {"eval_sources": {"concepts": concepts}}),
    }[stage]
    best = {"metric_for_best_model": f"eval_{name}", "greater_is_better": True, "load_best_model_at_end": True}
    run(stage, tmp_path / "run", inputs, eval_strategy="steps", eval_steps=3, **best, **own)
    chosen = Path(read_json(tmp_path / "run" / "trainer_state.json")["best_model_checkpoint"])
    assert chosen.name == "checkpoint-3"
    assert_equal(chosen, tmp_path / "run")
    assert any(not value.equal(weights(chosen)[key]) for key, value in weights(tmp_path / "run/checkpoint-6").items())


@pytest.mark.parametrize(
    ("stage", "changes", "allowed"),
    [("mntp", {"dtype": "bfloat16", "bf16": True}, 0.01), ("stage1", {"bf16": True}, 0.05)],
    ids=["mntp-16-bit-weights", "stage1"],
)
def test_training_in_16_bit_is_near_float32(
    stage: str, changes: dict[str, Any], allowed: float, inputs: Inputs, tmp_path: Path
) -> None:
    shared = {"max_steps": 2, "save_strategy": "no"}
    full = run(stage, tmp_path / "full", inputs, **shared)["train_loss"]
    half = run(stage, tmp_path / "half", inputs, **shared, **changes)["train_loss"]
    assert half != full
    assert half == pytest.approx(full, rel=allowed)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        *(
            (config, {name: math.nan}, f"{name} is nan")
            for config in (MNTPRecipe, Stage1Recipe, Stage2Recipe)
            for name in ("learning_rate", "max_grad_norm")
        ),
        (Stage1Recipe, {"learning_rate": math.inf}, "learning_rate is inf"),
        (Stage1Recipe, {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        (Stage1Recipe, {"max_steps": 0}, "max_steps is 0"),
        (Stage1Recipe, {"enable_jit_checkpoint": True}, "enable_jit_checkpoint is True, but SIGTERM"),
        (Stage1Recipe, {"tower_chunk_size": 0}, "tower_chunk_size must be at least 1"),
        (Stage2Recipe, {"projection_dim": 0}, "projection_dim must be at least 1"),
        (MNTPRecipe, {"block_size": 1}, "block_size must be at least 2"),
        (MNTPRecipe, {"mlm_probability": 0.0}, "mlm_probability must be above 0"),
    ],
)
def test_a_number_out_of_range_is_refused(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(config, {"use_cpu": True, **fields})


def test_gradients_may_be_unlimited_and_a_share_of_the_steps_as_warm_up_leaves_one_after_it() -> None:
    config = build_config(Stage2Recipe, {"use_cpu": True, "max_grad_norm": math.inf, "warmup_steps": 0.3})
    assert config.max_grad_norm == math.inf
    assert [config.get_warmup_steps(steps) for steps in (1, 2, 3, 16)] == [0, 1, 1, 5]


@pytest.mark.parametrize("schedule", ["linear", "constant_with_warmup", "cosine"])
def test_a_warm_up_as_long_as_the_run_is_refused_with_every_schedule(
    schedule: str, inputs: Inputs, tmp_path: Path
) -> None:
    changes = {"lr_scheduler_type": schedule, "max_steps": 4, "warmup_steps": 4}
    for stage in ("stage1", "stage2"):
        with pytest.raises(ValueError, match="has 4 of 4 optimizer steps; lower warmup_steps"):
            run(stage, tmp_path / stage, inputs, **changes)


def test_stage_1_trains_on_few_pairs_with_its_defaults() -> None:
    config = build_config(Stage1Recipe, {"use_cpu": True})
    config.check_length(400)
    assert config.get_warmup_steps(6) == 1
    assert load_recipe(find_recipe("stage1_paper"))["warmup_steps"] == 300


def test_a_run_that_ends_with_an_error_leaves_no_thread_that_reads(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's exit may abort the process in the middle of one."""
    folder = tmp_path / "rows"
    folder.mkdir()
    small_runs.rows_of_concepts(":20", "validation").to_parquet(folder / "validation.parquet")
    for number in range(200):
        (folder / f"{number}.note").touch()
    monkeypatch.setattr(table_identity, "_add_ends", lambda *_: time.sleep(0.1))
    sets = {"validation": {"path": str(folder), "split": "validation", "caption_columns": ["caption"]}}
    frozen = {"freeze_vision": "all", "per_device_train_batch_size": 512}
    with pytest.raises(ValueError, match="fewer rows than one batch of 512"):
        run("stage2", tmp_path / "run", inputs, eval_sources=sets, **frozen)
    assert [thread.name for thread in threading.enumerate() if "_read" in thread.name] == []


@pytest.mark.parametrize(
    ("fields", "num_rows", "message"),
    [
        ({}, 7, r"fewer rows than one batch of 8 \(7\); lower"),
        ({"warmup_steps": 2, "gradient_accumulation_steps": 2}, 31, "has 2 of 2 optimizer steps; lower warmup_steps"),
        ({"warmup_steps": 5, "max_steps": 4}, 1000, "has 5 of 4 optimizer steps"),
    ],
)
def test_rows_that_are_too_few_for_the_settings(fields: dict[str, Any], num_rows: int, message: str) -> None:
    common = {"use_cpu": True, "per_device_train_batch_size": 8, "num_train_epochs": 1}
    config = build_config(Stage2Recipe, {**common, **fields})
    with pytest.raises(ValueError, match=message):
        config.check_length(num_rows)


@pytest.mark.parametrize("stage", RECIPES)
def test_fsdp_that_accelerate_does_not_give_is_refused_before_anything_is_loaded(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ValueError, match=r"the launch \(ACCELERATE_USE_FSDP=true\) asks for FSDP.*1 process on CPU"):
        run(stage, tmp_path / "run", Inputs(*["no folder"] * 4))
    assert not (tmp_path / "run").exists()


def test_what_shards_a_model_is_refused_as_a_setting_and_where_accelerate_ignores_it(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="the setting fsdp asks for FSDP"):
        run("stage1", tmp_path / "run", inputs, fsdp="full_shard")
    run("stage1", tmp_path / "run", inputs, max_steps=1)
    assert AcceleratorState._shared_state, "a run that asks for nothing is not refused"
    deepspeed = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr(sharding, "PartialState", lambda: deepspeed)
    with pytest.raises(ValueError, match="the launch asks for DeepSpeed; models are sharded by FSDP2 here"):
        run("stage1", tmp_path / "other", inputs)


@pytest.mark.slow
def test_two_processes_on_the_cpu_are_told_in_one_line_that_fsdp_needs_gpus(inputs: Inputs, tmp_path: Path) -> None:
    launch, recipe = tmp_path / "launch.yaml", tmp_path / "recipe.yaml"
    launch.write_text(yaml.safe_dump({**launch_configuration("fsdp.yaml"), "num_processes": 2, "use_cpu": True}))
    recipe.write_text(yaml.safe_dump(fields_of("stage1", tmp_path / "run", inputs)))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(launch), "--main_process_port", "0"]
    result = run_python([*launcher, *CLI, "stage1", str(recipe)], check=False)
    assert result.returncode != 0
    assert "llm2clip stage1: error: the launch (ACCELERATE_USE_FSDP=true) asks for FSDP" in result.stderr
    assert "here are 2 processes on CPU" in result.stderr
    assert "loss" not in result.stdout
