"""The generated data set, the watching of processes, and the tables of the scale benchmark, at a small size."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.scale import data, tables
from benchmarks.scale.alignment import AlignTrial, align
from benchmarks.scale.embedding import Trial, embed
from benchmarks.scale.processes import run_watched
from benchmarks.scale.reading import ReadTrial, read
from llm2clip.data.tars import list_tar

EMBEDDED: dict[str, Any] = {
    "step": "embed",
    "captions": 100_000,
    "processes": 2,
    "engine": "processes",
    "kills": 0,
    "seconds": 30.0,
    "rows_per_second": 6000.0,
    "cpu_microseconds_per_row": 150.0,
    "peak_bytes": 6e8,
    "bytes": 1e8,
    "verify_seconds": 3.0,
    "machine": "a machine",
    "date": "2026-11-27",
}


def test_a_larger_data_set_begins_with_a_smaller_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CAPTIONS_PER_TAR", 30)
    assert data.write_tars(tmp_path, 60, processes=1) == 2
    first = (tmp_path / "00001.tar").read_bytes()
    assert data.write_tars(tmp_path, 90, processes=1) == 1
    assert (tmp_path / "00001.tar").read_bytes() == first
    found = {name: part.read() for name, part in list_tar(tmp_path / "00001.tar")}
    captions = [content.decode() for name, content in found.items() if name.endswith(".txt")]
    assert captions == list(data.captions_of(1))
    assert len(set(captions)) > 25
    assert sorted(found)[0] == "000000030.jpg"


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="10,000,000 captions need 38 GB"):
        data.write_tars(tmp_path, 10_000_000)
    assert not list(tmp_path.iterdir())


def test_what_else_is_in_the_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CAPTIONS_PER_TAR", 5)
    folder = tmp_path / "scale"
    data.write_tars(folder / "data", 10, processes=1)
    linked = data.link_tars(folder, 5)
    assert [path.name for path in linked.iterdir()] == ["00000.tar"]
    (folder / "thesis.txt").write_text("mine")
    data.clean(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    (folder / "thesis.txt").unlink()
    data.clean(folder)
    assert not folder.exists()


def test_a_watched_command_is_killed_with_all_its_processes(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True:\n    pathlib.Path({str(alive)!r}).touch()\n    time.sleep(0.05)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    watched = run_watched(["-c", parent], tmp_path / "log", lambda: int(alive.exists()), kill_at=1)
    assert watched.status < 0
    assert len(watched.peaks) == 2
    assert watched.peak > 2**20
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


def test_the_newest_figures_are_in_the_table_and_in_the_plot(tmp_path: Path) -> None:
    larger = {**EMBEDDED, "captions": 10_000_000, "kills": 2, "seconds": 1800.0, "engine": "ray"}
    lines = [json.dumps(entry) for entry in (larger, EMBEDDED, {**EMBEDDED, "rows_per_second": 7000.0})]
    entries = tables.newest(lines)
    text = tables.tables(entries)
    assert text.splitlines()[2:] == [
        "| 100,000 captions, torchrun | 2 | never | 7,000 | 150 µs | 30.0 s | 0.60 GB | 0.10 GB | 3.0 s |",
        "| 10,000,000 captions, Ray Data | 2 | 2 | 6,000 | 150 µs | 30.0 min | 0.60 GB | 0.10 GB | 3.0 s |",
    ]
    tables.draw(entries, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 600


def test_alignments_have_a_table_and_no_line_in_the_plot(tmp_path: Path) -> None:
    aligned = {"step": "align", "captions": 10_000_000, "processes": 1, "threads": 2, "seconds": 600.0}
    aligned |= {"cpu_seconds": 800.0, "rows_per_second": 16_666.7, "peak_bytes": 8e8, "bytes": 26e9}
    entries = tables.newest(json.dumps({**EMBEDDED, **aligned, "threads": threads}) for threads in (2, 1, 2))
    assert tables.tables(entries).splitlines()[2:] == [
        "| 10,000,000 pairs | 1 | 16,667 | 80 µs | 10.0 min | 0.80 GB | 26.00 GB |",
        "| 10,000,000 pairs | 2 | 16,667 | 80 µs | 10.0 min | 0.80 GB | 26.00 GB |",
    ]
    tables.draw([*entries, EMBEDDED], tmp_path / "plot.png")


@pytest.mark.slow
@pytest.mark.nightly
def test_pairs_are_written_and_aligned(tmp_path: Path) -> None:
    figures = align(tmp_path, AlignTrial(pairs=20_000))
    assert (figures["captions"], figures["threads"]) == (20_000, 2)
    assert figures["bytes"] > 20_000 * 2 * (512 + 768)
    assert figures["peak_bytes"] < 1e9


@pytest.mark.slow
@pytest.mark.nightly
def test_a_data_set_is_embedded_by_processes_that_are_killed_on_the_way(tmp_path: Path) -> None:
    figures = embed(tmp_path, Trial(captions=40_000, processes=2, kills=1))
    assert (figures["captions"], figures["kills"], figures["left_over"]) == (40_000, 1, [])
    assert figures["peak_bytes"] < 1.5e9
    found = read(tmp_path, ReadTrial(captions=40_000, processes=2, workers=1))
    assert (found["rows"], found["resumed_at"]) == (19_968, 39)
    assert found["rows_per_second"] > 0
