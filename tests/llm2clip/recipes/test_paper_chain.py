"""The paper's recipes as they are packaged, one after the other, on two processes in bfloat16."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from llm2clip.recipes import find_recipe, load_recipe
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import small_runs, tiny
from tests.processes import run_python
from tests.tars import write_tar

LAUNCH = resources.files("llm2clip.recipes") / "accelerate" / "cpu_2.yaml"
# Of two processes together: twice the batch.
ROWS, BATCH, STEPS = 96, 8, 2
SMALL = {"max_steps": STEPS, "logging_steps": 1, "per_device_train_batch_size": BATCH, "report_to": "none"}


def columns_of(recipe: str, source: int = 0) -> list[str]:
    return load_recipe(find_recipe(recipe))["sources"][source]["caption_columns"]


def texts(row: int, columns: list[str]) -> dict[str, str]:
    # Long enough for a batch of MNTP, whose rows are blocks of 512 tokens.
    return {name: f"{name} of picture {row}: " + "a small dog walks on a bridge. " * 8 for name in columns}


def write_data(folder: Path) -> None:
    """Write what the recipes name, at the places that they name."""
    for name, columns in (("captions", columns_of("mntp", 1)), ("dreamlip", columns_of("stage1_paper"))):
        (folder / "data" / name).mkdir(parents=True)
        with (folder / "data" / name / "part-0.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(texts(row, columns) for row in range(ROWS))
    (folder / "data" / "text_pairs").mkdir()
    with (folder / "data" / "text_pairs" / "part-0.jsonl").open("w") as file:
        for row in range(ROWS):
            pair = {"query": f"question {row}", "positive": f"answer {row}", "negative": f"no answer {row}"}
            file.write(f"{json.dumps(pair)}\n")
    image = io.BytesIO()
    Image.effect_noise((40, 30), 80).convert("RGB").save(image, "JPEG")
    for tar in range(4):
        files = []
        for row in range(tar * ROWS // 4, (tar + 1) * ROWS // 4):
            captions = {
                name.removeprefix("json."): text for name, text in texts(row, columns_of("stage2_paper")).items()
            }
            files += [(f"{row:05}.jpg", image.getvalue()), (f"{row:05}.json", json.dumps(captions).encode())]
        write_tar(folder / "data" / "cc3m" / f"{tar:05}.tar", files)


def save_clip(folder: Path) -> str:
    """Save a CLIP model with its image processor: the recipe keeps the logit scale of one."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**vision, "image_size": 28, "patch_size": 14}, text_config={"vocab_size": 500, **vision}
    )
    CLIPModel(config).save_pretrained(folder)
    tiny.processor().image_processor.save_pretrained(folder)
    return str(folder)


def launch(folder: Path, command: str, recipe: str, **changes: object) -> None:
    options = [part for name, value in changes.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCH), "--main_process_port", "0"]
    arguments = [*launcher, "-m", "llm2clip", command, recipe, *options]
    run_python(arguments, folder=folder, PYTHONPATH=os.pathsep.join(sys.path))


@pytest.mark.slow
def test_the_papers_recipes_run_one_after_the_other(tmp_path: Path) -> None:
    """Changed are models, number of steps and rows in a batch, and flash attention, which a CPU does not have."""
    write_data(tmp_path)
    llm, vision = small_runs.save_llm(tmp_path / "llm"), save_clip(tmp_path / "vision")
    # The other source of MNTP is on the Hub.
    captions = json.dumps(load_recipe(find_recipe("mntp"))["sources"][1:])
    launch(tmp_path, "mntp", "mntp", model_name_or_path=llm, sources=captions, **SMALL)
    sdpa = {"attn_implementation": "sdpa"}
    launch(tmp_path, "stage1", "stage1_paper", model_name_or_path="runs/mntp", warmup_steps=0, **sdpa, **SMALL)
    launch(tmp_path, "embed", "embed_paper", **sdpa)
    launch(tmp_path, "stage2", "stage2_paper", vision_model_name_or_path=vision, **SMALL)
    for stage in ("mntp", "stage1", "stage2"):
        log = json.loads((tmp_path / "runs" / stage / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert len(losses) == STEPS, stage
        assert all(map(math.isfinite, losses)), stage
    model = LLM2CLIPModel.from_pretrained(tmp_path / "runs" / "stage2")
    embeds = model.encode_text(["caption 1", "caption 2"], tiny.processor())
    assert embeds.shape == (2, load_recipe(find_recipe("stage2_paper"))["projection_dim"])
    assert torch.isfinite(embeds).all()
