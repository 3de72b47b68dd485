"""The scale script: its page has the numbers of its record, and what it watches is killed whole."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks import scale
from benchmarks.watching import run_watched


def test_the_page_contains_the_tables_of_the_record() -> None:
    text, lines = scale.PAGE.read_text(encoding="utf-8"), scale.RECORD.read_text(encoding="utf-8").splitlines()
    assert scale.fill(text, scale.tables(lines)) == text
    with pytest.raises(ValueError, match="has 0 places for the measured tables"):
        scale.fill("# No tables\n", scale.tables(lines))


def test_a_watched_command_is_killed_with_all_its_processes(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True:\n    pathlib.Path({str(alive)!r}).touch()\n    time.sleep(0.05)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    watched = run_watched(["-c", parent], tmp_path / "log", lambda: int(alive.exists()), kill_at=1)
    assert len(watched.peaks) == 2
    assert max(watched.peaks.values()) > 2**20
    alive.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not alive.exists()
    with pytest.raises(RuntimeError, match=r"status 1:(.|\n)*ZeroDivisionError"):
        run_watched(["-c", "1 / 0"], tmp_path / "log")


@pytest.mark.slow
@pytest.mark.nightly
def test_a_data_set_is_embedded_by_processes_that_are_killed_on_the_way(tmp_path: Path) -> None:
    figures = scale.embed(tmp_path, captions=40_000, processes=2, kills=1)
    assert (figures["captions"], figures["kills"], figures["left_over"]) == (40_000, 1, [])
    assert figures["peak_bytes"] < 1.5e9
    found = scale.read(tmp_path, captions=40_000, processes=2, workers=1)
    assert (found["rows"], found["resumed_at"]) == (19_968, 39)
