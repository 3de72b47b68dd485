"""The commands on two processes, with torchrun and accelerate, and resumed after a kill."""

from __future__ import annotations

import json
import shutil
import signal
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoImageProcessor, Dinov2Model

from llm2clip.data import CaptionSource, distinct_captions
from llm2clip.store import EmbeddingCache
from modeling_llm2clip import LLM2CLIPModel
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import TRAINING
from tests.llm2clip.trainers.test_plain_datasets import joint_model
from tests.processes import run_python, run_ranks, start_python

CLI = ["-m", "llm2clip"]
# Four processes take a minute each to start on two cores.
PROCESSES = [2, pytest.param(4, marks=[pytest.mark.slow, pytest.mark.nightly])]


def llm2clip(command: str, fields: dict[str, Any], processes: int = 1, *options: str) -> None:
    """Run the command on a recipe file."""
    recipe = Path(fields["output_dir"]).with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(fields))
    run_ranks([*CLI, command, str(recipe), *options], processes)


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def metric(folder: Path, name: str) -> float:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry][-1]


@pytest.mark.parametrize("processes", PROCESSES)
def test_stage1_on_several_processes_equals_one_with_the_whole_batch(
    processes: int, inputs: Inputs, tmp_path: Path
) -> None:
    fields = {**tiny.stage1_fields(tmp_path / "one", inputs.llm), "save_strategy": "no"}
    gloss_test = {"path": tiny.GLOSSES, "split": "test", "anchor_column": "lemmas", "positive_column": "gloss"}
    fields["eval_sources"] = {"glosses": gloss_test}
    llm2clip("stage1", {**fields, "per_device_train_batch_size": 16})
    batch = 16 // processes
    llm2clip(
        "stage1", {**fields, "output_dir": str(tmp_path / "two"), "per_device_train_batch_size": batch}, processes
    )
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6
    assert two == pytest.approx(one, abs=1e-4)
    name = "eval_glosses_mean_rank"
    assert metric(tmp_path / "two", name) == pytest.approx(metric(tmp_path / "one", name), abs=0.5)


