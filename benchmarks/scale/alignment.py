"""Align stored pairs in closed form: two Stores of random rows that share directions, read by a process of its own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.scale.data import SPARE_BYTES
from benchmarks.scale.processes import run_watched

IMAGE_WIDTH, TEXT_WIDTH, SHARED = 512, 768, 64
SHARD_SIZE = 8192
# Of a pair in both Stores, with its keys and their index.
PAIR_BYTES = 2 * (IMAGE_WIDTH + TEXT_WIDTH) + 2 * (16 + 24)


@dataclass
class AlignTrial:
    """How many pairs are aligned, and with how many threads."""

    pairs: int
    threads: int = 2


def align(folder: Path, trial: AlignTrial) -> dict[str, Any]:
    """Write the Stores that are missing, align them, and return what was measured.

    Raises:
        OSError: The disk has no room for them.
        RuntimeError: The process failed.
    """
    stores = folder / f"pairs-{trial.pairs}"
    _write_stores(stores, trial.pairs)
    code = (
        "from llm2clip import closed_form_alignment\n"
        f"found = closed_form_alignment({str(stores / 'images')!r}, {str(stores / 'texts')!r})\n"
        f"assert found.correlations[{SHARED - 1}] > 4 * found.correlations[{SHARED}]"
    )
    watched = run_watched(["-c", code], folder / "align.log", threads=trial.threads)
    return {
        "captions": trial.pairs,
        "processes": 1,
        "threads": trial.threads,
        "seconds": round(watched.seconds, 1),
        "cpu_seconds": round(watched.looks[-1].cpu, 1),
        "rows_per_second": round(trial.pairs / watched.seconds, 1),
        "peak_bytes": watched.peak,
        "bytes": sum(path.stat().st_size for path in stores.glob("*/*")),
    }


def _write_stores(stores: Path, pairs: int) -> None:
    import numpy as np

    from llm2clip.encoders.image_features import feature_manifest
    from llm2clip.store import build_store, caption_manifest
    from llm2clip.store.store import INDEX

    if (stores / "texts" / INDEX).exists():
        return
    stores.mkdir(parents=True, exist_ok=True)
    needed, free = pairs * PAIR_BYTES + SPARE_BYTES, shutil.disk_usage(stores).free
    if free < needed:
        raise OSError(
            f"{pairs:,} pairs need {needed / 1e9:.0f} GB in {stores}, and {free / 1e9:.0f} GB are free; choose "
            "another --folder or fewer --captions."
        )
    images = feature_manifest(
        "random", "random", width=IMAGE_WIDTH, pooling="cls", image_backend="exact", max_pixels=1
    )
    prompt: dict[str, Any] = {"pooling": "mean", "prompt_prefix": "", "prompt_suffix": "", "max_length": 64}
    texts = caption_manifest("random", "random", width=TEXT_WIDTH, **prompt)
    keys = np.stack([np.arange(pairs), np.zeros(pairs, dtype=np.int64)], axis=1)
    for name, width, manifest in (("images", IMAGE_WIDTH, images), ("texts", TEXT_WIDTH, texts)):
        compute = partial(_rows, width)
        build_store(stores / name, keys, compute, manifest, title=name.title(), shard_size=SHARD_SIZE)


def _rows(width: int, positions: Any, bar: Any) -> Any:
    """Make the rows of a shard; see `Compute` of the builder of stores."""
    import torch

    from llm2clip.store.building import ComputedRows

    basis = torch.randn(SHARED, width, generator=torch.Generator().manual_seed(width))
    shared, own = (torch.Generator().manual_seed(int(positions[0]) * 10_000 + number) for number in (0, width))
    rows = torch.randn(len(positions), SHARED, generator=shared) @ basis
    rows += 4 * torch.rand(len(positions), width, generator=own)
    bar.update(len(positions))
    return ComputedRows(rows.half())
