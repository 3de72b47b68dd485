"""The generated data set, the watching of processes, and the tables of the scale script, at a small size."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from benchmarks import scale, scale_inputs
from benchmarks.watching import run_watched
from llm2clip.data.tars import list_tar


def test_tars_hold_the_captions_of_their_numbers_and_are_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale_inputs, "CAPTIONS_PER_TAR", 30)
    scale_inputs.write_tars(tmp_path, 60, processes=1)
    (tmp_path / "00000.tar").write_bytes(b"there")
    scale_inputs.write_tars(tmp_path, 60, processes=1)
    assert (tmp_path / "00000.tar").read_bytes() == b"there"
    found = {name: part.read() for name, part in list_tar(tmp_path / "00001.tar")}
    captions = [content.decode() for name, content in found.items() if name.endswith(".txt")]
    assert captions == list(scale_inputs.captions_of(1))
    assert len(set(captions)) > 25
    assert sorted(found)[0] == "000000030.jpg"


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=f"38 GB are needed in {tmp_path}, and 3 GB are free"):
        scale_inputs.write_tars(tmp_path, 10_000_000)
    assert not list(tmp_path.iterdir())


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


def test_the_failure_of_a_watched_command_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"{Path(sys.executable).name} -c .*status 1:(.|\n)*ZeroDivisionError"):
        run_watched(["-c", "1 / 0"], tmp_path / "log")


def test_cpu_seconds_of_a_watched_command_are_counted_between_units_of_work(tmp_path: Path) -> None:
    done = tmp_path / "done"
    busy = "end = time.process_time() + 0.6\nwhile time.process_time() < end: pass\n"
    code = f"import time, pathlib\n{busy}" + "".join(
        f"pathlib.Path({str(done)!r}).write_text('{number}')\n{busy}" for number in (1, 2, 3)
    )
    watched = run_watched(["-c", code], tmp_path / "log", lambda: int(done.read_text() or 0) if done.exists() else 0)
    seconds, units = watched.cpu_per_unit
    assert units == 2
    assert 1.0 < seconds < 2.2


def test_the_page_contains_the_tables_of_the_record() -> None:
    text, lines = scale.PAGE.read_text(encoding="utf-8"), scale.RECORD.read_text(encoding="utf-8").splitlines()
    assert scale.fill(text, scale.tables(lines)) == text
    with pytest.raises(ValueError, match="has 0 places for the measured tables"):
        scale.fill("# No tables\n", scale.tables(lines))


def test_the_newest_run_of_each_kind_is_in_the_table() -> None:
    run = json.loads(scale.RECORD.read_text(encoding="utf-8").splitlines()[0])
    larger = {**run, "captions": 10_000_000, "kills": 2, "seconds": 1800.0, "engine": "ray", "date": "2027-01-01"}
    table = scale.tables(map(json.dumps, (larger, run, {**run, "rows_per_second": 7000.0}))).splitlines()
    assert f"{run['date']} to 2027-01-01)" in table[0]
    assert table[2:] == [
        "| 100,000 | 2 | processes | 0 | 7,000 | 129 µs | 11.7 s | 0.57 GB | 0.10 GB | 4.4 s |",
        "| 10,000,000 | 2 | ray | 2 | 18,455 | 129 µs | 30.0 min | 0.57 GB | 0.10 GB | 4.4 s |",
    ]


@pytest.mark.slow
@pytest.mark.nightly
def test_a_data_set_is_embedded_by_processes_that_are_killed_on_the_way(tmp_path: Path) -> None:
    figures = scale.embed(tmp_path, captions=40_000, processes=2, kills=1)
    assert (figures["captions"], figures["kills"], figures["left_over"]) == (40_000, 1, [])
    assert figures["peak_bytes"] < 1.5e9
    found = scale.read(tmp_path, captions=40_000, processes=2, workers=1)
    assert (found["rows"], found["resumed_at"]) == (19_968, 39)
    assert found["rows_per_second"] > 0


@pytest.mark.slow
@pytest.mark.nightly
def test_pairs_are_written_and_aligned(tmp_path: Path) -> None:
    figures = scale.align(tmp_path, captions=20_000)
    assert (figures["captions"], figures["threads"]) == (20_000, 2)
    assert figures["bytes"] > 20_000 * 2 * (512 + 768)
    assert figures["peak_bytes"] < 1e9
