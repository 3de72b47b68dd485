"""A built folder, pushing it to the loopback hub, and what others get from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch import Tensor

from llm2clip.hub import build, push
from llm2clip.hub.source_model import SourceModel
from tests.forks import run_code
from tests.loopback_hub import TOKEN, LoopbackHub
from tests.modeling_llm2clip import tiny
from tests.modeling_llm2clip.tiny import IMAGES
from tests.stranger import HIDE

REPO = "tester/tiny"
CONSUMER = """
import json
import torch
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor, pipeline
repo, output, pictures, captions = sys.argv[1:3] + [json.loads(value) for value in sys.argv[3:]]
images = [Image.open(picture) for picture in pictures]
model = AutoModel.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
found = {"logits": model(**processor(text=captions, images=images, return_tensors="pt")).logits_per_image}
classify = pipeline("zero-shot-image-classification", model=repo, trust_remote_code=True)
answers = classify(images, candidate_labels=captions, hypothesis_template="{}")
scores = [{row["label"]: row["score"] for row in answer} for answer in answers]
found["scores"] = torch.tensor([[row[caption] for caption in captions] for row in scores])
features = pipeline("image-feature-extraction", model=repo, trust_remote_code=True)
found["image"] = torch.nn.functional.normalize(torch.tensor(features(images, pool=True))[:, 0], dim=-1)
states = pipeline("feature-extraction", model=repo, trust_remote_code=True)
found["states"] = torch.tensor(states(captions[0]))
encoder = SentenceTransformer(repo, trust_remote_code=True, device="cpu")
found["st_text"] = torch.tensor(encoder.encode(captions))
found["st_image"] = torch.tensor(encoder.encode(images))
assert not {"modeling_llm2clip", "llm2clip"} & set(sys.modules)
save_file({key: value.detach().contiguous() for key, value in found.items()}, output)
"""


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


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build without the process that loads the built folder, which test_build.py tests."""
    monkeypatch.setattr(SourceModel, "compare", lambda *_: 0.0)


def upload(hub: LoopbackHub, folder: Path, token: str | bool = TOKEN, **settings: Any) -> dict[str, Any]:
    """Push a folder to the loopback hub without loading it first."""
    config = push.PushConfig(**{"folder": str(folder), "repo_id": REPO, "check": False, **settings})
    return push.run(config, HfApi(endpoint=hub.url, token=token))


def push_by_command(hub: LoopbackHub, folder: Path, home: Path) -> str:
    """Push a folder with the command, in a process of its own; returns what it prints."""
    environment = {**os.environ, **hub.environment(home / "publisher")}
    command = [sys.executable, "-m", "llm2clip", "push", str(folder), REPO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def consume(hub: LoopbackHub, pictures: Sequence[Path], captions: Sequence[str], home: Path) -> dict[str, Tensor]:
    """What a process without this package and without a token gets from the pushed model.

    Returns:
        `logits` and `scores` `(pictures, captions)`, of AutoModel and the zero-shot pipeline; `image`, of the pipeline
        of image features, `st_image` and `st_text`, of SentenceTransformer; `states`, of the first caption's tokens.
    """
    environment = {**os.environ, **hub.environment(home / "consumer", token=None)}
    output = home / "found.safetensors"
    inputs = json.dumps([str(picture) for picture in pictures]), json.dumps(captions)
    command = [sys.executable, "-I", "-c", HIDE + CONSUMER, REPO, str(output), *inputs]
    done = run_code(command, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output)


def content(folder: Path) -> dict[str, bytes]:
    """Content of every file in a folder by path."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
