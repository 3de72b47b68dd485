"""Recipes, manifests and configs that are wrong are read as they are, or refused with an error of ours."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm2clip.data import CaptionSource, PairSource
from llm2clip.encoders.embed import EmbedConfig
from llm2clip.recipes import find_recipe, load_recipe
from llm2clip.search.index_manifest import IndexManifest
from llm2clip.store import EmbeddingCache
from llm2clip.store.building import shard_name
from llm2clip.store.store import INDEX
from llm2clip.trainers.checkpoints import finish_checkpoint, last_checkpoint
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.files import read_json
from llm2clip.utils.folders import refuse_existing
from llm2clip.utils.manifests import FOLDER_MANIFEST, damage
from llm2clip.utils.settings import build_config
from tests.bad_input.documents import changed, variants
from tests.damage import mutated
from tests.llm2clip.store.encoder import build
from tests.refusals import fault

COUNT = 300
RECIPES: dict[str, type] = {
    "mntp": MNTPRecipe, "stage1_paper": Stage1Recipe, "embed_paper": EmbedConfig, "stage2_small_gpu": Stage2Recipe,
}  # fmt: skip


def refusals(door: Callable[[], Any], *others: type[Exception]) -> int:
    """1 if a door refuses what it is given; errors that are not ours are failures."""
    try:
        door()
    except others:
        return 1
    except Exception as error:
        refusal = error
    else:
        return 0
    assert str(refusal).strip()
    assert fault(refusal, [""]) is None  # any message
    return 1


@pytest.mark.parametrize("name", RECIPES)
def test_wrong_recipes_are_refused(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(find_recipe(name)) | {"use_cpu": True, "output_dir": str(tmp_path / "run")}
    if name == "embed_paper":
        del recipe["use_cpu"]
    path = tmp_path / "recipe.yaml"
    refused = 0
    for seed in range(COUNT):
        if seed % 3:
            path.write_text(yaml.safe_dump(changed(recipe, seed)))
        else:
            path.write_bytes(mutated(yaml.safe_dump(recipe).encode(), random.Random(seed)))
        refused += refusals(lambda: build_config(RECIPES[name], load_recipe(path), str(path)))
    assert refused > COUNT // 3


@pytest.mark.parametrize("kind", [CaptionSource, PairSource])
def test_wrong_sources_are_refused(kind: Any) -> None:
    source = {"path": "data", "split": "train", "caption_columns": ["caption"], "weight": 1.0}
    refused = sum(refusals(lambda seed=seed: kind.from_dict(changed(source, seed))) for seed in range(COUNT))
    assert refused > COUNT // 3


def test_wrong_manifests_of_a_cache_are_refused(tmp_path: Path) -> None:
    build(tmp_path, [f"caption {number}" for number in range(25)])
    manifest = tmp_path / INDEX
    right = json.loads(manifest.read_text())
    refused = 0
    for content in variants(right, COUNT):
        manifest.write_bytes(content)
        refused += refusals(lambda: EmbeddingCache.open(tmp_path).lookup(["caption 3"]), LookupError)
    assert refused > COUNT // 2


def test_damaged_shards_of_a_cache_are_refused(tmp_path: Path) -> None:
    build(tmp_path, [f"caption {number}" for number in range(25)])
    shard = tmp_path / shard_name(1)
    content, rows = shard.read_bytes(), EmbeddingCache.open(tmp_path).lookup(["caption 13"])
    for seed in range(COUNT):
        shard.write_bytes(mutated(content, random.Random(seed)))
        if refusals(lambda: EmbeddingCache.open(tmp_path).lookup(["caption 13"]), LookupError):
            continue
        found = EmbeddingCache.open(tmp_path).lookup(["caption 13"])
        assert found.shape == rows.shape
        assert torch.isfinite(found).all()


def test_wrong_manifests_of_an_index_are_refused() -> None:
    right = IndexManifest("model", None, "2-abc", 24, "float16", {"kind": "folder", "path": "x"}, {"type": "flat"})
    refused = 0
    for content in variants(dataclasses.asdict(right), COUNT):
        try:
            fields = json.loads(content)
        except ValueError:
            continue
        if isinstance(fields, dict):
            refused += refusals(lambda fields=fields: IndexManifest.from_fields("place", fields))
    assert refused > 20


def test_wrong_manifests_of_folders_and_checkpoints_make_them_damaged(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    for name in ("model.safetensors", "trainer_state.json"):
        (checkpoint / name).write_text("{}")
    finish_checkpoint(checkpoint, None, None)
    manifest = checkpoint / FOLDER_MANIFEST
    right = json.loads(manifest.read_text())
    for content in variants(right, COUNT):
        manifest.write_bytes(content)
        found = damage(checkpoint)
        assert found is None or len(found.splitlines()) == 1
        whole = damage(checkpoint, contents=True) is None
        assert last_checkpoint(tmp_path) == (checkpoint if whole else None)
        # Whatever the manifest says, a folder that it does not describe is not replaced.
        assert refusals(lambda: refuse_existing(checkpoint, "build", overwrite=True)) == 1


def test_damaged_json_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    for content in variants({"a": [1, {"b": None}], "c": "é"}, COUNT):
        path.write_bytes(content)
        message = str(path)
        try:
            assert isinstance(read_json(path), dict)
        except ValueError as error:
            message = str(error)
        assert str(path) in message
