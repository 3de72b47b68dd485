"""Files appear complete or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from llm2clip.files import atomic
from tests.processes import run_python


def test_file_keeps_its_old_content_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    atomic.write_text(path, "old")

    def write() -> None:
        with atomic.atomic_file(path, "w") as file:
            file.write("half of the new con")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=f"'{path}'"):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["settings.json"]


@pytest.mark.parametrize(
    "save",
    ["safetensors.torch.save_file({'rows': rows}, path)", "torch.save(rows, path)"],
    ids=["safetensors", "torch"],
)
def test_tensors_that_do_not_fit_on_the_disk_are_an_error_of_the_system(save: str, tmp_path: Path) -> None:
    script = f"""
import resource, signal, torch, safetensors.torch
from llm2clip.files.atomic import atomic_path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
rows = torch.zeros(1000)
try:
    with atomic_path({str(tmp_path / "rows")!r}) as path:
        {save}
except OSError as error:
    print(error)
"""
    assert run_python(["-c", script]).stdout.startswith(f"{tmp_path / 'rows'} cannot be written: ")
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_in_a_folder_is_removed(tmp_path: Path) -> None:
    left = [atomic.temporary_name(tmp_path / name) for name in ("config.json", "config.json", "other.json")]
    kept = [".tmp", ".tmp-notes", ".config.json.mine.tmp", "model.safetensors"]
    for name in (*(path.name for path in left), ".tmpA1b2C3", *kept):
        (tmp_path / name).touch()
    assert set(atomic.leftovers(tmp_path / "config.json")) == set(left[:2])
    atomic.remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic.require_writable(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=rf"{tmp_path / 'file'}\b"):
        atomic.require_writable(tmp_path / "file" / "new")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match=rf"{tmp_path}\b"):
        atomic.require_writable(tmp_path / "new")


def test_file_is_complete_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append("rename"), replace(self, target))[1])
    atomic.write_json(tmp_path / "new" / "config.json", {"a": 1})
    assert order[:2] == ["fsync", "rename"]
    assert atomic.read_json(tmp_path / "new" / "config.json") == {"a": 1}


def test_two_processes_that_write_one_file_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    with atomic.atomic_path(path) as mine:
        mine.write_bytes(b"mine")
        with atomic.atomic_path(path) as other:
            other.write_bytes(b"other")
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"mine"
