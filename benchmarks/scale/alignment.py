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
# Of a pair in both Stores, with its keys.
PAIR_BYTES = 2 * (IMAGE_WIDTH + TEXT_WIDTH) + 2 * 16


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

    from llm2clip.embedding.cache_files import CacheManifest
    from llm2clip.embedding.image_features import FeatureManifest
    from llm2clip.embedding.row_builder import build_rows

    if (stores / "texts" / "manifest.json").exists():
        return
    stores.mkdir(parents=True, exist_ok=True)
    needed, free = pairs * PAIR_BYTES + SPARE_BYTES, shutil.disk_usage(stores).free
    if free < needed:
        raise OSError(
            f"{pairs:,} pairs need {needed / 1e9:.0f} GB in {stores}, and {free / 1e9:.0f} GB are free; choose "
            "another --folder or fewer --captions."
        )
    common: dict[str, Any] = {"fingerprint": "random", "shard_size": SHARD_SIZE}
    images = FeatureManifest(
        **common,
        hidden_size=IMAGE_WIDTH,
        vision_model_name="random",
        pooling="cls",
        image_backend="exact",
        max_pixels=1,
    )
    prompt: dict[str, Any] = {"pooling": "mean", "prompt_prefix": "", "prompt_suffix": "", "max_length": 64}
    texts = CacheManifest(**common, hidden_size=TEXT_WIDTH, text_model_name="random", **prompt)
    keys = np.stack([np.arange(pairs), np.zeros(pairs, dtype=np.int64)], axis=1)
    build_rows(stores / "images", keys, partial(_rows, IMAGE_WIDTH, {"skipped": "[]"}), images, title="Images")
    build_rows(stores / "texts", keys, partial(_rows, TEXT_WIDTH, {"num_truncated": "0"}), texts, title="Texts")


def _rows(width: int, metadata: dict[str, str], positions: Any, bar: Any) -> tuple[Any, dict[str, str]]:
    """Make the rows of a shard; see `Compute` of the row builder."""
    import torch

    basis = torch.randn(SHARED, width, generator=torch.Generator().manual_seed(width))
    shared, own = (torch.Generator().manual_seed(int(positions[0]) * 10_000 + number) for number in (0, width))
    rows = torch.randn(len(positions), SHARED, generator=shared) @ basis
    rows += 4 * torch.rand(len(positions), width, generator=own)
    bar.update(advance=len(positions))
    return rows.half(), metadata
