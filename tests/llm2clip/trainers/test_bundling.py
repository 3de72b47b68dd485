"""The LLM is added to a result when everything else is saved."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoProcessor

from llm2clip.trainers import run_stage2
from llm2clip.trainers.bundling import bundle_text_model
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs

SAVED = {
    "model.safetensors",
    "config.json",
    "processor_config.json",
    "tokenizer.json",
    "trainer_state.json",
    "README.md",
}
# Each collective operation of the group may wait for one second, and the work takes three.
ALONE = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from llm2clip.utils.processes import run_while_others_wait
rank = int(sys.argv[2])
dist.init_process_group("gloo", f"file://{sys.argv[1]}", timedelta(seconds=1), world_size=2, rank=rank)
start = time.monotonic()
run_while_others_wait(lambda: time.sleep(3), here=rank == 0)
assert time.monotonic() - start > 2.5
dist.destroy_process_group()
"""


def run(folder: Path, inputs: Inputs) -> None:
    fields = tiny.stage2_fields(folder, inputs.vision, inputs.text, inputs.cache)
    fields |= {"bundle_text_model": True, "max_steps": 1, "save_strategy": "no"}
    run_stage2.run(build_config(Stage2Recipe, fields))


def test_the_llm_is_loaded_on_the_cpu_after_everything_else_is_saved(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, found = LLM2CLIPModel.load_text_model, []

    def spy(self: LLM2CLIPModel, *args: Any, **kwargs: Any) -> None:
        found.append(({path.name for path in tmp_path.iterdir()}, {value.device.type for value in self.parameters()}))
        assert LLM2CLIPModel.from_pretrained(tmp_path, text_model=False).config.text_model_name_or_path == inputs.text
        load(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LLM2CLIPModel, "load_text_model", spy)
        run(tmp_path, inputs)
    ((files, devices),) = found
    assert not SAVED - files
    assert devices == {"cpu"}
    model = AutoModel.from_pretrained(tmp_path)
    assert model.config.text_model_name_or_path is None
    assert model.text_model.fingerprint() == LLM2CLIPTextModel.from_pretrained(inputs.text).fingerprint()
    assert model.encode_text(["a dog"], AutoProcessor.from_pretrained(tmp_path)).shape == (1, 24)
    assert not list(tmp_path.glob(".bundling-*"))


def test_a_failure_leaves_the_trained_model_without_its_llm(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: LLM2CLIPModel, *args: Any, **kwargs: Any) -> None:
        raise MemoryError("no memory left.")

    with monkeypatch.context() as patch:
        patch.setattr(LLM2CLIPModel, "load_text_model", fail)
        with pytest.raises(ValueError, match=r"no memory left\. The model is saved in .*`llm2clip build"):
            run(tmp_path, inputs)
    # Several shards replace the one file.
    assert LLM2CLIPModel.from_pretrained(tmp_path, text_model=False).config.text_model_name_or_path == inputs.text
    monkeypatch.setattr(
        LLM2CLIPModel,
        "save_pretrained",
        functools.partialmethod(LLM2CLIPModel.save_pretrained, max_shard_size="100KB"),
    )
    bundle_text_model(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert LLM2CLIPModel.from_pretrained(tmp_path).text_model.fingerprint()


def test_other_processes_wait_longer_than_a_collective_operation_may(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", ALONE, str(tmp_path / "store"), str(rank)] for rank in range(2)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
