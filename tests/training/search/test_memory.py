"""Memory while indexing, and a run that is really killed. In processes of their own, which end after a measurement."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.modeling import tiny

WIDTH = 1280
GIB = 2**30


def save_pictures(folder: Path, count: int) -> Path:
    """`count` different pictures, 500 to a subfolder."""
    for number in range(count):
        path = folder / f"{number // 500:03d}" / f"picture-{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, number // 65536)).save(path)
    return folder


def peak_memory(folder: Path, model: Path, output: Path) -> int:
    """Bytes that indexing a folder with two workers takes at most, shared pages counted once."""
    command = [sys.executable, "-m", "llm2clip_training.cli", "index", str(folder), "--model", str(model)]
    command += ["--num-workers", "2", "--part-size", "1024", "--output-dir", str(output)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, _memory(psutil.Process(process.pid)))
            time.sleep(0.05)
    assert process.returncode == 0
    return peak


def _memory(process: psutil.Process) -> int:
    try:
        return sum(one.memory_full_info().pss for one in (process, *process.children(recursive=True)))
    except psutil.Error:  # it has just ended
        return 0


@pytest.mark.slow
def test_a_hundred_thousand_images_stay_below_two_gib(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model", projection_dim=WIDTH)
    few, many = 1000, 9000
    base, more = (
        peak_memory(save_pictures(tmp_path / str(count), count), tmp_path / "model", tmp_path / f"index-{count}")
        for count in (few, many)
    )
    per_image = max(0, more - base) / (many - few)
    print(f"{base / 2**20:.0f} MiB with {few} images, {more / 2**20:.0f} with {many}: {per_image:.0f} bytes per image")
    # An embedding in float32 for faiss, in float16 for the data set, and the same on its way to disk.
    assert per_image < 10 * WIDTH
    assert base + 100_000 * per_image < 2 * GIB


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    folder = save_pictures(tmp_path / "pictures", 2000)
    command = [sys.executable, "-m", "llm2clip_training.cli", "index", str(folder), "--model", str(tmp_path / "model")]
    command += ["--part-size", "128", "--num-workers", "1"]
    unfinished = tmp_path / "index.unfinished"
    with subprocess.Popen([*command, "--output-dir", str(tmp_path / "index")], stderr=subprocess.PIPE) as process:
        while len(list(unfinished.glob("part-*.arrow"))) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "index").exists()
    parts = {part: part.stat().st_mtime_ns for part in unfinished.glob("part-*.arrow")}
    assert 2 <= len(parts) < 2000 / 128
    again = subprocess.run([*command, "--output-dir", str(tmp_path / "index")], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on from an unfinished run" in again.stderr
    assert "embedded: 2000\n" in again.stdout
    subprocess.run([*command, "--output-dir", str(tmp_path / "whole")], check=True, capture_output=True)
    for name in ("index.faiss", "data-00000-of-00001.arrow", "manifest.json"):
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
