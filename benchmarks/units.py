"""Measure unit costs on this machine for docs/scaling.md: `python -m benchmarks.units` writes units.json."""

from __future__ import annotations

import datetime
import io
import json
import statistics
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from benchmarks import results
from benchmarks.row import Outcome, Work
from benchmarks.rows import r08_images, r10_cached_rows
from benchmarks.small_llama import captions, new_folder
from benchmarks.worker import measure

UNITS = Path(__file__).with_name("units.json")
ROUNDS = 5
# A web image at training size, stored beside its captions in a tar file.
IMAGES, CAPTIONS, IMAGE_BYTES = 3_000, 3, 30_000
CACHE_ROWS = 20_000


def _captions_of_tars() -> Callable[[], list[str]]:
    """Return a function that reads the distinct captions of tar files, the first step of `llm2clip embed`."""
    from llm2clip.data import CaptionSource, distinct_captions

    path, texts = new_folder() / "0.tar", iter(captions(IMAGES * CAPTIONS))
    with tarfile.open(path, "w") as tar:
        for image in range(IMAGES):
            row = {f"caption_{number}": next(texts) for number in range(CAPTIONS)}
            for name, content in (("jpg", bytes(IMAGE_BYTES)), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{image:08}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    columns = [f"json.caption_{number}" for number in range(CAPTIONS)]
    source = CaptionSource(str(path), caption_columns=columns, streaming=True)
    return lambda: distinct_captions(source, show_progress=False)


def _reading() -> Work:
    read = _captions_of_tars()
    return lambda: Outcome({"captions": len(read())})


def _checking() -> Work:
    import torch

    texts = [str(number) for number in range(CACHE_ROWS)]
    cache = r10_cached_rows.cache_of(texts, lambda batch: torch.ones(len(batch), r10_cached_rows.WIDTH), new_folder())

    def work() -> Outcome:
        for shard in cache.shards:
            shard.require_unchanged(always=True)
        return Outcome()

    return work


def _bytes_per_caption() -> float:
    """Measure the memory of the distinct captions per caption: the texts, the dict that finds them, and their list."""
    read = _captions_of_tars()
    read()
    tracemalloc.start()
    texts = read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / len(texts)


def seconds(work: Work) -> float:
    """Return the CPU seconds of a turn: the median of several, after a warm-up."""
    return statistics.median([measure(work)[1]["cpu"] for _ in range(ROUNDS + 1)][1:])


def main() -> None:
    """Measure with one thread and write the file."""
    import torch

    torch.set_num_threads(1)
    texts = captions(IMAGES * CAPTIONS)
    units = {
        "images_read_per_second": IMAGES / seconds(_reading()),
        "bytes_per_caption": _bytes_per_caption(),
        "characters_per_caption": sum(map(len, texts)) / len(texts),
        "cache_bytes_checked_per_second": 2 * CACHE_ROWS * r10_cached_rows.WIDTH / seconds(_checking()),
        "jpegs_per_second": r08_images.COUNT / seconds(r08_images.training("exact")),
        "fast_jpegs_per_second": r08_images.COUNT / seconds(r08_images.training("fast")),
        "cached_rows_per_second": r10_cached_rows.IMAGES / seconds(r10_cached_rows.ours()),
    }
    kept = {name: float(f"{value:.3g}") for name, value in units.items()}
    origin = {"machine": results.machine("cpu"), "date": datetime.date.today().isoformat(), "commit": results.commit()}
    UNITS.write_text(json.dumps({**origin, **kept}, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {UNITS}", file=sys.stderr)


if __name__ == "__main__":
    main()
