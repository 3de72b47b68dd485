"""Training that pushes to a hub on the loopback interface: pushed checkpoints load, and cards are complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi

from llm2clip import cli
from llm2clip.command_line.settings import build_config
from llm2clip.data.table_identity import data_revision
from llm2clip.hub.cards.card import CARD, split_card
from llm2clip.trainers import model_card, run_stage2
from llm2clip.trainers.base_trainer import StageTrainer
from llm2clip.trainers.stage2_config import Stage2Recipe
from tests.builders import small_runs
from tests.forks import run_code
from tests.llm2clip.conftest import Inputs
from tests.loopback_hub import CUT, READ_TOKEN, TOKEN, File, LoopbackHub, Repo
from tests.stranger import HIDE

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


def train(hub: LoopbackHub, stage: str, fields: dict[str, Any], repo: str, home: Path, **changes: Any) -> None:
    pushing = {"push_to_hub": True, "hub_model_id": repo, "hub_strategy": "every_save", "save_strategy": "steps"}
    fields = {**fields, **pushing, "save_steps": 2, "max_steps": 4, **changes}
    recipe = home / f"{stage}.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    environment = {**os.environ, **hub.environment(home / "publisher"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llm2clip", stage, str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def loaded(hub: LoopbackHub, repo: str, revision: str, home: Path) -> str:
    """Load a repo in a process without this package; returns what it printed."""
    home.mkdir(exist_ok=True)
    environment = {**os.environ, **hub.environment(home / "consumer", token=None)}
    command = [sys.executable, "-I", "-c", HIDE + CONSUMER, repo, revision]
    done = run_code(command, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def commit_of(repo: Repo, message: str) -> str:
    """The last commit with a message."""
    return [sha for sha, found in zip(repo.commits, repo.messages, strict=True) if found == message][-1]


@pytest.mark.slow
def test_both_stages_push_checkpoints_and_results_that_load(hub: LoopbackHub, inputs: Inputs, tmp_path: Path) -> None:
    """Stage 1 during training and merged at the end, then stage 2 on the pushed LLM by its Hub id."""
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("tester/base")
    api.upload_folder(repo_id="tester/base", folder_path=inputs.llm)
    train(hub, "stage1", small_runs.stage1_fields(tmp_path / "text", "tester/base"), "tester/llm", tmp_path)
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
    assert {"LICENSE-CODE", "training_curves.png"} <= set(llm.files())

    api.create_repo("tester/clip")
    card = b"---\nmy_key: 1\n---\n\nEdited on the website.\n"
    api.upload_file(path_or_fileobj=card, path_in_repo=CARD, repo_id="tester/clip")
    stage2 = small_runs.stage2_fields(tmp_path / "clip", inputs.vision, "tester/llm", "")
    options = {"eval_strategy": "steps", "eval_steps": 2, "hub_token": TOKEN, "embedding_cache": None}
    train(hub, "stage2", stage2, "tester/clip", tmp_path, **options, online_text_model=True)
    clip = hub.repo("tester/clip")
    assert not any(TOKEN.encode() in blob for blob in hub.blobs.values())
    for number, message in enumerate(("Training in progress, step 2", "End of training")):
        found = loaded(hub, "tester/clip", commit_of(clip, message), tmp_path / f"clip-{number}")
        assert found.endswith("24) True"), message
    data, text = split_card(clip.files()[CARD].decode())
    assert "Edited on the website." in text
    assert (data["my_key"], data["base_model"]) == (1, ["tester/llm"])
    dataset = data["model-index"][0]["results"][0]["dataset"]
    assert (dataset["split"], dataset["revision"]) == ("validation", data_revision(small_runs.CONCEPTS))
    # The run's own files stay at home.
    assert not [name for name in clip.files() if name.startswith(("checkpoint-", "log.")) or name.endswith(".bin")]


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make training wait for every upload, so that no checkpoint is left out."""
    push = StageTrainer._push_from_checkpoint

    def and_wait(self: StageTrainer, checkpoint_folder: str) -> None:
        push(self, checkpoint_folder)
        self._finish_current_push()

    monkeypatch.setattr(StageTrainer, "_push_from_checkpoint", and_wait)


