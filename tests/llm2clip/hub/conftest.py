"""A built folder, pushing it to the loopback hub, and commands that are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from huggingface_hub import HfApi

from llm2clip import cli
from llm2clip.hub import build, push
from llm2clip.hub.source_model import SourceModel
from llm2clip.models.towers import save_text_tower
from modeling_llm2clip import LLM2CLIPTextModel
from tests.builders import tiny
from tests.builders.tiny import IMAGES
from tests.loopback_hub import TOKEN, LoopbackHub

REPO = "tester/tiny"
Refused = Callable[..., str]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joint model with its LLM, built by `llm2clip build`; tests must not change it."""
    folder = tmp_path_factory.mktemp("built")
    tiny.save_apart(folder)
    IMAGES[0].save(folder / "picture.png")
    captions = ["noise", "a dog"]
    example = {"example_image": folder / "picture.png", "example_captions": captions}
    build.build_folder(folder / "clip", folder / "out", license="apache-2.0", **example)
    return folder / "out"


@pytest.fixture
def model(built: Path, tmp_path: Path) -> Path:
    """A copy of the built folder, which a test may change."""
    return Path(shutil.copytree(built, tmp_path / "model"))


def save_adapter(folder: Path, llm: Path, name: str) -> None:
    """Save a text tower that is a LoRA adapter of the tower in another folder, which others know by a name."""
    tower = LLM2CLIPTextModel.from_pretrained(llm).eval()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    tower.decoder = peft.get_peft_model(tower.decoder, lora)
    tower.decoder.peft_config["default"].base_model_name_or_path = name
    save_text_tower(tower, tiny.processor().tokenizer, folder)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build without the process that loads the built folder, which test_build.py tests."""
    monkeypatch.setattr(SourceModel, "compare", lambda *_: 0.0)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Check that a command is refused with some words, and return the whole message."""

    def check(words: str, *command: str | Path) -> str:
        assert cli.main([*map(str, command)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error
        return error

    return check


def upload(hub: LoopbackHub, folder: Path, token: str | bool = TOKEN, **settings: Any) -> dict[str, Any]:
    """Push a folder to the loopback hub without loading it first."""
    config = push.PushConfig(**{"folder": str(folder), "repo_id": REPO, "check": False, **settings})
    return push.run(config, HfApi(endpoint=hub.url, token=token))


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file in a folder by its path within."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
