"""Small shards with captions, and embedding them with the encoder of the cache's tests."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from llm2clip.data import CaptionSource
from llm2clip.encoders.embed_shards import EmbedCounts, EmbedShard, embed_shard, embed_shards, list_jobs
from llm2clip.store import StoreManifest, caption_manifest
from tests.llm2clip.store import encoder


class Counting:
    """The encoder of the cache's tests, which counts what it embeds."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, int]:
        self.texts += texts
        return encoder.embed(texts), sum("long" in text for text in texts)


def description(**fields: Any) -> StoreManifest:
    settings: dict[str, Any] = {
        "text_model": "tiny", "fingerprint": "finger-a", "width": encoder.WIDTH, "pooling": "mean",
        "prompt_prefix": "user: ", "prompt_suffix": "<eot>", "max_length": 64,
    }  # fmt: skip
    return caption_manifest(**{**settings, **fields})


def write_shards(folder: Path, count: int = 4) -> CaptionSource:
    """Parquet files with three rows each, one of which every file has, one without a caption, and one with two."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rows = {"caption": ["everywhere", None, f"dog {number}"], "other": ["", None, f"a long dog {number}"]}
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{number}.parquet")
    return CaptionSource(str(folder / "*.parquet"), caption_columns=["caption", "other"], streaming=True)


def embedding(embed: Any = None, made_by: StoreManifest | None = None, reused: Any = None) -> EmbedShard:
    return partial(embed_shard, embed=embed or Counting(), encoder=made_by or description(), reused=reused)


def embed(source: CaptionSource, folder: Path | None, calls: Any = None, **options: Any) -> EmbedCounts:
    embed_one = embedding(calls, options.pop("made_by", None), options.pop("reused", None))
    rank, world_size = options.pop("rank", 0), options.pop("world_size", 1)
    jobs = list_jobs([source], folder and str(folder), **options)
    return embed_shards(jobs[rank::world_size], embed_one, show_progress_bar=False)


def write_groups(path: Path, groups: list[int]) -> list[str]:
    """A parquet file with row groups of these sizes; some captions are in all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    captions = [f"cat {row}" if row % 4 else "everywhere" for row in range(sum(groups))]
    table = pa.table({"caption": captions, "picture": [b"x" * 50] * len(captions)})
    with pq.ParquetWriter(path, table.schema) as writer:
        for start, count in zip(itertools.accumulate([0, *groups]), groups, strict=False):
            writer.write_table(table.slice(start, count))
    return captions