def stage1(inputs: Inputs, tmp_path: Path, **fields: Any) -> int:
    """Run stage 1 without LoRA in this process and push to tester/llm; returns the exit code."""
    pushing = {"push_to_hub": True, "hub_model_id": "tester/llm", "hub_token": TOKEN, "hub_strategy": "end"}
    changes = {"lora_rank": 0, "max_steps": 2, "save_steps": 1, **pushing, **fields}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_runs.stage1_fields(tmp_path / "text", inputs.llm) | changes))
    return cli.main(["stage1", str(recipe)])


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {name.partition("/")[2]: value for name, value in files.items() if name.startswith(f"{folder}/")}


@pytest.mark.parametrize(
    ("strategy", "pushed"),
    [
        ("checkpoint", {"last-checkpoint": "checkpoint-2"}),
        ("all_checkpoints", {"checkpoint-1": "checkpoint-1", "checkpoint-2": "checkpoint-2"}),
    ],
)
@pytest.mark.usefixtures("waiting")
def test_whole_checkpoints_are_pushed_beside_a_model_that_loads(
    strategy: str, pushed: dict[str, str], hub: LoopbackHub, inputs: Inputs, tmp_path: Path
) -> None:
    """Whole checkpoints, so that a run can resume from the Hub."""
    assert stage1(inputs, tmp_path, hub_strategy=strategy) == 0
    repo = hub.repo("tester/llm")
    folders = {name.split("/")[0] for name in repo.files() if "checkpoint" in name}
    assert folders == set(pushed)
    for folder, local in pushed.items():
        files = below(folder, repo.files())
        assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "run_state.json"} <= set(files)
        assert not any(TOKEN.encode() in content for content in files.values())
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "text" / local).iterdir()}
    step = repo.commits[commit_of(repo, "Training in progress, step 1")]
    assert {"model.safetensors", "modeling_llm2clip_text.py", "tokenizer.json", CARD, "LICENSE-CODE"} <= set(step)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "tester/llm contains a model of type 'bert', and this model has type 'llm2clip_text_model'; push"),
        ({"hub_model_id": "tester/timm"}, "tester/timm contains weights.bin, but no config.json"),
        ({"hub_private_repo": True}, "tester/llm exists and is public: make it private in its settings"),
        ({"hub_model_id": "tester/mine", "hub_token": READ_TOKEN}, "the token needs write access"),
        ({"hub_model_id": "tester/mine", "hub_token": "hf_wrong"}, "hf auth login"),
        ({"hub_model_id": "someone-else/llm"}, "someone-else/llm: 403"),
    ],
)
def test_a_push_that_the_hub_would_refuse_fails_before_training(
    fields: dict[str, Any], message: str, hub: LoopbackHub, inputs: Inputs, tmp_path: Path, capsys: Any
) -> None:
    contents = {"llm": ("config.json", b'{"model_type": "bert"}'), "timm": ("weights.bin", b"x"), "mine": (CARD, b"")}
    for name, (path, content) in contents.items():
        HfApi(token=TOKEN).create_repo(f"tester/{name}")
        hub.repo(f"tester/{name}").commit("main", {path: File(content, lfs=False)}, "theirs")
    assert stage1(inputs, tmp_path, **fields) == 2
    assert message in capsys.readouterr().err
    assert all(repo.messages == ["initial commit", "theirs"] for repo in hub.repos.values())
    assert not list((tmp_path / "text").glob("*.safetensors"))


def test_the_license_is_checked_before_training_and_pushed_with_every_checkpoint(
    hub: LoopbackHub, inputs: Inputs, tmp_path: Path, capsys: Any, request: Any
) -> None:
    """That of the LLM, with its text, its NOTICE and what it demands of card and name."""
    llm = Path(shutil.copytree(inputs.llm, tmp_path / "Llama-3.2-1B"))
    (llm / "LICENSE").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT")
    inputs = replace(inputs, llm=str(llm))
    assert stage1(inputs, tmp_path, hub_model_id="tester/mine") == 2
    assert (
        "under llama3.2, the name of the repo has to begin with 'Llama', unlike tester/mine" in capsys.readouterr().err
    )
    (tmp_path / "text").mkdir(exist_ok=True)
    (tmp_path / "text" / CARD).write_text("---\nlicense: mit\n---\nMine.\n")
    assert stage1(inputs, tmp_path, hub_model_id="tester/Llama-mine") == 2
    assert (
        f"license: mit in {tmp_path / 'text' / CARD} does not keep the license of Llama-3.2-1B"
        in capsys.readouterr().err
    )
    assert not hub.repos
    assert not list((tmp_path / "text").glob("checkpoint-*"))
    (tmp_path / "text" / CARD).unlink()
    request.getfixturevalue("waiting")
    assert stage1(inputs, tmp_path, hub_model_id="tester/Llama-mine", hub_strategy="every_save") == 0
    repo = hub.repo("tester/Llama-mine")
    assert repo.messages[1:] == ["Training in progress, step 1", "Training in progress, step 2", "End of training"]
    for message in repo.messages[1:]:
        files = {name: file.content for name, file in repo.commits[commit_of(repo, message)].items()}
        data, text = split_card(files[CARD].decode())
        assert (data["license"], "**Built with Llama**" in text) == ("llama3.2", True)
        assert files["LICENSE"] == b"LLAMA 3.2 COMMUNITY LICENSE AGREEMENT"
        assert files["LICENSE-CODE"].strip().startswith(b"Apache License")
        assert b"Llama 3.2 is licensed under the Llama 3.2 Community License" in files["NOTICE"]


