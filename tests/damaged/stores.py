"""Good files that the commands write (lists of files, caches, sidecars, indexes), and what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.encoders.image_features import ImageFeatures
from llm2clip.files.folders import refuse_existing
from llm2clip.files.manifests import (
    damage,
    listed_files,
    own_files,
    refuse_damaged,
    write_manifest,
    written_by,
)
from llm2clip.search import index
from llm2clip.search.search_index import SearchIndex
from llm2clip.store import EmbeddingCache, Store, StoreManifest, build_store
from llm2clip.store.shards import ComputedRows
from llm2clip.store.store import caption_keys
from llm2clip.trainers.checkpoints import finish_checkpoint, last_checkpoint
from llm2clip.verification import verify
from tests.builders import tiny
from tests.damaged.data import Readers, nothing_cached
from tests.llm2clip.encoders import shards
from tests.llm2clip.store import encoder

CAPTIONS = [f"caption {number}" for number in range(25)]


def _verify(folder: Path) -> dict[str, Any]:
    return verify.run(verify.VerifyConfig(str(folder)))


def make_lists(folder: Path) -> None:
    for sample in ("model", "checkpoint"):
        place = folder / sample / "checkpoint-3"
        place.mkdir(parents=True)
        for name in ("model.safetensors", "config.json", "trainer_state.json", "README.md"):
            (place / name).write_text(f'{{"name": "{name}"}}')
    write_manifest(folder / "model/checkpoint-3", "build")
    finish_checkpoint(folder / "checkpoint/checkpoint-3", None, None)


def read_lists(folder: Path) -> Readers:
    place = folder / "checkpoint-3"

    def checkpoint() -> Any:
        """What is taken for whole has no fault."""
        found = last_checkpoint(folder)
        assert (found is None) == (damage(place, contents=True) is not None)
        return found, last_checkpoint(folder, contents=False)

    def replaced() -> str:
        """A folder that its list does not describe is not replaced."""
        command = written_by(place)
        refuse_existing(place, command or "build", overwrite=True)
        return str(command)

    return (
        lambda: _verify(place),
        lambda: sorted(listed_files(place)),
        lambda: refuse_damaged(place),
        lambda: sorted(own_files(place, "training") or ()),
        replaced,
        checkpoint,
    )


def make_caches(folder: Path) -> None:
    encoder.build(folder / "captions", CAPTIONS)
    computed = torch.nn.functional.normalize(torch.randn(len(CAPTIONS), encoder.WIDTH))
    features = StoreManifest(kind="features", encoder="tower", identity={"fingerprint": "a"}, width=encoder.WIDTH)
    rows = StoreManifest(kind="evaluation", encoder="model", identity={"fingerprint": "a"}, dtype="float32")
    for name, manifest in (("features", features), ("rows", rows)):
        build_store(
            folder / name,
            caption_keys(CAPTIONS),
            manifest,
            lambda positions: [ComputedRows(computed[positions], skipped=[(0, "key", "reason")])],
            title="",
            shard_size=10,
            show_progress_bar=False,
        )


def read_cache(folder: Path) -> Readers:
    nothing_cached(folder)
    numbers = np.arange(3)

    def captions() -> Any:
        cache = EmbeddingCache.open(folder, verify=False)
        found = cache.lookup(CAPTIONS[3:15])
        assert found.isfinite().all()
        return cache.contains(CAPTIONS).tolist(), found.tolist(), cache.lookup(CAPTIONS[3:4]).tolist()

    def features() -> Any:
        opened = ImageFeatures.open(folder, verify=False)
        return opened.read_views(numbers).tolist()

    return (
        lambda: _verify(folder),
        captions,
        lambda: EmbeddingCache.open(folder).lookup(CAPTIONS[:2]).tolist(),
        lambda: Store.open(folder).read(numbers).tolist(),
        features,
    )


def make_sidecars(folder: Path) -> None:
    shards.embed(shards.write_shards(folder / "files", 2), None)
    shards.write_groups(folder / "parts/a.parquet", [4] * 4)
    source = shards.CaptionSource(str(folder / "parts/*.parquet"), streaming=True)
    shards.embed(source, None, part_captions=8)


def read_sidecars(folder: Path) -> Readers:
    nothing_cached(folder)
    source = shards.CaptionSource(str(folder / "*.parquet"), streaming=True)

    def beside() -> Any:
        opened = SourceSidecars(folder, ShardedSource(source).shards)
        opened.check(["caption"])
        return opened.open(0).lookup(["everywhere"]).tolist()

    def together() -> Any:
        store = EmbeddingCache.open(folder)
        places = store.find(caption_keys(["everywhere"]))
        return store.read(places[places >= 0]).tolist()

    return (lambda: _verify(folder), beside, together)


def make_indexes(folder: Path) -> None:
    tiny.save(folder.with_name("model"))
    pictures = folder.with_name("pictures")
    pictures.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(pictures / f"{number}.png")
    settings: dict[str, Any] = {"model": str(folder.with_name("model")), "folder": str(pictures), "num_workers": 0}
    for kind in ("flat", "ivf_rq"):
        index.run(index.IndexConfig(**settings, output_dir=str(folder / kind), index_type=kind))


def read_index(folder: Path) -> Readers:
    nothing_cached(folder)

    def search() -> Any:
        opened = SearchIndex.open(folder)
        query = np.ones((1, opened.manifest.width), np.float32)
        found = opened.search(query, 3), opened.search(query, 3, "extension = 'png'")
        return [[(result.key, result.score) for result in results] for (results,) in found]

    return (lambda: _verify(folder), search)
