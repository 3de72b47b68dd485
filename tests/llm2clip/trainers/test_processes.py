"""The commands on several processes, with torchrun and accelerate: they equal one process with the whole batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoImageProcessor, Dinov2Model

from llm2clip.data import CaptionSource, distinct_captions
from llm2clip.store import EmbeddingCache
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.encoders.models import save_transformers
from tests.llm2clip.trainers import rows
from tests.llm2clip.trainers.stages import (
    CLI,
    GLOSS_TEST,
    PROCESSES,
    assert_equal,
    fields_of,
    launch_configuration,
    llm2clip,
    losses,
    metric,
)
from tests.processes import run_python, run_ranks

UNSAVED: dict[str, Any] = {"save_strategy": "no", "max_steps": 4}


def one_and_several(command: str, fields: dict[str, Any], processes: int) -> tuple[Path, Path]:
    """Run a stage on one process and, with the same batch, on several; their losses are equal."""
    one = Path(fields["output_dir"])
    two = one.with_name("several")
    llm2clip(command, fields)
    if "per_device_train_batch_size" in fields:
        fields = {**fields, "per_device_train_batch_size": fields["per_device_train_batch_size"] // processes}
    llm2clip(command, {**fields, "output_dir": str(two)}, processes)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    return one, two


@pytest.mark.parametrize("processes", PROCESSES)
def test_stage1_on_several_processes_equals_one(processes: int, inputs: Inputs, tmp_path: Path) -> None:
    fields = fields_of("stage1", tmp_path / "one", inputs, eval_sources={"glosses": GLOSS_TEST}, **UNSAVED)
    one, two = one_and_several("stage1", fields, processes)
    assert len(losses(one)) == 4
    assert metric(two, "eval_glosses_mean_rank") == pytest.approx(metric(one, "eval_glosses_mean_rank"), abs=0.5)


@pytest.mark.parametrize("processes", PROCESSES)
def test_lora_of_stage2_on_several_processes_equals_one(processes: int, inputs: Inputs, tmp_path: Path) -> None:
    changes = {"embedding_cache": None, "lora_rank": 4, "max_steps": 4, "save_steps": 2, "tower_chunk_size": 3}
    fields = fields_of("stage2", tmp_path / "one", inputs, **changes)
    one, two = one_and_several("stage2", fields, processes)
    assert_equal(one, two, atol=1e-4)
    # The same checkpoint goes on in one process.
    shutil.rmtree(two / "checkpoint-4")
    llm2clip("stage2", {**fields, "output_dir": str(two)}, 1, "--resume")
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)


@pytest.mark.parametrize("processes", PROCESSES)
def test_embed_and_stage2_on_several_processes_equal_one(processes: int, inputs: Inputs, tmp_path: Path) -> None:
    embedding = {
        "text_model_name_or_path": inputs.text,
        "output_dir": str(tmp_path / "cache"),
        # One source as a map and one as a stream, in a number of shards that the processes do not divide.
        "sources": [small_runs.concepts(), small_runs.concepts("validation", max_samples=40, streaming=True)],
        "shard_size": 16,
    }
    llm2clip("embed", embedding, processes)
    one_cache, two_cache = (EmbeddingCache.open(path) for path in (inputs.cache, tmp_path / "cache"))
    assert len(one_cache) == len(two_cache)
    captions = distinct_captions(CaptionSource.from_dict(small_runs.concepts()))
    torch.testing.assert_close(two_cache.lookup(captions), one_cache.lookup(captions), atol=1e-3, rtol=1e-3)
    one, two = one_and_several("stage2", fields_of("stage2", tmp_path / "one", inputs, **UNSAVED), processes)
    name = "eval_validation_text_to_image_mean_rank"
    assert metric(two, name) == pytest.approx(metric(one, name), abs=0.1)
    assert_equal(one, two, atol=1e-4)


def test_processes_agree_on_how_many_captions_may_lack_an_embedding(inputs: Inputs, tmp_path: Path) -> None:
    """Those of the second process are more than a tenth of its own, but not of all."""
    table = datasets.Dataset.from_parquet(f"{small_runs.CONCEPTS}/train.parquet").select(range(64))
    captions = [*table["caption"][:54], *(f"new {row}" for row in range(10))]
    table.map(lambda _, row: {"caption": captions[row]}, with_indices=True).to_parquet(tmp_path / "rows.parquet")
    source = {"path": str(tmp_path / "rows.parquet"), "caption_columns": ["caption", "keywords"]}
    changes = {"sources": [source], "on_error": "skip", "eval_sources": {}, "max_steps": 1, "save_strategy": "no"}
    fields = fields_of("stage2", tmp_path / "run", inputs, **changes)
    llm2clip("stage2", {**fields, "per_device_train_batch_size": 8}, 2)
    assert (tmp_path / "run" / "config.json").is_file()


# Heads on frozen towers; a closed form alone, with heads on top, and in the space of another model.
PARTS: dict[str, list[dict[str, Any]]] = {
    "frozen": [{"freeze_vision": "all", "max_steps": 4}, {"freeze_vision_layers": -1}],
    "closed form": [{"command": "align"}, {"freeze_vision": "all"}],
    "on top": [{"command": "align", "heads": "residual"}, {"freeze_vision": "all"}],
    "kept space": [{"command": "align", "keep_space_of": "clip"}, {}],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_recipe_in_parts_on_two_processes_equals_one(name: str, inputs: Inputs, tmp_path: Path) -> None:
    fields = fields_of("stage2", tmp_path / "one", inputs, **UNSAVED, vision_pooling="cls_mean", projection_dim=None)
    parts = PARTS[name]
    if name == "kept space":
        clip = str(tmp_path / "clip")
        save_transformers("clip", tmp_path / "clip")
        fields |= {"vision_model_name_or_path": clip, "vision_pooling": None}
        parts = [{**parts[0], "keep_space_of": clip}, parts[1]]
    one, two = one_and_several("stage2", {**fields, "parts": parts}, 2)
    allowed = 1e-4 if "align" not in parts[0].values() else 1e-6
    torch.testing.assert_close(similarities(two / "part1"), similarities(one / "part1"), atol=allowed, rtol=0)
    torch.testing.assert_close(similarities(two), similarities(one), atol=1e-4, rtol=0)


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
    """DDP must not wait for the unused mask token, and not for frozen layers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
    Dinov2Model(AutoConfig.for_model("dinov2", **sizes)).save_pretrained(tmp_path / "vision")
    AutoImageProcessor.from_pretrained(inputs.vision).save_pretrained(tmp_path / "vision")
    changes = {"vision_model_name_or_path": str(tmp_path / "vision"), "save_strategy": "no", "max_steps": 2}
    fields = fields_of("stage2", tmp_path / "whole", inputs, **changes)
    llm2clip("stage2", {**fields, "gradient_checkpointing": True}, 2)
    one_and_several("stage2", {**fields, "freeze_vision_layers": 1, "output_dir": str(tmp_path / "one")}, 2)


