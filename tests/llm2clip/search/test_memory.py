"""Memory and open files of indexing, and killed runs; each in a separate process."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llm2clip.search.search_index import SearchIndex
from tests.modeling_llm2clip import tiny

from .helpers import encoded, picture
from .updates import kill_updates

WIDTH = 1280
PART = 1024
PIXELS = encoded(picture(0))


def save_pictures(folder: Path, count: int) -> Path:
    """Write `count` pictures, 500 per subfolder."""
    for number in range(count):
        path = folder / f"{number // 500:03d}" / f"picture-{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PIXELS)
    return folder


def peak_memory(folder: Path, model: Path, output: Path) -> int:
    """Measure the peak memory of indexing a folder with two workers, counting shared pages once."""
    command = [sys.executable, "-m", "llm2clip", "index", str(folder), "--model", str(model)]
    command += ["--num-workers", "2", "--part-size", str(PART), "--output-dir", str(output)]
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
    except psutil.Error:  # the process has just ended
        return 0


@pytest.mark.slow
def test_large_batches_stay_below_128_open_files(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    folder = save_pictures(tmp_path / "pictures", 600)
    command = [sys.executable, "-m", "llm2clip", "index", str(folder), "--model", str(tmp_path / "model")]
    command += ["--num-workers", "2", "--batch-size", "256", "--output-dir", str(tmp_path / "index")]
    result = subprocess.run(
        command,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)),
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "embedded: 600\n" in result.stdout


@pytest.mark.slow
def test_embeddings_are_not_held_in_memory_and_40000_images_stay_below_one_gib(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model", projection_dim=WIDTH)
    few, many = 8_000, 40_000  # the fewer are in several parts too
    base, more = (
        peak_memory(save_pictures(tmp_path / str(count), count), tmp_path / "model", tmp_path / f"index-{count}")
        for count in (few, many)
    )
    (tmp_path / str(many) / "000" / "new.png").write_bytes(encoded(picture(1)))
    update = peak_memory(tmp_path / str(many), tmp_path / "model", tmp_path / f"index-{many}")
    assert len(SearchIndex.open(tmp_path / f"index-{many}")) == many + 1
    per_image = (more - base) / (many - few)
    print(f"{base / 2**20:.0f} MiB with {few} images, {more / 2**20:.0f} with {many}: {per_image:.0f} bytes per image")
    # An embedding has twice as many bytes as values, and as float32 four times as many; peaks differ by 70 MiB.
    assert per_image < 4 * WIDTH
    assert max(more, update) < 2**30


@pytest.mark.slow
def test_an_update_killed_at_any_moment_leaves_the_old_index(tmp_path: Path) -> None:
    # The last ones may come too late.
    assert kill_updates(tmp_path / "index", (0, 0.02, 0.05, 0.1, 0.3)) >= 2
