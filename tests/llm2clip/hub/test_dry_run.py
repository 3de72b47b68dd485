"""`llm2clip push --dry-run` lists what a push uploads, after the same checks, and asks nobody."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llm2clip import cli
from tests.llm2clip.hub.conftest import REPO, upload
from tests.loopback_hub import LoopbackHub


def test_a_dry_run_lists_what_a_push_uploads_and_why_not_the_rest(
    hub: LoopbackHub, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(built, folder)
    (folder / "checkpoint-4").mkdir()
    for name in ("notes.txt", "table.csv", "checkpoint-4/config.json", "checkpoint-4/optimizer.pt"):
        (folder / name).write_text("12345")
    monkeypatch.setenv("COLUMNS", "200")
    command = ["push", str(folder), REPO, "--no-check", "--include", "table.csv"]
    assert cli.main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert not hub.repos
    assert not hub.requests
    assert f"would_upload_to: {REPO}" in printed
    listed, left = printed.split("Not uploaded")
    expected = upload(hub, folder, include=["table.csv"])
    assert f"files: {expected['files']}" in left
    assert all(name in listed for name in hub.repo(REPO).files())
    assert f"{(folder / 'model.safetensors').stat().st_size:,}" in listed
    for words in (
        "notes.txt",
        "no model needs it; --include 'notes.txt' uploads it",
        ".llm2clip.json",
        "checkpoint-4/",
    ):
        assert words in left
    assert " 10 " in left.split("checkpoint-4/")[1].splitlines()[0]
    assert "optimizer" not in printed


def test_a_dry_run_makes_the_checks_of_a_push(
    hub: LoopbackHub, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(built, folder)
    command = ["push", str(folder), REPO, "--no-check", "--dry-run"]
    (folder / "LICENSE").write_text("hf_" + "a" * 34)
    assert cli.main(command) == 2
    assert "looks like an access token" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    assert cli.main(command) == 2
    assert "has no weights" in capsys.readouterr().err
    assert not hub.requests
