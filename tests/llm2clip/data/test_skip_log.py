from __future__ import annotations

import json
from pathlib import Path

from llm2clip.data import SkipLog


def test_skip_log_lists_each_key_once(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "skipped.jsonl"
    log = SkipLog(path)
    assert log.count == 0
    assert not path.exists()
    assert log.add([("a", "torn"), ("ü", "leer"), ("a", "again")]) == 2
    assert log.add([("a", "torn")]) == 0
    with path.open("a") as file:
        file.write('{"key": "half')  # killed while writing
    resumed = SkipLog(path)
    assert resumed.count == 2
    assert resumed.add([("b", "x"), ("a", "torn")]) == 1
    assert (resumed.take_new(), resumed.take_new()) == (["a", "ü", "b"], [])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"key": "a", "reason": "torn"}, {"key": "ü", "reason": "leer"}, {"key": "b", "reason": "x"}]
