"""What is computed from whole data sets is computed once per machine."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import datasets
import pytest
from filelock import FileLock

from llm2clip.files.shared_files import shared_file


def test_the_first_process_writes_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    calls = []

    def write(path: Path) -> None:
        calls.append(path)
        time.sleep(0.2)
        path.write_text("half")
        if len(calls) == 1:
            raise OSError("disk full")
        path.write_text("content")

    with pytest.raises(OSError, match="disk full"):
        shared_file("kind", {"a": 1}, write)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: shared_file("kind", {"a": 1}, write), range(4)))
    assert (len(paths), len(calls)) == (1, 2)
    (path,) = paths
    assert path.read_text() == "content"
    assert shared_file("kind", {"a": 2}, write) != path


def test_without_locks_the_file_that_another_process_writes_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as on the nodes of a cluster whose home folder has no locks."""

    def no_locks(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(FileLock, "acquire", no_locks)
    written_by_another = []

    def write(path: Path) -> None:
        path.write_text("content")
        if not written_by_another:
            written_by_another.append(path)
            shared_file("kind", {"a": 1}, write)

    assert shared_file("kind", {"a": 1}, write).read_text() == "content"
