"""What `llm2clip push` keeps from being published, and what it lets the code in a folder do."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from llm2clip import cli
from llm2clip.files.manifests import FOLDER_MANIFEST
from llm2clip.hub import new_process
from llm2clip.hub.upload_files import model_files
from tests.llm2clip.hub.conftest import REPO, upload
from tests.loopback_hub import LoopbackHub


@pytest.fixture
def folder(model: Path) -> Path:
    """A built folder without the list of its files, as whoever changes a file can make it."""
    (model / FOLDER_MANIFEST).unlink()
    for name in ("notes.txt", "images/private.png", ".env", ".git/config", "runs/.netrc"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("mine")
    return model


@pytest.mark.parametrize("name", [".env", ".git/config", "runs/.netrc"])
def test_hidden_files_are_uploaded_only_if_a_pattern_names_them(name: str, folder: Path) -> None:
    files = model_files(folder, ["*", "*/*"]).uploaded
    assert name not in files
    assert {"notes.txt", "images/private.png"} <= set(files)
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
    text = (folder / name).read_text()
    (folder / name).write_text(f'{{"x": "{secret}", {text[1:]}' if name.endswith(".json") else text + secret)
    with pytest.raises(ValueError, match=f"{name} contains what looks like an access token or private key") as caught:
        upload(hub, folder, include=["notes.txt"])
    assert secret not in str(caught.value)
    assert not hub.repos


@pytest.mark.parametrize(
    ("name", "message"),
    [("README.md", "contains what looks like an access token"), ("config.json", "is not what was written")],
)
def test_what_the_code_of_a_folder_changes_while_it_is_checked_is_not_uploaded(
    name: str, message: str, hub: LoopbackHub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(path.read_text() + "hf_" + "a" * 34)

    monkeypatch.setattr("llm2clip.hub.push.validate_folder", spoil)
    with pytest.raises(ValueError, match=message):
        upload(hub, model, check=True)
    assert not hub.repos


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
    before, line, after = code.read_text().partition("\nimport torch")
    code.write_text(before + PROBE % str(tmp_path / "found.json") + line + after)
    assert cli.main(["push", str(folder), REPO, "--no-check", "--dry-run"]) == 0
    assert not (tmp_path / "found.json").exists()
    with caplog.at_level(logging.INFO):
        upload(hub, folder, check=True)
    assert "in a new process, which runs the code in it (skip with --no-check)" in caplog.text
    tried = json.loads((tmp_path / "found.json").read_text())
    variables = tried.pop("variables")
    assert tried == dict.fromkeys(("connection", "name", "program", "system"), "refused")
    ours = {"HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_TOKEN_PATH"}
    assert {name for name in variables if new_process.SECRET.search(name)} == ours
    assert "PATH" in variables
