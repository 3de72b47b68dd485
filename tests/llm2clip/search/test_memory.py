"""Memory and open files of indexing, mostly in a separate process."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import psutil
import pytest
from PIL import Image

from llm2clip.search.folder_items import FolderImages
from tests.builders import tiny

from .helpers import encoded, picture

WIDTH = 1280
SHARD = 1024
PIXELS = encoded(picture(0))
GIB = 2**30


def save_pictures(folder: Path, count: int) -> Path:
    """Write `count` pictures, 500 per subfolder."""
    for number in range(count):
        path = folder / f"{number // 500:03d}" / f"picture-{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PIXELS)
    return folder


def index_command(folder: Path, model: Path, output: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "llm2clip", "index", str(folder), "--model", str(model)]
    return [*command, "--num-workers", "2", "--output-dir", str(output), *options]


def peak_memory(folder: Path, model: Path, output: Path) -> int:
    """Measure the peak memory of indexing a folder with two workers, counting shared pages once."""
    command = index_command(folder, model, output, "--shard-size", str(SHARD))
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


def test_the_list_of_a_folder_holds_200_bytes_and_the_path_of_each_file(tmp_path: Path) -> None:
    images = FolderImages(save_pictures(tmp_path / "pictures", 2000))
    tracemalloc.start()
    try:
        count, (held, _) = len(images), tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 150 < held / count - len("000/picture-000000.png") < 200


@pytest.mark.slow
def test_large_batches_stay_below_128_open_files(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    folder = save_pictures(tmp_path / "pictures", 600)
    result = subprocess.run(
        index_command(folder, tmp_path / "model", tmp_path / "index", "--batch-size", "256"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)),
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "embedded: 600\n" in result.stdout


@pytest.mark.slow
def test_indexing_40000_images_and_an_update_stay_below_one_gib_and_do_not_hold_the_embeddings(tmp_path: Path) -> None:
    model, few, many = tmp_path / "model", 8_000, 40_000  # the fewer are in several shards too
    tiny.save(model, projection_dim=WIDTH)
    base, more = (
        peak_memory(save_pictures(tmp_path / str(count), count), model, tmp_path / f"index-{count}")
        for count in (few, many)
    )
    Image.new("RGB", (9, 9)).save(tmp_path / str(many) / "000" / "new.png")
    update = peak_memory(tmp_path / str(many), model, tmp_path / f"index-{many}")
    assert json.loads((tmp_path / f"index-{many}" / "manifest.json").read_text())["images"] == many + 1
    per_image = (more - base) / (many - few)
    print(f"{base >> 20}, {more >> 20} and for an update {update >> 20} MiB: {per_image:.0f} bytes per image")
    # An embedding has twice as many bytes as values, and as float32 four times as many; peaks differ by 70 MiB.
    assert per_image < 4 * WIDTH
    assert max(more, update) < GIB
