"""Readers of what the commands write: lists of files, caches, sidecars, states of frozen layers, indexes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from llm2clip.data.records import caption_keys
from llm2clip.data.shards import ShardedSource
from llm2clip.embedding import EmbeddingCache
from llm2clip.embedding.cache_files import StoreManifest
from llm2clip.embedding.image_features import FeatureManifest, ImageFeatures
from llm2clip.embedding.keyed_rows import KeyedRows
from llm2clip.embedding.row_builder import build_rows
from llm2clip.embedding.sidecar_store import open_reused
from llm2clip.embedding.sidecars import SourceSidecars
from llm2clip.embedding.verify import verify_sidecars
from llm2clip.evaluation.row_store import EvaluationManifest
from llm2clip.search.image_index import ImageIndex
from llm2clip.search.index import IndexConfig
from llm2clip.search.index import run as build_index
from llm2clip.trainers.checkpoints import finish_checkpoint, last_checkpoint
from llm2clip.trainers.frozen_states import changed_parts, open_states
from llm2clip.utils.folders import refuse_existing
from llm2clip.utils.manifests import (
    listed_files,
    own_files,
    refuse_damaged,
    write_manifest,
    write_model_manifest,
    written_by,
)
from llm2clip.verification.kinds import verify_folder
from tests.fuzz.data import Doors
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.embedding import encoder, shards
from tests.llm2clip.trainers import test_frozen_states
from tests.modeling_llm2clip import tiny as tiny_models

CAPTIONS = [f"caption {number}" for number in range(25)]
WIDTH = 8


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


def _store(folder: Path, manifest: StoreManifest, metadata: dict[str, str]) -> None:
    rows = torch.nn.functional.normalize(torch.randn(len(CAPTIONS), WIDTH)).to(getattr(torch, manifest.dtype))

    def compute(positions: np.ndarray, bar: Any) -> tuple[torch.Tensor, dict[str, str]]:
        return rows[positions], metadata

    build_rows(folder, caption_keys(CAPTIONS), compute, manifest, title="", show_progress_bar=False)


def make_caches(folder: Path) -> None:
    encoder.build(folder / "captions", CAPTIONS)
    common: dict[str, Any] = {"fingerprint": "a", "hidden_size": WIDTH, "shard_size": 10}
    features = FeatureManifest(
        **common, vision_model_name="tower", pooling="cls", image_backend="exact", max_pixels=100
    )
    _store(folder / "features", features, {"skipped": json.dumps([[0, "key", "reason"]])})
    rows = EvaluationManifest(**common, model_name="model", model_dtype="float32", kind="images", dtype="float32")
    _store(folder / "rows", rows, {})


def read_cache(folder: Path) -> Doors:
    numbers = np.arange(3)

    def captions() -> None:
        cache = EmbeddingCache.open(folder, verify=False)
        cache.contains(CAPTIONS), cache.lookup(CAPTIONS[3:15]), cache.lookup(CAPTIONS[3:4])

    def rows() -> None:
        manifest = EvaluationManifest.read(folder)
        opened = KeyedRows(folder, manifest, KeyedRows.open_shards(folder, manifest))
        opened.read(numbers[: len(opened)])

    def features() -> None:
        opened = ImageFeatures(folder, FeatureManifest.read(folder))
        opened.read_views(numbers[: len(opened)]), opened.statistics(numbers[: len(opened)])

    return (lambda: verify_folder(folder), captions, lambda: EmbeddingCache.open(folder), rows, features)


def make_sidecars(folder: Path) -> None:
    shards.embed(shards.write_shards(folder / "files", 2), None)
    shards.write_groups(folder / "parts/a.parquet", [4] * 4)
    source = shards.CaptionSource(str(folder / "parts/*.parquet"), streaming=True)
    shards.embed(source, None, part_rows=8)


def read_sidecars(folder: Path) -> Doors:
    datasets.config.HF_DATASETS_CACHE = folder.with_name("cache")
    shutil.rmtree(datasets.config.HF_DATASETS_CACHE, ignore_errors=True)
    source = shards.CaptionSource(str(folder / "*.parquet"), streaming=True)

    def beside() -> None:
        opened = SourceSidecars(folder, ShardedSource(source).shards)
        opened.check(["caption"])
        opened.open(0).lookup(["everywhere"])

    def together() -> None:
        store = open_reused(str(folder))
        places = store.find(caption_keys(["everywhere"]))
        store.read(places[places >= 0])

    return (beside, together, lambda: verify_sidecars(folder))


def make_states(folder: Path) -> None:
    inputs = Inputs("", tiny.save_vision_tower(folder / "tower"), "", "")
    made = test_frozen_states.build(inputs, folder / "states", tiny.concepts(max_samples=8)).folder
    shutil.move(made, folder / "new")
    for name in ("tower", "states"):
        shutil.rmtree(folder / name)


def read_states(folder: Path) -> Doors:
    def states() -> None:
        manifest, rows = open_states(folder)
        changed_parts(manifest, rows)
        {row: (key, reason) for row, key, reason in manifest["skipped"]}
        np.array(rows[0])

    return (states, lambda: verify_folder(folder))


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
        index = ImageIndex.open(folder)
        query = np.ones((1, index.manifest.width), np.float32)
        index.search(query, 3), index.search(query, 3, "extension = 'png'"), index.first("key = '3.png'")

    return (search, lambda: verify_folder(folder))
