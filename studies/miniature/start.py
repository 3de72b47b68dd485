"""The model that an arm starts from: what the study sets of a new model, and stage 2 has no setting for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from llm2clip import EmbeddingCache, LLM2CLIPModel, PairedCache
from llm2clip.data import CaptionImageDataset, CaptionSource
from llm2clip.trainers.align_recipe import AlignRecipe
from llm2clip.trainers.closed_form import positive_deviation
from llm2clip.trainers.joint_model import describe_text_model, make_model
from llm2clip.trainers.stored_rows import store_pairs

# The settings of an arm that are those of its start: fields of the model's config, and `standardize`.
START_SETTINGS = (
    *("projection_dim", "adapter_num_layers", "initializer", "vision_pooling", "vision_layers"),
    *("visual_head", "logit_scale_init_value", "logit_bias_init_value", "standardize"),
)


def open_cache(folders: list[Path]) -> EmbeddingCache:
    """Open the rows of a text encoder, or of two, side by side."""
    return PairedCache.of_folders(folders) if len(folders) > 1 else EmbeddingCache.open(folders[0])


def save_start(
    folder: Path, recipe: Mapping[str, Any], fields: Mapping[str, Any], caches: list[Path], features: Path, seed: int
) -> None:
    """Save a new model and its processor, for a stage 2 that continues it.

    Args:
        recipe: Its towers, the sources of the training and their `embedding_cache`; see [`AlignRecipe`].
        fields: Of its config. With `standardize` it also standardises the features of images and centres captions,
            by the statistics of the training set.
        caches: The rows of the captions.
        features: Where the features of the pictures are stored.
        seed: Of the new weights.
    """
    standardize = fields.get("standardize", False)
    of_config = {name: value for name, value in fields.items() if name != "standardize"}
    set_seed(seed)
    config = AlignRecipe(output_dir=str(folder), **recipe)
    model, processor = make_model(config, standardize_vision=standardize, center_text=standardize, **of_config)
    describe_text_model(model)
    if standardize:
        _set_statistics(model, processor, recipe["sources"], caches, features)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _set_statistics(
    model: LLM2CLIPModel, processor: Any, sources: list[dict[str, Any]], caches: list[Path], features: Path
) -> None:
    image_processor = getattr(processor, "image_processor", processor)
    dataset = CaptionImageDataset([CaptionSource.from_dict(source) for source in sources])
    pairs = store_pairs(model, image_processor, dataset, open_cache(caches), features)
    samples, caption_rows, weights = pairs.pairs()
    stored = pairs.features.read(pairs.image_rows[np.unique(samples)]).double()
    mean, std = stored.mean(dim=0), stored.std(dim=0, correction=0)
    model.get_buffer("visual_standardization.mean").copy_(mean)
    model.get_buffer("visual_standardization.std").copy_(positive_deviation(mean, std))
    total = torch.from_numpy(weights) @ pairs.cache.read(caption_rows, torch.float64)
    model.get_buffer("text_adapter.center").copy_(total / weights.sum())
