"""Memory and open files of indexing, mostly in a separate process."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image

from llm2clip.encoders.ours import OurEncoder
from llm2clip.search.folder_items import FolderImages
from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.lance_store import LanceStore
from tests.builders import tiny

from .helpers import encoded, picture
from .updates import with_embeddings

WIDTH = 1280
PART = 1024
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
    command = index_command(folder, model, output, "--part-size", str(PART))
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


def pretend_embedded(folder: Path, model: Path, output: Path, count: int) -> None:
    """Write what a run that was killed after `count` pictures leaves, with random embeddings."""
    images, encoder = FolderImages(folder), OurEncoder.load(str(model), needs=["image"])
    fields = (encoder.image_fingerprint(), encoder.width, "float16", images.source, {})
    store, generator = LanceStore(output), np.random.default_rng(0)
    described = pa.concat_tables(images.batches())[:count]
    with store.lock():
        for start in range(0, count, PART):
            embeds = generator.standard_normal((PART, encoder.width), dtype=np.float32)
            rows = with_embeddings(described[start : start + PART], embeds)
            if start == 0:
                store.begin(IndexManifest(str(model), None, *fields), rows.schema, "nothing")
            store.upsert(rows)


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
def test_indexing_40000_images_stays_below_one_gib(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model", projection_dim=WIDTH)
    folder = save_pictures(tmp_path / "pictures", 40_000)
    pretend_embedded(folder, tmp_path / "model", tmp_path / "index", 38 * PART)
    first = peak_memory(folder, tmp_path / "model", tmp_path / "index")
    Image.new("RGB", (9, 9)).save(folder / "000" / "new.png")
    update = peak_memory(folder, tmp_path / "model", tmp_path / "index")
    assert json.loads((tmp_path / "index" / "manifest.json").read_text())["images"] == 40_001
    print(f"{first / 2**20:.0f} MiB, {update / 2**20:.0f} MiB for an update")
    assert max(first, update) < GIB


@pytest.mark.slow
def test_embeddings_are_not_all_held_in_memory(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model", projection_dim=WIDTH)
    few, many = 8_000, 40_000  # the fewer are in several parts too
    base, more = (
        peak_memory(save_pictures(tmp_path / str(count), count), tmp_path / "model", tmp_path / f"index-{count}")
        for count in (few, many)
    )
    per_image = (more - base) / (many - few)
    print(f"{base / 2**20:.0f} MiB with {few} images, {more / 2**20:.0f} with {many}: {per_image:.0f} bytes per image")
    # An embedding has twice as many bytes as values, and as float32 four times as many; peaks differ by 70 MiB.
    assert per_image < 4 * WIDTH
