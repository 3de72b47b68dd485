"""Folders appear complete or not at all, and replace only what the same command wrote."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError

from llm2clip.files.atomic import temporary_name
from llm2clip.files.folders import atomic_folder, refuse_nested
from llm2clip.files.locks import lock_beside
from llm2clip.files.manifests import FOLDER_MANIFEST


def write(destination: Path, content: str, command: str = "build", overwrite: bool = True) -> None:
    with atomic_folder(destination, command, overwrite) as folder:
        (folder / "config.json").write_text(content)


def content(folder: Path) -> str:
    return (folder / "config.json").read_text()


def test_folder_does_not_appear_when_its_creation_fails(tmp_path: Path) -> None:
    def build() -> None:
        with atomic_folder(tmp_path / "model", "build") as folder:
            (folder / "config.json").write_text("{}")
            raise SafetensorError("full")

    with pytest.raises(OSError, match=r"model .*full"):
        build()
    assert list(tmp_path.iterdir()) == []


def test_folder_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "model", "old", overwrite=False)
    with pytest.raises(FileExistsError, match="--overwrite"):
        write(tmp_path / "model", "new", overwrite=False)
    assert content(tmp_path / "model") == "old"
    write(tmp_path / "model", "new")
    assert content(tmp_path / "model") == "new"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("command", "name", "text", "message"),
    [
        ("build", "notes.txt", "mine", r"\(notes.txt\)"),
        ("build", ".git/HEAD", "mine", r"\(\.git/HEAD\)"),
        ("convert", "config.json", "mine", "llm2clip build"),
        ("build", FOLDER_MANIFEST, "[]", "llm2clip build"),
    ],
    ids=["a file", "a folder", "another command", "a wrong manifest"],
)
def test_folder_that_others_wrote_or_wrote_into_is_not_replaced(
    command: str, name: str, text: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "model", "old", command)
    mine = tmp_path / "model" / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text(text)
    with pytest.raises(FileExistsError, match=message):
        write(tmp_path / "model", "new")
    assert mine.read_text() == text
    assert content(tmp_path / "model") in ("old", "mine")


def test_files_and_mounted_disks_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        write(tmp_path / "notes.txt", "new")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(FileExistsError, match="disk "):
        write(tmp_path / "disk", "new")


def test_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "model", "old")

    def build() -> None:
        with atomic_folder(tmp_path / "model", "build", overwrite=True):
            (tmp_path / "model" / "notes.txt").write_text("mine")

    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        build()
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_a_folder_gets_its_name_back_if_the_new_one_cannot_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model", "old")
    rename = Path.rename

    def refuse_new(path: Path, target: Path) -> Path:
        if path.name == "model" and path.parent != tmp_path:
            raise OSError("refused")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(OSError, match="refused"):
        write(tmp_path / "model", "new")
    assert content(tmp_path / "model") == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match=r"another run .*model")
    with lock_beside(tmp_path / "model"), ThreadPoolExecutor() as pool, refused:
        pool.submit(write, tmp_path / "model", "new").result()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exists", [True, False])
def test_link_is_followed(exists: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "disk" / "model", tmp_path / "link"
    if exists:
        write(target, "old")
    link.symlink_to(target)
    write(link, "new")
    assert link.is_symlink()
    assert content(target) == content(link) == "new"
    assert os.listdir(tmp_path / "disk") == ["model"]


def killed_process(folder: Path) -> Path:
    """The temporary folder of a process that was killed while it wrote `folder`."""
    left = temporary_name(folder)
    write(left / folder.name, "half")
    return left


def test_what_killed_runs_have_left_is_removed_and_a_replaced_folder_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed_process(tmp_path / "model")
    write(tmp_path / "model", "new", overwrite=False)
    assert os.listdir(tmp_path) == ["model"]
    left = killed_process(tmp_path / "model")
    (tmp_path / "model").rename(left / "replaced")
    with pytest.raises(FileExistsError, match="--overwrite"):
        write(tmp_path / "model", "newer", overwrite=False)
    assert "is back, which a killed run was about to replace" in caplog.text
    assert content(tmp_path / "model") == "new"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("source", "destination", "message"),
    [
        ("run/checkpoint-6", "run", "contains"),
        ("link", "run", "contains"),
        ("run", "link/built", "inside"),
    ],
)
def test_source_and_destination_must_be_apart(source: str, destination: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-6").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        refuse_nested(tmp_path / source, tmp_path / destination)
    refuse_nested("someone/model", tmp_path / "run")
    refuse_nested(tmp_path / "run", tmp_path / "run-built")
