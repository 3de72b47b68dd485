"""Processes that write to S3 (a server on a loopback port) are killed or meet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from .helpers import QUERY, Model, as_json, encoded, picture
from .places import Place
from .updates import kill_updates

PLACE = "s3://bucket/index"
IN_S3 = pytest.mark.parametrize("place", ["bucket"], indirect=True)
pytestmark = pytest.mark.slow


def parts() -> int:
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    return len(files.find(f"{PLACE}/images.lance/data"))


def add_pictures(folder: Path, count: int) -> None:
    for number in range(count):
        (folder / f"new {number:04}.png").write_bytes(encoded(picture(1000 + number)))


def command(pictures: Path, model: Path) -> list[str]:
    settings = ["--num-workers", "0", "--batch-size", "4", "--part-size", "4"]
    images = ["index", str(pictures), "--model", str(model), "--output-dir", PLACE]
    return [sys.executable, "-m", "llm2clip", *images, *settings]


@IN_S3
def test_a_run_killed_by_a_signal_leaves_the_index_in_s3_and_is_resumed(
    place: Place, pictures: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.index(pictures, model[0]) == (12, 0, 0, 0, 12)
    early = place.open()
    expected = early.search(QUERY, 20)
    add_pictures(pictures, 80)
    (pictures / "00.png").unlink()
    before = parts()
    run = command(pictures, model[0])
    with subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while parts() < before + 3:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert parts() < before + 20
    for reader in (early, place.open()):
        assert reader.search(QUERY, 20) == expected
    again = subprocess.run(run, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming an unfinished run" in again.stderr
    assert "embedded: 80\n" in again.stdout
    assert early.search(QUERY, 20) == expected
    keys = [row["key"] for row in place.content()["rows"]]
    assert keys == sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png"))
    (found,) = as_json(capsys, PLACE, "--image", pictures / "new 0050.png", "--top", "1")
    assert found["results"][0]["key"] == "new 0050.png"


def test_an_update_in_s3_killed_at_any_moment_leaves_the_old_index(bucket: str) -> None:
    assert kill_updates(f"{bucket}/index", (0, 0.3, 1.0)) >= 2


@IN_S3
def test_of_two_runs_at_once_in_s3_one_stops_and_nothing_is_mixed(place: Place, pictures: Path, model: Model) -> None:
    add_pictures(pictures, 80)
    run = command(pictures, model[0])
    running = [subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in running]
    failed = [shown for process, shown in zip(running, errors, strict=True) if process.returncode]
    assert failed
    assert all("another run writes to the index s3://bucket/index" in shown for shown in failed), failed
    assert place.index(pictures, model[0])[-1] == 92
    keys = [row["key"] for row in place.content()["rows"]]
    assert len(keys) == len(set(keys)) == 92