@pytest.mark.parametrize("processes", PROCESSES)
def test_lora_of_stage2_on_several_processes_equals_one(processes: int, inputs: Inputs, tmp_path: Path) -> None:
    fields = tiny.stage2_fields(tmp_path / "one", inputs.vision, inputs.text, inputs.cache) | {"embedding_cache": None}
    fields |= {"lora_rank": 4, "max_steps": 4, "save_steps": 2, "tower_chunk_size": 3}
    llm2clip("stage2", fields)
    fields |= {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 16 // processes}
    llm2clip("stage2", fields, processes)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    one, two = (LLM2CLIPModel.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for name, value in one.text_model.state_dict().items():
        torch.testing.assert_close(two.text_model.state_dict()[name], value, atol=1e-4, rtol=0)
    # The same checkpoint goes on in one process.
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    llm2clip("stage2", {**fields, "per_device_train_batch_size": 16}, 1, "--resume")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@pytest.mark.parametrize("processes", PROCESSES)
def test_embed_and_stage2_on_several_processes_equal_one(processes: int, inputs: Inputs, tmp_path: Path) -> None:
    embedding = {
        "text_model_name_or_path": inputs.text,
        "output_dir": str(tmp_path / "cache"),
        # One source as a map and one as a stream, in a number of shards that the processes do not divide.
        "sources": [tiny.concepts(), tiny.concepts("validation", max_samples=40, streaming=True)],
        "shard_size": 16,
    }
    llm2clip("embed", embedding, processes)
    one_cache, two_cache = (EmbeddingCache.open(path) for path in (inputs.cache, tmp_path / "cache"))
    assert len(one_cache) == len(two_cache)
    captions = distinct_captions(CaptionSource.from_dict(tiny.concepts()))
    torch.testing.assert_close(two_cache.lookup(captions), one_cache.lookup(captions), atol=1e-3, rtol=1e-3)

    fields = tiny.stage2_fields(tmp_path / "one", inputs.vision, inputs.text, inputs.cache) | {"save_strategy": "no"}
    llm2clip("stage2", {**fields, "per_device_train_batch_size": 32})
    batch = 32 // processes
    llm2clip(
        "stage2", {**fields, "output_dir": str(tmp_path / "two"), "per_device_train_batch_size": batch}, processes
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    name = "eval_validation_text_to_image_mean_rank"
    assert metric(tmp_path / "two", name) == pytest.approx(metric(tmp_path / "one", name), abs=0.1)
    one, two = (
        LLM2CLIPModel.from_pretrained(tmp_path / name, text_model=False).state_dict() for name in ("one", "two")
    )
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_a_warm_start_on_two_processes_equals_one(inputs: Inputs, tmp_path: Path) -> None:
    fields = tiny.stage2_fields(tmp_path / "one", inputs.vision, inputs.text, inputs.cache) | {"save_strategy": "no"}
    fields |= {"standardize_features": True, "vision_pooling": "cls_mean", "freeze_vision_layers": -1}
    fields |= {"feature_cache": str(tmp_path / "features"), "warm_start": {"max_steps": 4}}
    llm2clip("stage2", {**fields, "per_device_train_batch_size": 32})
    llm2clip("stage2", {**fields, "output_dir": str(tmp_path / "two"), "feature_cache": str(tmp_path / "other")}, 2)
    for part in ("warm_start", "."):
        assert losses(tmp_path / "two" / part) == pytest.approx(losses(tmp_path / "one" / part), abs=1e-4)
    one, two = (next((tmp_path / name).glob("*/shard-00000.safetensors")) for name in ("features", "other"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("alignment", ["closed_form", "closed_form_then_train"])
def test_an_alignment_in_closed_form_on_two_processes_equals_one(
    alignment: str, inputs: Inputs, tmp_path: Path
) -> None:
    fields = tiny.stage2_fields(tmp_path / "one", inputs.vision, inputs.text, inputs.cache)
    fields |= {"freeze_vision": "all", "vision_pooling": "cls_mean", "alignment": alignment, "save_strategy": "no"}
    trained = alignment == "closed_form_then_train"
    unused = {"projection_dim"} if trained else {"projection_dim", "save_strategy", *TRAINING}
    fields = {name: value for name, value in fields.items() if name not in unused}
    llm2clip("stage2", fields | ({"per_device_train_batch_size": 32} if trained else {}))
    llm2clip("stage2", {**fields, "output_dir": str(tmp_path / "two")}, 2)
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("closed_form_ridge", "closed_form_width", "closed_form_mean_recall"):
        assert metric(two, name) == metric(one, name)
    assert len(losses(one)) == (6 if trained else 0)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    found, expected = similarities(two), similarities(one)
    torch.testing.assert_close(found, expected, atol=1e-4 if trained else 1e-6, rtol=0)


def similarities(folder: Path) -> torch.Tensor:
    """Of random captions and images that a trained model has never seen."""
    model = LLM2CLIPModel.from_pretrained(folder, text_model=False).eval().double()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, model.config.vision_width, generator=generator).double()
    texts = torch.randn(50, model.config.text_config.hidden_size, generator=generator).double()
    with torch.no_grad():
        output = model(vision_features=images, llm_embeds=texts)
    return output.text_embeds @ output.image_embeds.T


@pytest.mark.slow
@pytest.mark.nightly
def test_two_processes_train_dinov2_with_checkpointing(inputs: Inputs, tmp_path: Path) -> None:
    """DDP must not wait for the unused mask token; both processes compute the frozen states."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
    Dinov2Model(AutoConfig.for_model("dinov2", **sizes)).save_pretrained(tmp_path / "vision")
    AutoImageProcessor.from_pretrained(inputs.vision).save_pretrained(tmp_path / "vision")
    fields = tiny.stage2_fields(tmp_path / "whole", str(tmp_path / "vision"), inputs.text, inputs.cache)
    fields |= {"save_strategy": "no", "max_steps": 2, "gradient_checkpointing": True}
    llm2clip("stage2", fields, 2)
    frozen = {
        "freeze_vision_layers": 1,
        "frozen_states_dir": str(tmp_path / "states"),
        "gradient_checkpointing": False,
    }
    llm2clip("stage2", {**fields, **frozen, "output_dir": str(tmp_path / "two")}, 2)
    shutil.move(tmp_path / "states", tmp_path / "states-of-two")
    one = {"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 32}
    llm2clip("stage2", {**fields, **frozen, **one})
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


EVALUATED = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from llm2clip import LLM2CLIPTextModel, MNTPConfig, MNTPTrainer, Stage1Config, Stage1Trainer
from llm2clip.utils.processes import leave_process_group, process_state
from tests.llm2clip.trainers.test_plain_datasets import MapRows, settings

llm, text, output, batch = sys.argv[1:]
shared = settings(output, per_device_eval_batch_size=int(batch))

def loss(trainer, rows):
    return trainer.evaluate(MapRows(rows))["eval_loss"]

tokenizer = AutoTokenizer.from_pretrained(text)
pairs = [{"anchor": f"word {n}", "positive": f"meaning {n * n}", "negative": f"other {n}"} for n in range(21)]
model = LLM2CLIPTextModel.from_pretrained(text)
found = {"stage1": loss(Stage1Trainer(model=model, args=Stage1Config(**shared), processing_class=tokenizer), pairs)}

language_model = AutoModelForCausalLM.from_pretrained(llm)
texts = [{"text": "a dog runs " * (1 + n % 4)} for n in range(21)]
found["mntp"] = loss(MNTPTrainer(
    head=language_model.get_output_embeddings(),
    model=LLM2CLIPTextModel.from_decoder(language_model.base_model),
    args=MNTPConfig(**shared, mlm_probability=1.0, mask_replace_prob=1.0, random_replace_prob=0.0),
    processing_class=AutoTokenizer.from_pretrained(llm),
), texts)
if process_state().is_main_process:
    Path(output, "found.json").write_text(json.dumps(found))
leave_process_group()
"""


@pytest.mark.slow
def test_evaluation_losses_on_two_processes_equal_one(inputs: Inputs, tmp_path: Path) -> None:
    """Of 21 rows, a last batch of 16 has 5; accelerate fills it for both processes."""
    (tmp_path / "evaluated.py").write_text(EVALUATED)
    found = {}
    for name, processes, batch in [("one", 1, 16), ("two", 2, 8)]:
        script = [str(tmp_path / "evaluated.py"), inputs.llm, inputs.text, str(tmp_path / name), str(batch)]
        run_ranks(script, processes)
        found[name] = json.loads((tmp_path / name / "found.json").read_text())
    assert found["two"] == pytest.approx(found["one"], abs=1e-5)


PLAIN = """
import json, sys
from pathlib import Path
from llm2clip import LLM2CLIPModel, Stage2Config, Stage2Trainer
from llm2clip.utils.processes import leave_process_group
from tests.llm2clip.trainers.test_plain_datasets import IterableRows, MapRows, image_rows, settings

model, output, batch, kind = sys.argv[1:]
model = LLM2CLIPModel.from_pretrained(model, text_model=False)
rows = image_rows(model.config.text_config.hidden_size)
batches = {"per_device_train_batch_size": int(batch), "per_device_eval_batch_size": int(batch)}
args = Stage2Config(**settings(output, max_steps=4, save_strategy="no", **batches))
data = {"MapRows": MapRows, "IterableRows": IterableRows}[kind](rows)
trainer = Stage2Trainer(model=model, args=args, train_dataset=data, eval_dataset=MapRows(rows[:13]))
trainer.train()
metrics = trainer.evaluate()
# Accelerate fills a last batch with repeated rows: here those of a part of a process, and of more than one.
metrics["few_loss"] = trainer.evaluate(MapRows(rows[:21]))["eval_loss"]
found = {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], **metrics}
if trainer.is_world_process_zero():
    Path(output, "found.json").write_text(json.dumps(found))
del trainer
leave_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MapRows", pytest.param("IterableRows", marks=pytest.mark.nightly)])
def test_plain_data_sets_on_two_processes_equal_one(kind: str, inputs: Inputs, tmp_path: Path) -> None:
    model = joint_model(inputs, tmp_path / "model")
    (tmp_path / "plain.py").write_text(PLAIN)
    found = {}
    for name, processes, batch in [("one", 1, 16), ("two", 2, 8)]:
        script = [str(tmp_path / "plain.py"), model, str(tmp_path / name), str(batch), kind]
        run_ranks(script, processes)
        found[name] = json.loads((tmp_path / name / "found.json").read_text())
    one, two = found["one"], found["two"]
    assert len(one["losses"]) == 4
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert two["eval_num_texts"] == one["eval_num_texts"] == 13
    for metric_name in ("eval_loss", "few_loss", "eval_text_to_image_mean_rank"):
        assert two[metric_name] == pytest.approx(one[metric_name], abs=1e-4)


def accelerate_launch(command: str, fields: dict[str, Any], config: dict[str, Any]) -> None:
    """Run the command under `accelerate launch` on two processes of the CPU."""
    launch = Path(fields["output_dir"]).with_suffix(".launch.yaml")
    launch.write_text(yaml.safe_dump({**config, "num_processes": 2, "use_cpu": True}))
    recipe = Path(fields["output_dir"]).with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(fields))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(launch), "--main_process_port", "0"]
    run_python([*launcher, *CLI, command, str(recipe)])


def launch_configuration(name: str) -> dict[str, Any]:
    return yaml.safe_load((files("llm2clip.recipes") / "accelerate" / name).read_text())


@pytest.mark.slow
def test_stage2_under_accelerate_launch_equals_one_process(inputs: Inputs, tmp_path: Path) -> None:
    fields = tiny.stage2_fields(tmp_path / "one", inputs.vision, inputs.text, inputs.cache)
    fields |= {"save_strategy": "no", "max_steps": 2, "eval_sources": {}}
    llm2clip("stage2", {**fields, "per_device_train_batch_size": 32})
    accelerate_launch("stage2", {**fields, "output_dir": str(tmp_path / "two")}, launch_configuration("cpu_2.yaml"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def test_an_error_in_a_worker_process_is_one_line(inputs: Inputs, tmp_path: Path) -> None:
    fields = tiny.stage2_fields(tmp_path / "out", inputs.vision, inputs.text, inputs.cache)
    fields |= {"sources": [tiny.concepts(max_samples=300)], "dataloader_num_workers": 1, "eval_sources": {}}
    fields["verify_cache"] = False  # otherwise the main process finds the captions missing first
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    result = run_ranks([*CLI, "stage2", str(recipe)], check=False)
    assert result.code == 2
    assert "Traceback" not in result.errors
    assert "llm2clip stage2: error: The embedding cache" in result.errors


@pytest.mark.slow
def test_a_killed_and_resumed_stage2_ends_with_the_same_parameters(inputs: Inputs, tmp_path: Path) -> None:
    fields = tiny.stage2_fields(tmp_path / "unbroken", inputs.vision, inputs.text, inputs.cache)
    fields |= {"max_steps": 40, "save_steps": 5, "save_total_limit": 2, "eval_sources": {}}
    llm2clip("stage2", fields)
    broken = tmp_path / "broken"
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(yaml.safe_dump({**fields, "output_dir": str(broken)}))
    process = start_python([*CLI, "stage2", str(recipe)])
    deadline = time.monotonic() + 120
    while not (broken / "checkpoint-10" / "trainer_state.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (broken / "model.safetensors").exists()
    llm2clip("stage2", {**fields, "output_dir": str(broken)}, 1, "--resume")
    folders = (tmp_path / "unbroken", broken)
    unbroken, resumed = (LLM2CLIPModel.from_pretrained(path, text_model=False).state_dict() for path in folders)
    for key, value in unbroken.items():
        torch.testing.assert_close(resumed[key], value, atol=1e-6, rtol=0)
