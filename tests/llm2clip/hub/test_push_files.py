"""What `llm2clip push` uploads, and what it lets the code in a folder do."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from llm2clip import cli
from llm2clip.hub import new_process
from llm2clip.hub.upload_files import model_files
from llm2clip.utils.files import read_json, write_json
from llm2clip.utils.manifests import FOLDER_MANIFEST, MODEL_MANIFEST
from tests.llm2clip.hub.conftest import REPO, upload
from tests.loopback_hub import LoopbackHub

STRANGE = ("id_rsa", "notes.txt", "data/train.csv", "secret.json", "my_tool.py", "model.safetensors.bak")


def add(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")


@pytest.fixture
def folder(model: Path) -> Path:
    add(model, *STRANGE)
    return model


def test_only_what_belongs_to_a_model_is_uploaded(
    hub: LoopbackHub, built: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        upload(hub, folder)
    expected = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()} - {".llm2clip.json"}
    assert set(hub.repo(REPO).files()) == expected
    assert "not uploaded, as no model needs them: data/train.csv, id_rsa, " in caplog.text
    assert "--include PATTERN uploads them" in caplog.text
    upload(hub, folder, include=["data/*", "notes.txt"])
    assert set(hub.repo(REPO).files()) == expected | {"data/train.csv", "notes.txt"}
    with pytest.raises(ValueError, match=r"--include \*\.parquet fits no file"):
        upload(hub, folder, include=["*.parquet"])


def test_files_of_a_training_run_are_left_out_without_a_word(folder: Path) -> None:
    before = model_files(folder)
    add(folder, "checkpoint-3/model.safetensors", "runs/events", "log.txt", "optimizer.pt", "training_args.bin")
    assert model_files(folder) == before


def test_pictures_of_the_card_are_uploaded(folder: Path) -> None:
    add(folder, "images/shown.png", "images/private.png")
    card = folder / "README.md"
    card.write_text(card.read_text() + "\n![shown](images/shown.png)\n")
    files = model_files(folder)
    assert "images/shown.png" in files.uploaded
    assert "images/private.png" in files.others


@pytest.mark.parametrize("name", ["model.safetensors", "LICENSE", "notes.txt"])
def test_a_link_out_of_the_folder_is_refused(name: str, hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(ValueError, match=rf"{name} is a link out of the folder, to {outside}"):
        upload(hub, folder, include=["notes.txt"])
    assert not hub.repos or not hub.repo(REPO).files()
    # A link within it is a file.
    (folder / name).unlink()
    outside.rename(folder / "inside")
    (folder / name).symlink_to("inside")
    assert name in model_files(folder, ["notes.txt"]).uploaded


def without_lists(folder: Path) -> None:
    for name in (FOLDER_MANIFEST, MODEL_MANIFEST):  # as whoever changes a file can
        (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize("name", [".env", ".git/config", "runs/.netrc"])
def test_hidden_files_are_uploaded_only_if_a_pattern_names_them(name: str, folder: Path) -> None:
    add(folder, name)
    files = model_files(folder, ["*", "*/*"]).uploaded
    assert name not in files
    assert FOLDER_MANIFEST not in files
    assert {"id_rsa", "data/train.csv"} <= set(files)
    assert name in model_files(folder, [name]).uploaded


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("config.json", "hf_" + "aB3" * 12),
        ("README.md", "hf_write"),  # the token of the test
        ("tokenizer_config.json", "AKIA" + "Q7" * 8),
        ("notes.txt", "-----BEGIN OPENSSH PRIVATE KEY-----"),
    ],
)
def test_a_token_in_a_file_is_not_published(name: str, secret: str, hub: LoopbackHub, folder: Path) -> None:
    without_lists(folder)
    text = (folder / name).read_text()
    (folder / name).write_text(f'{{"x": "{secret}", {text[1:]}' if name.endswith(".json") else text + secret)
    with pytest.raises(ValueError, match=f"{name} contains what looks like an access token or private key") as caught:
        upload(hub, folder, include=["notes.txt"])
    assert secret not in str(caught.value)
    assert not hub.repos


def test_a_file_that_was_not_built_but_would_be_loaded_is_refused(hub: LoopbackHub, model: Path) -> None:
    add(model, "adapter_config.json")
    with pytest.raises(ValueError, match=r"contains adapter_config.json, which was not built but would be loaded"):
        upload(hub, model)
    assert not hub.repos


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"auto_map": "x"}, r"config\.json cannot be read: AttributeError"),
        ({"custom_pipelines": {"x": {}}}, r"config\.json cannot be read: KeyError"),
        ({"text_model_name_or_path": 3}, "is in 3, which others cannot load"),
    ],
)
def test_fields_of_another_type_are_refused(
    fields: dict[str, Any], message: str, hub: LoopbackHub, folder: Path
) -> None:
    without_lists(folder)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **fields})
    with pytest.raises(ValueError, match=message):
        upload(hub, folder)
    assert not hub.repos


@pytest.mark.parametrize("name", ["chat_template.txt", "README.md", "model.safetensors"])
def test_what_changes_after_the_check_is_not_uploaded(
    name: str, hub: LoopbackHub, built: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the code in the folder could do, or a run that writes there."""

    def spoil(folder: Path) -> float:
        path = folder / name
        times = path.stat() if path.is_file() else None
        path.write_bytes(path.read_bytes()[:-1] + b"?" if times else b"what it found on this machine")
        if times:
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        return 0.0

    monkeypatch.setattr("llm2clip.hub.push.validate_folder", spoil)
    if name == "model.safetensors":
        monkeypatch.setattr("llm2clip.hub.secrets.SMALL", (model / name).stat().st_size)
        with pytest.raises(ValueError, match="has changed while it was checked; nothing was committed"):
            upload(hub, model, check=True)
        assert not hub.repos
        return
    upload(hub, model, check=True)
    pushed = hub.repo(REPO).files()
    assert name in pushed or not (built / name).exists()
    assert all(pushed[file] == (built / file).read_bytes() for file in pushed if file != "README.md")
    assert not pushed["README.md"].endswith(b"?")


