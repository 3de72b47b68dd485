"""Readers of what the commands write: lists of files, caches, sidecars, indexes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.encoders.image_features import ImageFeatures, feature_manifest
from llm2clip.search.index import IndexConfig
from llm2clip.search.index import run as build_index
from llm2clip.search.search_index import SearchIndex
from llm2clip.store import EmbeddingCache, Store, StoreManifest, build_store
from llm2clip.store.building import ComputedRows
from llm2clip.store.store import caption_keys
from llm2clip.trainers.checkpoints import finish_checkpoint, last_checkpoint
from llm2clip.utils.folders import refuse_existing
from llm2clip.utils.manifests import (
    listed_files,
    own_files,
    refuse_damaged,
    write_manifest,
    write_model_manifest,
    written_by,
)
from llm2clip.verification import verify
from llm2clip.verification.kinds import verify_folder
from tests.fuzz.data import Doors
from tests.llm2clip.encoders import shards
from tests.llm2clip.store import encoder
from tests.modeling_llm2clip import tiny as tiny_models

CAPTIONS = [f"caption {number}" for number in range(25)]


def make_lists(folder: Path) -> None:
    for sample in ("model", "checkpoint"):
        place = folder / sample / "checkpoint-3"
        place.mkdir(parents=True)
        for name in ("model.safetensors", "config.json", "trainer_state.json", "README.md"):
            (place / name).write_text("{}")
    write_model_manifest(folder / "model/checkpoint-3", ["model.safetensors", "config.json"])
    write_manifest(folder / "model/checkpoint-3", "build")
    finish_checkpoint(folder / "checkpoint/checkpoint-3", None, None)


def read_lists(folder: Path) -> Doors:
    place = folder / "checkpoint-3"
    return (
        lambda: listed_files(place),
        lambda: refuse_damaged(place),
        lambda: own_files(place, "training"),
        lambda: refuse_existing(place, written_by(place) or "build", overwrite=True),
        lambda: verify_folder(place),
        lambda: last_checkpoint(folder),
        lambda: last_checkpoint(folder, contents=False),
    )


def make_caches(folder: Path) -> None:
    encoder.build(folder / "captions", CAPTIONS)
    computed = torch.nn.functional.normalize(torch.randn(len(CAPTIONS), encoder.WIDTH))
    features = feature_manifest("tower", "a", width=encoder.WIDTH, pooling="cls", image_backend="exact", max_pixels=9)
    rows = StoreManifest(kind="evaluation", encoder="model", identity={"fingerprint": "a"}, dtype="float32")
    for name, manifest in (("features", features), ("rows", rows)):
        keys, dtype = caption_keys(CAPTIONS), getattr(torch, manifest.dtype)
        with build_store(folder / name, keys, manifest, title="", shard_size=10, show_progress_bar=False) as build:
            for number, positions in build:
                found = ComputedRows(computed[positions].to(dtype), skipped=[(0, "key", "reason")])
                build.write(number, positions, found)


def _no_checksums(folder: Path) -> None:
    """Forget the checksums that were computed on this machine, and what `datasets` has read."""
    datasets.config.HF_DATASETS_CACHE = folder.with_name("cache")
    shutil.rmtree(datasets.config.HF_DATASETS_CACHE, ignore_errors=True)


def _verify(folder: Path) -> None:
    verify.run(verify.VerifyConfig(str(folder)))


def read_cache(folder: Path) -> Doors:
    _no_checksums(folder)
    numbers = np.arange(3)

    def captions() -> None:
        cache = EmbeddingCache.open(folder, verify=False)
        cache.contains(CAPTIONS), cache.lookup(CAPTIONS[3:15]), cache.lookup(CAPTIONS[3:4])

    def features() -> None:
        opened = ImageFeatures.open(folder, verify=False)
        opened.read_views(numbers), opened.statistics(numbers)

    def rows() -> None:
        Store.open(folder).read(numbers)

    return (lambda: _verify(folder), captions, lambda: EmbeddingCache.open(folder), rows, features)


def make_sidecars(folder: Path) -> None:
    shards.embed(shards.write_shards(folder / "files", 2), None)
    shards.write_groups(folder / "parts/a.parquet", [4] * 4)
    source = shards.CaptionSource(str(folder / "parts/*.parquet"), streaming=True)
    shards.embed(source, None, part_rows=8)


def read_sidecars(folder: Path) -> Doors:
    _no_checksums(folder)
    source = shards.CaptionSource(str(folder / "*.parquet"), streaming=True)

    def beside() -> None:
        opened = SourceSidecars(folder, ShardedSource(source).shards)
        opened.check(["caption"])
        opened.open(0).lookup(["everywhere"])

    def together() -> None:
        store = EmbeddingCache.open(folder)
        places = store.find(caption_keys(["everywhere"]))
        store.read(places[places >= 0])

    return (beside, together, lambda: _verify(folder))


def make_indexes(folder: Path, kinds: Sequence[str] = ("flat", "faiss")) -> None:
    tiny_models.save(folder.with_name("model"))
    pictures = folder.with_name("pictures")
    pictures.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(pictures / f"{number}.png")
    settings: dict[str, Any] = {"model": str(folder.with_name("model")), "folder": str(pictures), "num_workers": 0}
    for kind in kinds:
        build_index(IndexConfig(**settings, output_dir=str(folder / kind), index_type=kind))


def read_index(folder: Path) -> Doors:
    def search() -> None:
        index = SearchIndex.open(folder)
        query = np.ones((1, index.manifest.width), np.float32)
        index.search(query, 3), index.search(query, 3, "extension = 'png'")

    return (search, lambda: verify_folder(folder))