def test_the_push_command_uploads_a_result_whose_upload_failed(
    hub: LoopbackHub, inputs: Inputs, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    hub.fail_next("POST", "/commit/", CUT, times=20)
    assert stage1(inputs, tmp_path, hub_revision="experiment") == 2
    folder = tmp_path / "text"
    command = f"llm2clip push {folder} tester/llm --revision experiment"
    said = capsys.readouterr().err
    assert "tester/llm: the connection broke" in said
    assert f"The result is in {folder}; `{command}` uploads it." in said
    hub.failures.clear()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert cli.main([*command.split()[1:], "--no-check"]) == 0
    files = hub.repo("tester/llm").files("experiment")
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert not [name for name in files if "checkpoint" in name or name.endswith(".bin")]
    assert not hub.repo("tester/llm").files()


@pytest.mark.usefixtures("waiting")
def test_a_failed_checkpoint_push_is_logged_and_the_next_push_succeeds(
    hub: LoopbackHub, inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail_next("POST", "/commit/", 413)
    assert stage1(inputs, tmp_path, hub_strategy="every_save") == 0
    told = [record.getMessage() for record in caplog.records if "pushing a checkpoint failed" in record.message]
    assert len(told) == 1
    assert "tester/llm: Client error '413" in told[0]
    assert hub.repo("tester/llm").messages[1:] == ["Training in progress, step 2", "End of training"]


def test_pushing_a_reference_to_a_local_llm_fails_before_training(inputs: Inputs, tmp_path: Path, capsys: Any) -> None:
    fields = small_runs.stage2_fields(tmp_path / "out", inputs.vision, inputs.text, inputs.cache)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**fields, "push_to_hub": True, "hub_model_id": "tester/clip"}))
    assert cli.main(["stage2", str(recipe)]) == 2
    assert "a local folder that others cannot load: push the LLM first and name its Hub id" in capsys.readouterr().err
    lora = ["--lora-rank", "4", "--embedding-cache", "null"]
    assert cli.main(["stage2", str(recipe), *lora, "--hub-strategy", "every_save"]) == 2
    assert "or push the result alone (--hub-strategy end)" in capsys.readouterr().err


def test_a_push_in_a_run_does_not_wait_for_checksums_of_data(
    hub: LoopbackHub, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile other processes would wait for the one that pushes, until their time is up."""
    pushed, push = Event(), StageTrainer._push_checkpoint

    def push_first(self: StageTrainer, checkpoint: Path) -> None:
        push(self, checkpoint)
        pushed.set()

    monkeypatch.setattr(StageTrainer, "_push_checkpoint", push_first)
    monkeypatch.setattr(model_card, "data_revision", lambda *_: "afterwards" if pushed.wait(20) else "before")
    fields = small_runs.stage2_fields(tmp_path / "clip", inputs.vision, inputs.text, inputs.cache)
    pushing = {"push_to_hub": True, "hub_model_id": "tester/clip", "hub_token": TOKEN, "hub_strategy": "every_save"}
    steps = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    monkeypatch.setattr(run_stage2, "_check_pushing", lambda *_: None)  # the LLM is in a local folder
    run_stage2.run(build_config(Stage2Recipe, {**fields, **pushing, **steps}))
    repo = hub.repo("tester/clip")

    def revision(message: str) -> str | None:
        data, _ = split_card(repo.commits[commit_of(repo, message)][CARD].content.decode())
        return data["model-index"][0]["results"][0]["dataset"].get("revision")

    assert revision("Training in progress, step 1") is None
    assert revision("End of training") == "afterwards"
