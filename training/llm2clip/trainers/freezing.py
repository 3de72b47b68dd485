"""What stage 2 freezes, the vision tower or its lower layers, and the rows that are stored of it."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from llm2clip.data import CaptionImageDataset, SkippedSample
from llm2clip.encoders.batches import ContentSet, TableImages
from llm2clip.encoders.image_features import ImageFeatures, feature_manifest, pooled_features, store_features
from llm2clip.evaluation.data import RetrievalData
from llm2clip.store import EmbeddingCache, StoreManifest
from llm2clip.trainers.alignment import standardize
from llm2clip.trainers.distill_data import TaughtCaptions
from llm2clip.trainers.frozen_layers import FrozenLayers, freeze_unused
from llm2clip.trainers.stage2_config import Stage2Config
from llm2clip.trainers.stored_rows import FrozenStatesDataset, StoredPairsDataset, require_captions
from llm2clip.trainers.teacher import Teacher
from llm2clip.utils.vision_identity import preprocessing, vision_fingerprint
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel

logger = logging.getLogger(__name__)

FEATURES = "vision_features"
# In the folder of a run: the rows of the text tower that it learns from.
TEACHER = "teacher"
# Rows that are read at once for the mean of the captions.
PART = 4096
# Fields of a tower's config that say where it is from and how it trains, not what it computes in evaluation.
NOT_COMPUTED = ("_name_or_path", "transformers_version", "patch_dropout", "initializer_range")
# Bytes of a shard, since a row has the states of all tokens.
SHARD_BYTES = 64 * 2**20


def prepare_joint_model(model: LLM2CLIPModel, args: Stage2Config, size: tuple[int, int]) -> FrozenLayers | None:
    """Do to a model what the settings say, before it is trained: what is frozen, dropout, standardisation.

    Args:
        size: Height and width of the images in pixels.

    Returns:
        The frozen lower layers of the vision tower, if there are any.

    Raises:
        ValueError: The tower has no patch dropout, or fewer layers.
    """
    tower, config = model.vision_model, cast(LLM2CLIPConfig, model.config)
    if args.feature_dropout is not None:
        config.feature_dropout = args.feature_dropout
    if args.patch_dropout is not None:
        if not hasattr(tower.config, "patch_dropout"):
            raise ValueError(f"patch_dropout is for EVA02 towers; {type(tower).__name__} has none. Leave it unset.")
        tower.config.patch_dropout = config.vision_config.patch_dropout = args.patch_dropout
    if args.standardize_features or args.warm_start.get("standardize_features"):
        standardize(model)
    freeze_unused(tower)
    if model.text_model is not None:
        model.text_model.requires_grad_(False)
    if args.freeze_vision == "all":
        tower.requires_grad_(False)
    if args.distill_from:
        model.requires_grad_(False)
        model.text_adapter.requires_grad_(True)
    if args.freeze_vision_layers:
        return FrozenLayers(tower, args.freeze_vision_layers, size)
    return None


def image_size(model: LLM2CLIPModel) -> tuple[int, int]:
    """Height and width of the images of a model, in pixels."""
    size = model.config.vision_config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def store_training_set(
    args: Stage2Config,
    model: LLM2CLIPModel,
    frozen: FrozenLayers | None,
    image_processor: Any,
    images: CaptionImageDataset,
    cache: EmbeddingCache | None,
    retrieval: Iterable[RetrievalData],
) -> StoredPairsDataset | TaughtCaptions | FrozenStatesDataset:
    """Store what the frozen towers or layers of a run make of a training set, and make one that reads that.

    Args:
        frozen: The frozen layers, with `frozen_states_dir`.
        cache: The embeddings of the captions, with `freeze_vision: all`.
        retrieval: Sets whose images are stored too.

    Raises:
        ValueError: There is no cache; or see [`store_pairs`], [`taught_captions`] and [`store_states`].
    """
    if args.frozen_states_dir:
        assert frozen is not None
        return store_states(args, frozen, image_processor, images)
    if cache is None:
        raise ValueError(
            "freeze_vision: all stores the outputs of both towers; give the embeddings of the captions as "
            "cache=EmbeddingCache.open(...)."
        )
    if not args.distill_from:
        return store_pairs(args, model, image_processor, images, cache, retrieval)
    return taught_captions(args, Teacher(args.distill_from, Path(args.output_dir) / TEACHER), images, cache)


def store_pairs(
    args: Stage2Config,
    model: LLM2CLIPModel,
    image_processor: Any,
    dataset: CaptionImageDataset,
    cache: EmbeddingCache,
    retrieval: Iterable[RetrievalData],
) -> StoredPairsDataset:
    """Store the features of all images of a data set, and make one that reads them.

    The retrieval sets use the stored features too. With `standardize_features`, the model takes their statistics.

    Raises:
        ValueError: No image can be read, or there are too few rows for a batch or the warm-up.
    """
    if args.alignment != "closed_form":  # which has no steps
        args.check_length(len(dataset))
    model.vision_model.to(args.device)
    training: list[ContentSet] = [*tables_of(dataset)]
    features = open_features(args, model, image_processor, [*training, *(data.images for data in retrieval)])
    rows = features.find(np.concatenate([images.content_keys() for images in training]))
    pairs = StoredPairsDataset(dataset.without_images(), features, rows, cache, args.sampling_seed)
    if args.standardize_features and args.alignment == "train":
        _set_statistics(model, pairs)
    return pairs


def taught_captions(
    args: Stage2Config, teacher: Teacher, dataset: CaptionImageDataset, cache: EmbeddingCache
) -> TaughtCaptions:
    """Make a data set of the captions of another one, each once, with the rows of a teacher; no image is read.

    Raises:
        MissingCaptionError: The cache lacks a caption, and `on_error` is `raise`.
        ValueError: There are too few captions for a batch or the warm-up.
    """
    rows = (row for row in dataset.without_images().captions() if not isinstance(row, SkippedSample))
    drawn = (text for row in rows for text, weight in zip(row.texts, row.weights, strict=True) if weight)
    texts = list(dict.fromkeys(drawn))
    if args.on_error == "skip":
        stored = cache.contains(texts)
        require_captions(int((~stored).sum()), len(stored), cache, "skip", "the training set")
        texts = list(itertools.compress(texts, stored))
    args.check_length(len(texts))
    return TaughtCaptions(texts, teacher.texts(texts), cache)


def tables_of(dataset: CaptionImageDataset) -> list[TableImages]:
    """Return the images of a data set."""
    pairs = zip(dataset.tables, dataset.columns, strict=True)
    return [TableImages(table, columns, dataset.make_sample.max_pixels) for table, columns in pairs]


def open_features(
    args: Stage2Config, model: LLM2CLIPModel, image_processor: Any, tables: Iterable[ContentSet]
) -> ImageFeatures:
    """Open the stored features of a run with frozen towers, after computing those of images that have none yet.

    Args:
        args: The settings of the run, which name the store.
        model: A model with the vision tower of the run, before or after it.
        tables: The images.

    Raises:
        DamagedImageError: An image cannot be read, unless `on_error` is `skip`.
    """
    manifest = feature_manifest(
        type(model.vision_model).__name__,
        vision_fingerprint(model, image_processor, with_projection=False),
        width=args.feature_views * model.config.vision_width,
        pooling=model.config.vision_pooling,
        image_backend=args.image_backend,
        max_pixels=args.max_pixels,
        vision_model_dtype=args.feature_dtype,
        views=args.feature_views,
        crop_scale=args.crop_scale,
        seed=args.sampling_seed,
    )
    return store_features(
        args.feature_cache or Path(args.output_dir) / FEATURES,
        [*tables],
        manifest,
        pooled_features(model, args.feature_dtype, args.feature_views),
        image_processor,
        on_error=args.on_error,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
    )


def _set_statistics(model: LLM2CLIPModel, dataset: StoredPairsDataset) -> None:
    """Fit what the model standardises its features and centres its captions by to the training set."""
    samples, caption_rows, weights = dataset.pairs()
    model.set_vision_statistics(*dataset.features.statistics(dataset.image_rows[np.unique(samples)]))
    total = torch.zeros(dataset.cache.width, dtype=torch.float64)
    for start in range(0, len(caption_rows), PART):
        part = dataset.cache.read(caption_rows[start : start + PART], torch.float64)
        total += torch.from_numpy(weights[start : start + PART]) @ part
    model.set_text_center((total / weights.sum()).float())


def store_states(
    args: Stage2Config, frozen: FrozenLayers, image_processor: Any, dataset: CaptionImageDataset
) -> FrozenStatesDataset:
    """Store what the frozen layers of a vision tower make of all images of a data set, and make one that reads it.

    The states are stored in float16 in a subfolder of `frozen_states_dir` for each combination of frozen weights and
    preprocessing; see [`store_features`].

    Raises:
        OSError: There is no space for the states.
        ValueError: No image can be read, the states exceed float16, or the tower uses patch dropout, which is
            impossible with stored states.
    """
    if getattr(frozen.tower.config, "patch_dropout", 0):
        raise ValueError("patch_dropout does not work with frozen_states_dir; set it to 0.")
    args.check_length(len(dataset))
    frozen.tower.to(args.device)

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        frozen.tower.eval()
        return frozen.compute(inputs["pixel_values"].to(args.device)).flatten(1).cpu()

    manifest, tables = _states_manifest(dataset, frozen, image_processor), tables_of(dataset)
    states = store_features(
        str(args.frozen_states_dir),
        tables,
        manifest,
        forward,
        image_processor,
        on_error=args.on_error,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        shard_size=max(1, SHARD_BYTES // (2 * manifest.width)),
        title="Computing frozen vision layers",
    )
    return FrozenStatesDataset(dataset, tables, states, frozen.state_shape)


def _states_manifest(images: CaptionImageDataset, frozen: FrozenLayers, image_processor: Any) -> StoreManifest:
    sample, tower = images.make_sample, frozen.tower
    config: dict[str, Any] = tower.config.to_dict()  # type: ignore[operator, union-attr]
    identity = {
        "fingerprint": frozen.fingerprint(),
        "layers": frozen.num_layers,
        "tower": {key: value for key, value in config.items() if key not in NOT_COMPUTED},
        "state_shape": frozen.state_shape,
        "image_processor": preprocessing(image_processor),
        "image_backend": sample.eval_transform.backend if sample.eval_transform is not None else None,
        "max_pixels": sample.max_pixels,
    }
    tokens, width = frozen.state_shape
    return StoreManifest(
        kind="states",
        encoder=type(tower).__name__,
        identity=json.loads(json.dumps(identity, default=str)),
        width=tokens * width,
    )
