"""What is computed from whole data sets is computed once per machine."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest

from llm2clip.utils.shared_files import shared_file


def test_the_first_process_writes_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    calls = []

    def write(path: Path) -> None:
        calls.append(path)
        time.sleep(0.2)
        path.write_text("content")

    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: shared_file("kind", {"a": 1}, write), range(4)))
    assert len(set(paths)) == len(calls) == 1
    assert paths[0].read_text() == "content"
    assert shared_file("kind", {"a": 2}, write) != paths[0]
    # The lock that a killed process has left, too: that of a file that exists has no use.
    Path(f"{paths[0]}.lock").touch()
    shared_file("kind", {"a": 1}, write)
    assert len(list((tmp_path / "llm2clip").iterdir())) == 2


def test_an_error_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    def write(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        shared_file("kind", {}, write)
    assert shared_file("kind", {}, lambda path: path.write_text("whole") and None).read_text() == "whole"
