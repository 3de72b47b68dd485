"""Training that pushes to a hub on the loopback interface: what arrives in mid-run loads, and the card is ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, constants

from llm2clip_training import cli
from llm2clip_training.cards import CARD, split_card
from tests.loopback_hub import TOKEN, LoopbackHub, Repo
from tests.stranger import HIDE
from tests.training import tiny
from tests.training.stages.conftest import Inputs

CONSUMER = """
from huggingface_hub import snapshot_download
from transformers import AutoModel, AutoTokenizer
# A folder, since transformers looks for the revision of an adapter in the repo of its base.
folder = snapshot_download(sys.argv[1], revision=sys.argv[2])
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
encode = getattr(model, "encode_text", None) or model.encode
print(tuple(encode(["a dog", "a cat"], tokenizer).shape), hasattr(model, "vision_model"))
"""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


def train(hub: LoopbackHub, stage: str, fields: dict[str, Any], repo: str, home: Path, **changes: Any) -> None:
    pushing = {"push_to_hub": True, "hub_model_id": repo, "hub_strategy": "every_save", "save_strategy": "steps"}
    fields = {**fields, **pushing, "save_steps": 2, **changes}
    recipe = home / f"{stage}.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    environment = {**os.environ, **hub.environment(home / "publisher"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llm2clip_training.cli", stage, str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def loaded(hub: LoopbackHub, repo: str, revision: str, home: Path) -> str:
    """What a process that has never seen this package finds in a repo."""
    home.mkdir(exist_ok=True)
    environment = {**os.environ, **hub.environment(home / "consumer", token=None)}
    command = [sys.executable, "-I", "-c", HIDE + CONSUMER, repo, revision]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def commit_of(repo: Repo, message: str) -> str:
    """The last commit with a message."""
    return [sha for sha, found in zip(repo.commits, repo.messages, strict=True) if found == message][-1]


@pytest.mark.slow
def test_both_stages_push_as_they_train(
    hub: LoopbackHub, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 merged and in mid-run, then stage 2 on the LLM that was pushed, by its Hub id."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    HfApi(endpoint=hub.url, token=TOKEN).create_repo("tester/base")
    HfApi(endpoint=hub.url, token=TOKEN).upload_folder(repo_id="tester/base", folder_path=inputs.llm)
    stage1 = tiny.stage1_fields(tmp_path / "text", "tester/base") | {"max_steps": 4}
    train(hub, "stage1", stage1, "tester/llm", tmp_path)
    llm = hub.repo("tester/llm")
    step, end = (commit_of(llm, message) for message in ("Training in progress, step 2", "End of training"))
    assert "adapter_model.safetensors" in llm.commits[step]
    assert "adapter_model.safetensors" not in llm.commits[end]
    for revision in (step, end):
        assert loaded(hub, "tester/llm", revision, tmp_path / revision).endswith("32) False")
    data, text = split_card(llm.files()[CARD].decode())
    assert data["pipeline_tag"] == "feature-extraction"
    assert "max_steps: 4" in text
    assert str(tmp_path) not in text
    assert TOKEN not in llm.files()[CARD].decode()
    assert "![Training curves](training_curves.png)" in text
    assert "training_curves.png" in llm.files()

    cache = tmp_path / "cache"
    environment = {**os.environ, **hub.environment(tmp_path / "publisher")}
    sources = [tiny.concepts(), tiny.concepts("validation", max_samples=40)]
    fields = {"text_model_name_or_path": "tester/llm", "output_dir": str(cache), "sources": sources}
    (tmp_path / "embed.yaml").write_text(yaml.safe_dump(fields))
    command = [sys.executable, "-m", "llm2clip_training.cli", "embed", str(tmp_path / "embed.yaml")]
    subprocess.run(command, env=environment, capture_output=True, check=True)

    HfApi(endpoint=hub.url, token=TOKEN).create_repo("tester/clip")
    card = b"---\nmy_key: 1\n---\n\nEdited on the website.\n"
    HfApi(endpoint=hub.url, token=TOKEN).upload_file(path_or_fileobj=card, path_in_repo=CARD, repo_id="tester/clip")
    stage2 = tiny.stage2_fields(tmp_path / "clip", inputs.vision, "tester/llm", str(cache)) | {"max_steps": 4}
    options = {"eval_strategy": "steps", "eval_steps": 2, "hub_token": TOKEN}
    train(hub, "stage2", stage2, "tester/clip", tmp_path, **options)
    clip = hub.repo("tester/clip")
    # The Trainer's arguments are pushed in mid-training.
    assert "training_args.bin" in clip.commits[commit_of(clip, "Training in progress, step 2")]
    assert not any(TOKEN.encode() in blob for blob in hub.blobs.values())
    assert "Edited on the website." in clip.files()[CARD].decode()
    for number, message in enumerate(("Training in progress, step 2", "End of training")):
        found = loaded(hub, "tester/clip", commit_of(clip, message), tmp_path / f"clip-{number}")
        assert found.endswith("24) True"), message
    data, text = split_card(clip.files()[CARD].decode())
    assert data["base_model"] == ["tester/llm"]
    assert data["model-index"][0]["results"][0]["dataset"]["split"] == "validation"
    assert data["my_key"] == 1
    # The run's own files stay at home.
    assert not [name for name in clip.files() if name.startswith("checkpoint-") or name.endswith(".bin")]


def test_a_local_llm_is_refused_before_training(inputs: Inputs, tmp_path: Path, capsys: Any) -> None:
    fields = tiny.stage2_fields(tmp_path / "out", inputs.vision, inputs.text, inputs.cache)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**fields, "push_to_hub": True, "hub_model_id": "tester/clip"}))
    assert cli.main(["stage2", str(recipe)]) == 2
    assert "others cannot load it from: push the LLM first and name its Hub id" in capsys.readouterr().err
    assert cli.main(["stage2", str(recipe), "--bundle-text-model", "true", "--hub-strategy", "every_save"]) == 2
    assert "or push the result alone (--hub-strategy end)" in capsys.readouterr().err


def test_the_card_of_a_run_keeps_what_was_written_on_it(inputs: Inputs, tmp_path: Path) -> None:
    fields = tiny.stage1_fields(tmp_path / "text", inputs.llm) | {"max_steps": 1, "save_strategy": "no"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / CARD).write_text("---\nlicense: mit\n---\n\nMy own words.\n")
    assert cli.main(["stage1", str(recipe)]) == 0
    data, text = split_card((tmp_path / "text" / CARD).read_text())
    assert text == "My own words.\n"
    assert data["license"] == "mit"
    assert data["pipeline_tag"] == "feature-extraction"