PROBE = """
import json, os, socket, subprocess
tried = {}
for name, action in (
    ("connection", lambda: socket.create_connection(("127.0.0.1", 9), timeout=1)),
    ("name", lambda: socket.getaddrinfo("localhost", 80)),
    ("program", lambda: subprocess.run(["true"])),
    ("system", lambda: os.system("true")),
):
    try:
        action()
        tried[name] = "done"
    except OSError as error:
        tried[name] = "refused" if isinstance(error, PermissionError) else "tried"
with open(%r, "w") as file:
    json.dump({**tried, "variables": sorted(os.environ)}, file)
"""


def test_the_code_of_a_folder_has_no_network_and_no_token(
    hub: LoopbackHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "hf_secret")
    code = folder / "modeling_llm2clip.py"
    text = code.read_text()
    place = text.index("\nimport torch")
    code.write_text(text[:place] + PROBE % str(tmp_path / "found.json") + text[place:])
    without_lists(folder)
    with caplog.at_level(logging.INFO):
        upload(hub, folder, check=True)
    assert f"loading {folder} here and in a new process, which runs the code in it (--no-check: not)" in caplog.text
    found = json.loads((tmp_path / "found.json").read_text())
    variables = found.pop("variables")
    assert found == dict.fromkeys(("connection", "name", "program", "system"), "refused")
    ours = {"HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_TOKEN_PATH"}
    assert {name for name in variables if new_process.SECRET.search(name)} == ours
    assert "PATH" in variables


def test_the_code_of_a_folder_is_not_run_with_no_check(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks: list[bool] = []
    monkeypatch.setattr("llm2clip.hub.push.run", lambda config: checks.append(config.check))
    for options in ([], ["--no-check"], ["--no_check"], ["--check", "false"]):
        assert cli.main(["push", str(folder), REPO, *options]) == 0
    assert checks == [True, False, False, False]
    assert cli.main(["push", str(folder), REPO, "--no-include"]) == 2
    assert "there is no option --no-include" in capsys.readouterr().err


def test_a_dry_run_lists_what_a_push_uploads_and_why_not_the_rest(
    hub: LoopbackHub, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(model, "notes.txt", "table.csv", "checkpoint-4/config.json", "checkpoint-4/optimizer.pt")
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["push", str(model), REPO, "--no-check", "--include", "table.csv", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert not hub.repos
    assert not hub.requests
    assert f"would_upload_to: {REPO}" in printed
    listed, left = printed.split("Would not be uploaded")
    expected = upload(hub, model, include=["table.csv"])
    assert f"files: {expected['files']}" in left
    assert all(name in listed for name in hub.repo(REPO).files())
    assert f"{(model / 'model.safetensors').stat().st_size:,}" in listed
    for words in ("no model needs it; --include 'notes.txt' uploads it", ".llm2clip.json", "checkpoint-4/"):
        assert words in left
    assert " 8 " in left.split("checkpoint-4/")[1].splitlines()[0]
    assert "optimizer" not in printed


def test_a_dry_run_makes_the_checks_of_a_push(
    hub: LoopbackHub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["push", str(model), REPO, "--no-check", "--dry-run"]
    (model / "LICENSE").write_text("hf_" + "a" * 34)
    assert cli.main(command) == 2
    assert "looks like an access token" in capsys.readouterr().err
    (model / "model.safetensors").unlink()
    assert cli.main(command) == 2
    assert "lacks *.safetensors" in capsys.readouterr().err
    assert not hub.requests
