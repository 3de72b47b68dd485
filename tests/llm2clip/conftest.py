"""Fixtures of several subpackages: a loopback hub, a saved model, one small stage 1 with its embedding cache."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm2clip.command_line.settings import build_config
from llm2clip.data import transforms
from llm2clip.data.transforms import decode_tensor
from llm2clip.encoders import embed
from llm2clip.hub import new_process
from llm2clip.trainers import run_stage1
from llm2clip.trainers.stage1_config import Stage1Recipe
from tests.builders import small_runs, tiny
from tests.forks import run_code
from tests.loopback_hub import LoopbackHub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        server.redirect(monkeypatch, tmp_path_factory.mktemp("hub_cache"))
        yield server


@pytest.fixture(autouse=True, scope="session")
def _new_processes_are_forks() -> Iterator[None]:
    """The processes that load a folder find torch imported; those of the documents' commands do not."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(new_process, "subprocess", SimpleNamespace(run=run_code, DEVNULL=subprocess.DEVNULL))
        yield


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model with its LLM and processor, which no test changes."""
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("hub") / "llm2clip-tiny"
    tiny.save(folder)
    return folder


@pytest.fixture
def decoded_to_tensors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the images that are decoded by the image backend `fast` from now on."""
    keys: list[str] = []

    def decode(value: Any, key: str, max_pixels: int) -> torch.Tensor:
        keys.append(key)
        return decode_tensor(value, key, max_pixels)

    monkeypatch.setattr(transforms, "decode_tensor", decode)
    return keys


@dataclass(frozen=True)
class Inputs:
    """Folders of an LLM, a vision tower, the text tower of stage 1 and the cache that it made."""

    llm: str
    vision: str
    text: str
    cache: str


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder: Path = tmp_path_factory.mktemp("stages")
    llm = small_runs.save_llm(folder / "llm")
    vision = small_runs.save_vision_tower(folder / "vision")
    fields = small_runs.stage1_fields(folder / "text", llm) | {"max_steps": 2, "save_strategy": "no"}
    run_stage1.run(build_config(Stage1Recipe, fields))
    embed.run(
        embed.EmbedConfig(
            text_model_name_or_path=str(folder / "text"),
            output_dir=str(folder / "cache"),
            sources=[small_runs.concepts(), small_runs.concepts("validation", max_samples=40)],
            shard_size=64,
        )
    )
    return Inputs(llm, vision, str(folder / "text"), str(folder / "cache"))