PLAIN = """
import json, sys
from pathlib import Path
from llm2clip.command_line.processes import leave_process_group, process_state
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.test_processes import evaluated

output, kind, batch, *inputs = sys.argv[1:]
found = evaluated(Inputs(*inputs), Path(output), kind, int(batch))
if process_state().is_main_process:
    Path(output, "found.json").write_text(json.dumps(found))
leave_process_group()
"""


def evaluated(inputs: Inputs, folder: Path, kind: str, batch: int) -> dict[str, Any]:
    """Train and evaluate on plain rows, in one of several processes."""
    changes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
    data = getattr(rows, kind)(rows.image_rows(32))
    trainer = rows.stage2(inputs, folder, data, **changes)
    trainer.train()
    found = {"losses": rows.logged(trainer, "loss"), **trainer.evaluate(rows.MapRows(rows.image_rows(32)[:13]))}
    # Accelerate fills a last batch with repeated rows: here those of a part of a process, and of more than one.
    few = {"stage2": trainer, "stage1": rows.stage1(inputs, folder, **changes)}
    few["mntp"] = rows.mntp(inputs, folder, mlm_probability=1.0, **changes)
    # Without random tokens, which each process draws.
    few["mntp"].data_collator.collator.mask_replace_prob = 1.0
    few["mntp"].data_collator.collator.random_replace_prob = 0.0
    texts = [{"text": "a dog runs " * (1 + n % 4)} for n in range(21)]
    of_stage = {"stage2": rows.image_rows(32)[:21], "stage1": rows.PAIRS[:21], "mntp": texts}
    for stage, data in of_stage.items():
        found[f"{stage}_loss"] = few[stage].evaluate(rows.MapRows(data))["eval_loss"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MapRows", pytest.param("IterableRows", marks=pytest.mark.nightly)])
def test_plain_data_sets_on_two_processes_equal_one(kind: str, inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    found = {}
    for name, processes, batch in [("one", 1, 16), ("two", 2, 8)]:
        (tmp_path / name).mkdir()
        paths = [inputs.llm, inputs.vision, inputs.text, inputs.cache]
        run_ranks([str(tmp_path / "plain.py"), str(tmp_path / name), kind, str(batch), *paths], processes)
        found[name] = json.loads((tmp_path / name / "found.json").read_text())
    one, two = found["one"], found["two"]
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    for name in ("eval_loss", "stage2_loss", "stage1_loss", "mntp_loss"):
        assert two[name] == pytest.approx(one[name], abs=1e-4), name


@pytest.mark.slow
def test_stage2_under_accelerate_launch_equals_one_process(inputs: Inputs, tmp_path: Path) -> None:
    fields = fields_of("stage2", tmp_path / "one", inputs, save_strategy="no", max_steps=2, eval_sources={})
    llm2clip("stage2", fields)
    launch, recipe = tmp_path / "launch.yaml", tmp_path / "two.yaml"
    launch.write_text(yaml.safe_dump({**launch_configuration("cpu_2.yaml"), "num_processes": 2, "use_cpu": True}))
    half = {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 8}
    recipe.write_text(yaml.safe_dump({**fields, **half}))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(launch), "--main_process_port", "0"]
    run_python([*launcher, *CLI, "stage2", str(recipe)])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def test_an_error_in_a_worker_process_is_one_line(inputs: Inputs, tmp_path: Path) -> None:
    changes = {"sources": [small_runs.concepts(max_samples=300)], "dataloader_num_workers": 1, "eval_sources": {}}
    # Otherwise the main process finds the captions missing first.
    fields = fields_of("stage2", tmp_path / "out", inputs, verify_cache=False, **changes)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    result = run_ranks([*CLI, "stage2", str(recipe)], check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "llm2clip stage2: error: The embedding cache" in result.stderr
