"""The model that an arm starts from is new by its seed, and standardises by the statistics of the training set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor

from llm2clip import EmbeddingCache, LLM2CLIPModel
from llm2clip.data import CaptionImageDataset, CaptionSource
from llm2clip.encoders import embed
from llm2clip.trainers.stored_rows import store_pairs
from studies.miniature.start import save_start
from tests.builders import small_runs, tiny

FIELDS = {"projection_dim": 16, "adapter_num_layers": 1, "initializer": "normal", "vision_pooling": "cls_mean"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("start")
    text, cache = str(folder / "llm"), str(folder / "cache")
    tiny.text_model().save_pretrained(text)
    tiny.processor().tokenizer.save_pretrained(text)
    source = small_runs.concepts(max_samples=12, caption_weights=[3, 1])
    embed.run(embed.EmbedConfig(text_model_name_or_path=text, output_dir=cache, sources=[source]))
    vision = small_runs.save_dinov2_tower(folder / "vision")
    return {
        "vision_model_name_or_path": vision,
        "text_model_name_or_path": text,
        "embedding_cache": cache,
        "sources": [source],
    }


def start(folder: Path, recipe: dict[str, Any], seed: int, **fields: Any) -> LLM2CLIPModel:
    save_start(folder, recipe, {**FIELDS, **fields}, [Path(recipe["embedding_cache"])], folder / "features", seed)
    model: LLM2CLIPModel = LLM2CLIPModel.from_pretrained(folder, text_model=False)
    return model


def test_a_start_has_the_statistics_of_the_training_set(recipe: dict[str, Any], tmp_path: Path) -> None:
    model = start(tmp_path, recipe, 0, standardize=True)
    images, cache = AutoImageProcessor.from_pretrained(tmp_path), EmbeddingCache.open(recipe["embedding_cache"])
    dataset = CaptionImageDataset([CaptionSource.from_dict(recipe["sources"][0])])
    pairs = store_pairs(model, images, dataset, cache, tmp_path / "features")
    stored = pairs.features.read(np.unique(pairs.image_rows)).double()
    standardization, center = model.visual_standardization, model.text_adapter.center
    assert standardization is not None
    assert center is not None
    torch.testing.assert_close(standardization.mean, stored.mean(dim=0).float())
    torch.testing.assert_close(standardization.std, stored.std(dim=0, correction=0).float())
    rows = small_runs.rows_of_concepts(":12", "train")
    embeds = [cache.lookup(rows[column][:]).double().mean(dim=0) for column in ("caption", "keywords")]
    torch.testing.assert_close(center, (0.75 * embeds[0] + 0.25 * embeds[1]).float())


def test_new_weights_follow_from_the_seed_and_fields_are_those_of_the_config(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    first, again, other = (start(tmp_path / str(n), recipe, seed) for n, seed in enumerate((0, 0, 1)))
    weights = [model.text_adapter.proj.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.visual_standardization is None
    assert first.text_adapter.center is None
    assert all(getattr(first.config, name) == value for name, value in FIELDS.items())
