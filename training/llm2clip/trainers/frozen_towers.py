"""Stage 2 with both towers frozen: what it trains on, and the statistics that it standardises features by."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2clip.data import CaptionImageDataset, CaptionSource, EvalTransform
from llm2clip.encoders.batches import TableImages
from llm2clip.encoders.image_features import ImageFeatures, feature_manifest, pooled_features, store_features
from llm2clip.evaluation import ImageTextRetrieval
from llm2clip.store import EmbeddingCache
from llm2clip.trainers.stage2_config import Stage2Config
from llm2clip.trainers.stored_pairs import StoredPairsDataset
from llm2clip.utils.vision_identity import vision_fingerprint
from modeling_llm2clip import LLM2CLIPModel

FOLDER = "vision_features"
# Rows that are read at once for the mean of the captions.
PART = 4096


def open_stored_pairs(
    config: Stage2Config,
    model: LLM2CLIPModel,
    image_processor: Any,
    cache: EmbeddingCache,
    retrieval: Iterable[ImageTextRetrieval],
) -> StoredPairsDataset:
    """Freeze the vision tower of a model, store the features of all images and open the training set.

    The retrieval sets use the stored features too. A new model that standardises its features takes their statistics
    from the training set.

    Raises:
        ValueError: A source is a stream, no image can be read, or there are too few rows for a batch or the warm-up.
    """
    sources = [CaptionSource.from_dict(source) for source in config.sources]
    if any(source.streaming for source in sources):
        raise ValueError("freeze_vision: all reads stored features at random, so that no source can be a stream.")
    options: dict[str, Any] = {
        "seed": config.sampling_seed, "on_error": config.on_error, "max_pixels": config.max_pixels,
    }  # fmt: skip
    model.vision_model.requires_grad_(False)
    model.vision_model.to(config.device)
    with_images = CaptionImageDataset(sources, EvalTransform(image_processor, config.image_backend), **options)
    if config.alignment != "closed_form":  # which has no steps
        config.check_length(len(with_images))
    training = [
        TableImages(table, columns, config.max_pixels)
        for table, columns in zip(with_images.tables, with_images.columns, strict=True)
    ]
    measured = list(retrieval)
    features = open_features(config, model, image_processor, [*training, *(one.images for one in measured)])
    for one in measured:
        one.features = features
    rows = features.find(np.concatenate([images.content_keys() for images in training]))
    captions = CaptionImageDataset(sources, None, **options)
    dataset = StoredPairsDataset(captions, features, rows, cache, config.sampling_seed)
    if config.model_name_or_path is None and config.alignment == "train":
        _set_statistics(model, dataset)
    return dataset


def open_features(
    config: Stage2Config, model: LLM2CLIPModel, image_processor: Any, tables: Iterable[TableImages]
) -> ImageFeatures:
    """Open the stored features of a run with frozen towers, after computing those of images that have none yet.

    Args:
        config: The settings of the run, which name the store.
        model: A model with the vision tower of the run, before or after it.
        tables: The images.

    Raises:
        DamagedImageError: An image cannot be read, unless `on_error` is `skip`.
    """
    manifest = feature_manifest(
        config.vision_model_name_or_path or str(config.model_name_or_path),
        vision_fingerprint(model, image_processor, with_projection=False),
        width=config.feature_views * model.config.vision_width,
        pooling=model.config.vision_pooling,
        image_backend=config.image_backend,
        max_pixels=config.max_pixels,
        vision_model_dtype=config.feature_dtype,
        views=config.feature_views,
        crop_scale=config.crop_scale,
        seed=config.sampling_seed,
    )
    return store_features(
        config.feature_cache or Path(config.output_dir) / FOLDER,
        [*tables],
        manifest,
        pooled_features(model, config.feature_dtype, config.feature_views),
        image_processor,
        on_error=config.on_error,
        batch_size=config.per_device_eval_batch_size,
        num_workers=config.dataloader_num_workers,
    )


def _set_statistics(model: LLM2CLIPModel, dataset: StoredPairsDataset) -> None:
    """Fit what the model standardises its features and centres its captions by to the training set."""
    samples, caption_rows, weights = dataset.pairs()
    if model.config.standardize_vision:
        model.set_vision_statistics(*dataset.features.statistics(dataset.image_rows[np.unique(samples)]))
    if model.config.center_text:
        total = torch.zeros(dataset.cache.width, dtype=torch.float64)
        for start in range(0, len(caption_rows), PART):
            part = dataset.cache.read(caption_rows[start : start + PART], torch.float64)
            total += torch.from_numpy(weights[start : start + PART]) @ part
        model.set_text_center((total / weights.sum()).float())
