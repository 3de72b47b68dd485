"""`llm2clip push`: checks before the upload, what is uploaded, and the pushed model in the hands of its users."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

from llm2clip import cli
from llm2clip.files.atomic import read_json
from llm2clip.files.manifests import FOLDER_MANIFEST, write_manifest
from llm2clip.hub import push
from llm2clip.hub.cards.card import CARD, split_card
from tests.builders import tiny
from tests.damage import flip
from tests.llm2clip.hub.conftest import REPO, Refused, files_of, upload
from tests.loopback_hub import READ_TOKEN, TOKEN, LoopbackHub


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def test_push_uploads_what_belongs_to_a_model_unchanged_except_the_card(
    hub: LoopbackHub, built: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(model, "id_rsa", "notes.txt", "data/train.csv", "secret.json", "my_tool.py", "model.safetensors.bak")
    write(model, "images/on-the-card.png", "images/private.png")
    with (model / CARD).open("a") as card:
        card.write("\n![shown](images/on-the-card.png)\n")
    before = files_of(model)
    with caplog.at_level(logging.WARNING):
        result = upload(hub, model, private=True, commit_message="Hello")
    repo = hub.repo(REPO)
    assert (repo.private, repo.messages[-1]) == (True, "Hello")
    arrived, expected = repo.files(), {**files_of(built), "images/on-the-card.png": b"mine"}
    assert result["files"] == len(arrived)
    assert arrived == {**expected, CARD: arrived[CARD]}
    assert repo.commits[repo.branches["main"]]["model.safetensors"].lfs
    data, text = split_card(arrived[CARD].decode())
    assert data["widget"][0]["src"] == f"{hub.url}/{REPO}/resolve/main/example.png"
    assert f'from_pretrained("{REPO}"' in text
    assert str(built) not in text
    assert files_of(model) == before
    assert "not uploaded, as no model needs them: data/train.csv, id_rsa, " in caplog.text
    # Others only if a pattern names them.
    upload(hub, model, include=["data/*", "notes.txt"])
    assert set(repo.files()) == {*expected, "data/train.csv", "notes.txt"}
    with pytest.raises(ValueError, match=r"--include \*\.parquet fits no file"):
        upload(hub, model, include=["*.parquet"])


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (False, REPO, r"there is no access token; log in with `hf auth login`, or set HF_TOKEN"),
        (READ_TOKEN, REPO, r"403 .*needs write access to the repo and its organization"),
        (TOKEN, "tester/a--b", r"Cannot have -- or \.\. in repo_id: 'tester/a--b'"),
        (TOKEN, "tiny", r"'tiny' is not a repo name: write OWNER/NAME"),
    ],
    ids=["none", "read", "invalid", "no owner"],
)
def test_error_for_token_or_repo_name_names_the_next_step(
    token: str | bool, repo: str, message: str, hub: LoopbackHub, built: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        upload(hub, built, token, repo_id=repo)
    assert not hub.repos


def test_what_the_hub_says_is_passed_on_in_one_line(hub: LoopbackHub, built: Path) -> None:
    hub.fail_next("POST", "/commit/", 413, times=20)
    with pytest.raises(ValueError, match=rf"^{REPO}: .*413.*\.$"):
        upload(hub, built)
    assert not hub.repo(REPO).files()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "is not a folder; `llm2clip build MODEL"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks *.safetensors"),
        (lambda folder: (folder / "modeling_llm2clip.py").unlink(), "lacks modeling_llm2clip.py"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors has 5000 bytes instead"),
        (lambda folder: (folder / "config.json").write_text('{"a": 1}'), "contains model_type None. Build it first"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": '), "config.json' is not a valid JSON"),
        (lambda folder: (folder / CARD).write_text("---\nlicense: [\n---\n"), "README.md is not valid YAML"),
    ],
    ids=["no folder", "no weights", "no code", "cut weights", "other config", "cut config", "card"],
)
def test_incomplete_folder_is_refused_before_the_upload(
    spoil: Callable[[Path], object], message: str, model: Path, refused: Refused
) -> None:
    spoil(model)
    refused(message, "push", model, REPO, "--no-check", "--dry-run")


def test_a_reference_to_a_local_llm_is_refused(tmp_path: Path, refused: Refused) -> None:
    tiny.save_apart(tmp_path)
    (tmp_path / "clip" / CARD).write_text("A model.")
    refused("which others cannot load; `llm2clip build` bundles it", "push", tmp_path / "clip", REPO, "--dry-run")


def test_what_the_hub_says_of_the_metadata_is_passed_on(hub: LoopbackHub, model: Path) -> None:
    card = (model / CARD).read_text()
    (model / CARD).write_text(card.replace("license: apache-2.0", "license: other"))
    with pytest.raises(ValueError, match='"license_name" and "license_link" are required'):
        upload(hub, model)
    assert not hub.repo(REPO).files()


def test_folder_that_is_not_what_was_built_is_refused(
    hub: LoopbackHub, built: Path, model: Path, tmp_path: Path
) -> None:
    listed = read_json(built / FOLDER_MANIFEST)["sha256"]
    assert set(listed) == set(files_of(built)) - {CARD, "LICENSE", "example.png", FOLDER_MANIFEST}
    assert {"model.safetensors", "modeling_llm2clip.py", "config.json", "1_Normalize/config.json"} <= set(listed)
    (model / CARD).write_text((model / CARD).read_text() + "\nWhat its author adds.\n")
    changed = ["model.safetensors", "processing_llm2clip.py", "tokenizer_config.json"]
    for name in (*changed, FOLDER_MANIFEST):
        with flip(model / name), pytest.raises(ValueError, match=r"is not what was written|damaged"):
            upload(hub, model)
    write(model, "adapter_config.json")
    with pytest.raises(ValueError, match=r"adapter_config.json, which was not built but would be loaded"):
        upload(hub, model)
    assert not hub.repos
    (model / "adapter_config.json").unlink()
    upload(hub, model)
    arrived = tmp_path / "arrived"
    snapshot_download(REPO, endpoint=hub.url, token=False, local_dir=arrived)
    assert cli.main(["verify", str(arrived)]) == 0
    with flip(arrived / "model.safetensors"):
        assert cli.main(["verify", str(arrived)]) == 2
    # A folder without one does not leave that of other weights there.
    (model / FOLDER_MANIFEST).unlink()
    upload(hub, model)
    assert FOLDER_MANIFEST not in hub.repo(REPO).files()


def test_a_dry_run_lists_what_a_push_uploads_and_what_not(
    hub: LoopbackHub, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(model, "notes.txt", "table.csv", "checkpoint-4/config.json", "checkpoint-4/optimizer.pt")
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["push", str(model), REPO, "--no-check", "--include", "table.csv", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert {method for method, _, _ in hub.requests} <= {"GET", "HEAD"}
    expected = upload(hub, model, include=["table.csv"])
    assert f"files: {expected['files']}" in printed
    assert all(name in printed for name in hub.repo(REPO).files())
    assert f"{(model / 'model.safetensors').stat().st_size:,}" in printed
    assert "Not uploaded: notes.txt, as no model needs it; --include 'notes.txt' uploads it." in printed
    assert "checkpoint-4" not in printed


def test_a_dry_run_makes_the_checks_of_a_push(hub: LoopbackHub, model: Path, refused: Refused) -> None:
    command = ("push", model, REPO, "--no-check", "--dry-run")
    (model / "LICENSE").write_text("hf_" + "a" * 34)
    refused("looks like an access token", *command)
    (model / "model.safetensors").unlink()
    refused("lacks *.safetensors", *command)
    refused("there is no option --no-include", *command, "--no-include")
    assert {method for method, _, _ in hub.requests} <= {"GET", "HEAD"}


def test_a_missing_token_is_noticed_before_anything_is_read(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "_check_folder", lambda folder: pytest.fail("the folder was read"))
    with pytest.raises(ValueError, match=r"there is no access token; log in with `hf auth login`, or set HF_TOKEN"):
        push.push_folder(built, REPO)


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_a_push_replaces_is_said(
    dry_run: bool, hub: LoopbackHub, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = f"{REPO} holds other weights, which this push replaces: out (commit "
    with caplog.at_level(logging.WARNING):
        upload(hub, model)
        upload(hub, model)  # the same ones
        assert said not in caplog.text
        weights = load_file(model / "model.safetensors")
        weights["logit_scale"] += 1
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        write_manifest(model, "build")
        upload(hub, model, repo_id="tester/other", dry_run=True)
        upload(hub, model, create_pr=True)
        assert said not in caplog.text
        upload(hub, model, dry_run=dry_run)
    assert said in caplog.text
    assert "To keep both, push to another repo; --create-pr opens a pull request instead" in caplog.text


def test_a_dry_run_needs_no_network_and_says_what_it_did_not_check(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert cli.main(["push", str(model), REPO, "--no-check", "--dry-run"]) == 0
    assert f"what {REPO} holds now is not checked: {REPO}: the connection broke" in caplog.text
