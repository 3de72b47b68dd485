"""What `llm2clip push` uploads, and what it lets the code in a folder do."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from llm2clip import cli
from llm2clip.hub import new_process
from llm2clip.hub.upload_files import model_files
from llm2clip.utils.manifests import FOLDER_MANIFEST, MODEL_MANIFEST
from tests.llm2clip.hub.conftest import REPO, upload
from tests.loopback_hub import LoopbackHub

STRANGE = ("id_rsa", "notes.txt", "data/train.csv", "secret.json", "my_tool.py", "model.safetensors.bak")


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(built, copy)
    for name in STRANGE:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("mine")
    return copy


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
    for name in (
        "checkpoint-3/model.safetensors",
        "runs/events",
        "log.txt",
        "optimizer.pt",
        "training_args.bin",
        ".env",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    assert model_files(folder) == before
    assert ".env" in model_files(folder, [".env"]).uploaded


def test_pictures_of_the_card_are_uploaded(folder: Path) -> None:
    (folder / "images").mkdir()
    for name in ("images/shown.png", "images/private.png"):
        (folder / name).write_bytes(b"")
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


def test_a_link_within_the_folder_is_uploaded(hub: LoopbackHub, folder: Path) -> None:
    (folder / "LICENSE").rename(folder / "LICENSE.txt")
    (folder / "LICENSE").symlink_to("LICENSE.txt")
    upload(hub, folder)
    assert hub.repo(REPO).files()["LICENSE"] == (folder / "LICENSE.txt").read_bytes()


PROBE = """
import json, os
def found():
    import socket, subprocess
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
        except PermissionError:
            tried[name] = "refused"
        except OSError as error:
            tried[name] = "tried"
    tried["variables"] = sorted(os.environ)
    return tried
with open(%r, "w") as file:
    json.dump(found(), file)
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
    for name in (FOLDER_MANIFEST, MODEL_MANIFEST):  # as whoever changes the code can
        (folder / name).unlink()
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
