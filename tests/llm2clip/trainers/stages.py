"""What the tests of the trainers share: stages from their settings, as commands run them, and what a run leaves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from llm2clip.command_line.settings import build_config
from llm2clip.encoders import embed
from llm2clip.models.new_model import from_vision_text_pretrained
from llm2clip.trainers import run_distill, run_mntp, run_stage1, run_stage2
from llm2clip.trainers.base_trainer import StageTrainer
from llm2clip.trainers.distill_config import DistillRecipe
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs
from tests.processes import run_ranks
from tests.tars import write_tar

CLI = ["-m", "llm2clip"]
RECIPES: dict[str, tuple[Callable[..., Any], Any]] = {
    "mntp": (run_mntp.run, MNTPRecipe),
    "stage1": (run_stage1.run, Stage1Recipe),
    "stage2": (run_stage2.run, Stage2Recipe),
    "distill": (run_distill.run, DistillRecipe),
}
# Four processes take a minute each to start on two cores.
PROCESSES = [2, pytest.param(4, marks=[pytest.mark.slow, pytest.mark.nightly])]
GLOSS_TEST: dict[str, Any] = {
    "max_samples": 100,
    "path": small_runs.GLOSSES,
    "split": "test",
    "anchor_column": "lemmas",
    "positive_column": "gloss",
}

# Settings of training, which an alignment in closed form does not have.
TRAINING = ("learning_rate", "max_steps", "per_device_train_batch_size", "warmup_steps")
# The first columns of the bundled images as shards of a stream.
TARS, PER_TAR = 3, 24


def joint_model(inputs: Inputs, folder: Path) -> str:
    """A model to train, saved with its processor as on the Hub; its LLM is that of the inputs."""
    torch.manual_seed(0)
    model = from_vision_text_pretrained(inputs.vision, inputs.text, projection_dim=24)
    model.save_pretrained(folder)
    for name in (inputs.vision, inputs.text):
        for path in Path(name).iterdir():
            if path.name.startswith(("preprocessor", "tokenizer", "special_tokens")):
                (folder / path.name).write_bytes(path.read_bytes())
    return str(folder)


def fields_of(stage: str, folder: Path, inputs: Inputs, **changes: Any) -> dict[str, Any]:
    """Settings of a small run: six steps, and a checkpoint after each third."""
    if stage == "stage2":
        fields = small_runs.stage2_fields(folder, inputs.vision, inputs.text, inputs.cache)
    else:
        fields = small_runs.stage1_fields(folder, inputs.llm)
    glosses = {"path": small_runs.GLOSSES, "caption_columns": ["gloss"], "max_samples": 200}
    if stage == "mntp":
        fields |= {"sources": [glosses], "block_size": 32}
    if stage == "distill":
        teacher = folder.parent / "teacher"
        if not teacher.exists():
            joint_model(inputs, teacher)
        own = ("model_name_or_path", "prompt_prefix", "prompt_suffix", "lora_rank")
        fields = {name: value for name, value in fields.items() if name not in own}
        fields |= {"model": str(teacher), "student": "layers:1", "sources": [{**glosses, "max_samples": 60}]}
    return {**fields, **changes}


def run(stage: str, folder: Path, inputs: Inputs, resume: bool = False, **changes: Any) -> dict[str, Any]:
    """Run a stage in this process."""
    work, recipe = RECIPES[stage]
    return work(build_config(recipe, fields_of(stage, folder, inputs, **changes)), resume=resume)


def llm2clip(command: str, fields: dict[str, Any], processes: int = 1, *options: str) -> None:
    """Run a command on a recipe file, on several processes."""
    recipe = Path(fields["output_dir"]).with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(fields))
    run_ranks([*CLI, command, str(recipe), *options], processes)


def launch_configuration(name: str) -> dict[str, Any]:
    """A packaged configuration of `accelerate launch`."""
    return yaml.safe_load((files("llm2clip.recipes") / "accelerate" / name).read_text())


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in history(folder) if "loss" in entry]


def metric(folder: Path, name: str) -> float:
    return [entry[name] for entry in history(folder) if name in entry][-1]


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints of a run."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def weights(folder: Path) -> dict[str, Tensor]:
    """What a result or a checkpoint has trained."""
    paths = [path for part in (".", "text_model", "2_Dense") for path in (folder / part).glob("*model.safetensors")]
    return {f"{path.relative_to(folder)} {name}": value for path in paths for name, value in load_file(path).items()}


def load(folder: Path) -> Any:
    """A trained model without its LLM."""
    return LLM2CLIPModel.from_pretrained(folder, text_model=False).eval()


def train(config: Stage2Recipe, resume: bool = False) -> Any:
    """Run stage 2; returns the trained model without its LLM."""
    run_stage2.run(config, resume=resume)
    return load(Path(config.output_dir))


def assert_equal(one: Path, two: Path, atol: float = 0.0) -> None:
    """Two runs have the same weights."""
    expected, found = weights(one), weights(two)
    assert expected.keys() == found.keys() != set()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=0, msg=name)


def assert_equal_weights(model: LLM2CLIPModel, expected: LLM2CLIPModel, atol: float = 0.0) -> None:
    own, others = model.state_dict(), expected.state_dict()
    assert set(own) == set(others)
    for name, value in own.items():
        torch.testing.assert_close(value, others[name], atol=atol, rtol=0, msg=name)


def broken_after(unbroken: Path, folder: Path, step: int) -> Path:
    """A copy of a run as if it had been killed after a step."""
    shutil.copytree(unbroken, folder)
    for path in folder.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return folder


class AtStep(TrainerCallback):
    """Does something within a step."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.action()


def at_step(step: int, action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every Trainer do something within a step."""
    train = StageTrainer.train

    def with_action(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(AtStep(step, action))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "train", with_action)


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def send(number: int) -> Callable[[], None]:
    """A signal to this process."""
    return lambda: os.kill(os.getpid(), number)


def write_tars(folder: Path, tars: int = TARS) -> str:
    """The first rows of the bundled images as webdataset shards."""
    folder.mkdir()
    table = datasets.load_dataset("parquet", data_files=f"{small_runs.CONCEPTS}/train.parquet", split="train")
    table = table.cast_column("image", datasets.Image(decode=False))
    for shard in range(tars):
        content = []
        for row in table.select(range(shard * PER_TAR, (shard + 1) * PER_TAR)):
            texts = {name: row[name] for name in ("caption", "keywords")}
            content += [
                (f"{row['key']}.webp", row["image"]["bytes"]),
                (f"{row['key']}.json", json.dumps(texts).encode()),
            ]
        write_tar(folder / f"{shard}.tar", content)
    return str(folder)


def source(tars: str, **fields: Any) -> dict[str, Any]:
    """The stream of such shards."""
    return {"path": tars, "streaming": True, "caption_columns": ["json.caption", "json.keywords"], **fields}


def embedded(inputs: Inputs, folder: Path, *sources: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Embed the captions of sources."""
    settings = {"text_model_name_or_path": inputs.text, "output_dir": str(folder), "sources": list(sources), **fields}
    return embed.run(build_config(embed.EmbedConfig, settings))


def on_stream(folder: Path, inputs: Inputs, cache: Path, tars: str, resume: bool = False, **changes: Any) -> None:
    """Run stage 2 on a stream whose captions are embedded in `cache`."""
    shared = {"embedding_cache": str(cache), "eval_sources": {}, "sources": [source(tars)], "shuffle_block": 8}
    run("stage2", folder, inputs, resume, **{**shared, "save_strategy": "no", **changes})
