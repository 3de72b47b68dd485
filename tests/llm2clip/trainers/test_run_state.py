from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm2clip.trainers.run_state import SkipLog


def test_skip_log_lists_each_key_once(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "skipped.jsonl"
    log = SkipLog(path)
    assert not path.exists()
    log.add([("a", "torn"), ("ü", "leer"), ("a", "again")])
    log.add([("a", "torn")])
    with path.open("a") as file:
        file.write('{"key": "half')  # killed while writing
    resumed = SkipLog(path)
    resumed.add([("b", "x"), ("a", "torn")])
    assert (resumed.take_new(), resumed.take_new()) == (["a", "ü", "b"], [])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"key": "a", "reason": "torn"}, {"key": "ü", "reason": "leer"}, {"key": "b", "reason": "x"}]


def test_a_run_continues_its_log_and_another_one_begins_anew(tmp_path: Path) -> None:
    log = SkipLog(tmp_path / "skipped.jsonl")
    log.add([("a", "torn")])
    log.open(continued=True)
    assert log.take_new() == ["a"]
    log.open(continued=False)
    assert log.take_new() == []


def test_a_damaged_log_is_named_unless_it_is_of_another_run(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    path.write_bytes(bytes(20) + b"\n")
    log = SkipLog(path)
    with pytest.raises(ValueError, match=r"skipped\.jsonl cannot be read"):
        log.take_new()
    log.open(continued=False)
    assert log.take_new() == []
