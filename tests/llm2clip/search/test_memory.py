"""Memory and open files of indexing, and a killed run; each in a separate process."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from llm2clip.embedding.image_embedder import ImageEmbedder
from llm2clip.search.embedding_store import write_part
from llm2clip.search.image_index import IndexManifest
from llm2clip.search.image_sets import FolderImages
from tests.modeling_llm2clip import tiny

from .conftest import encoded, picture

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


def pretend_embedded(folder: Path, model: Path, output: Path, count: int) -> None:
    """Write the files of a run that was killed after `count` pictures, with random embeddings."""
    images, embedder = FolderImages(folder), ImageEmbedder.load(str(model))
    unfinished = output.with_name(f"{output.name}.unfinished")
    manifest = IndexManifest(
        model=str(model),
        revision=None,
        vision_fingerprint=embedder.fingerprint(),
        width=embedder.width,
        dtype="float16",
        source=images.source,
        index={"type": "flat"},
    )
    manifest.write(unfinished)
    generator = np.random.default_rng(0)
    for number, start in enumerate(range(0, count, PART)):
        rows = range(start, min(count, start + PART))
        embeds = generator.standard_normal((len(rows), embedder.width), dtype=np.float32).astype(np.float16)
        columns = images.columns(rows).select(list(images.identity))
        write_part(unfinished / f"part-{number:06d}.arrow", columns, embeds, [None] * len(rows))


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
def test_indexing_100000_images_stays_below_two_gib(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model", projection_dim=WIDTH)
    folder = save_pictures(tmp_path / "pictures", 100_000)
    pretend_embedded(folder, tmp_path / "model", tmp_path / "index", 96 * PART)
    first = peak_memory(folder, tmp_path / "model", tmp_path / "index")
    Image.new("RGB", (9, 9)).save(folder / "000" / "new.png")
    update = peak_memory(folder, tmp_path / "model", tmp_path / "index")
    assert json.loads((tmp_path / "index" / "manifest.json").read_text())["images"] == 100_001
    print(f"{first / 2**20:.0f} MiB, {update / 2**20:.0f} MiB for an update")
    assert max(first, update) < 2 * GIB


@pytest.mark.slow
def test_memory_per_image_is_that_of_its_embedding(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model", projection_dim=WIDTH)
    few, many = 500, 4000
    base, more = (
        peak_memory(save_pictures(tmp_path / str(count), count), tmp_path / "model", tmp_path / f"index-{count}")
        for count in (few, many)
    )
    per_image = (more - base) / (many - few)
    print(f"{base / 2**20:.0f} MiB with {few} images, {more / 2**20:.0f} with {many}: {per_image:.0f} bytes per image")
    # The embedding is stored in 16 bits, and in faiss in 32. Pixels kept in memory would add 9,408 bytes.
    assert per_image < 10 * WIDTH


@pytest.mark.slow
def test_a_run_killed_by_a_signal_is_resumed(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    folder = save_pictures(tmp_path / "pictures", 2000)
    command = [sys.executable, "-m", "llm2clip", "index", str(folder), "--model", str(tmp_path / "model")]
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
    assert "resuming an unfinished run" in again.stderr
    assert "embedded: 2000\n" in again.stdout
    subprocess.run([*command, "--output-dir", str(tmp_path / "whole")], check=True, capture_output=True)
    for name in ("index.faiss", "data-00000-of-00001.arrow", "manifest.json"):
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
