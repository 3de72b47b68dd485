"""What a frozen vision tower makes of images, stored once per image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor

from llm2clip.command_line.processes import process_state
from llm2clip.data import (
    DEFAULT_MAX_PIXELS,
    EvalTransform,
    ImageBackend,
    OnError,
    SkippedSample,
    TrainTransform,
)
from llm2clip.data.rows import stable_seed
from llm2clip.encoders.images import ImageSet, JoinedImages
from llm2clip.encoders.loop import PreparedImages, encode_images
from llm2clip.files.atomic import digest_json
from llm2clip.models.identity import vision_fingerprint
from llm2clip.store import Store, StoreManifest, build_store
from llm2clip.store.shards import ComputedRows
from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError

FeatureDtype = Literal["float32", "bfloat16"]

# Rows of a shard are few, because an image costs much more than a caption.
SHARD_SIZE = 2048


class ImageFeatures(Store):
    """What a model computed of images, found by the key of the image; see [`open_features`].

    Attributes:
        views: Views of an image in a row, side by side: the one of evaluation, then random crops.
        skipped: Key and reason of the rows whose image could not be decoded; they are zero.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.views: int = self.manifest.identity.get("views", 1)
        self.skipped = {row: SkippedSample(key, reason) for row, key, reason in self.manifest.skipped}

    def read_views(self, rows: np.ndarray, views: np.ndarray | int = 0) -> Tensor:
        """Return the features of one view of each row, `(rows, width)` in the stored dtype."""
        features = self.read(rows)
        if self.views == 1:
            return features
        by_view = features.view(len(rows), self.views, -1)
        return by_view[torch.arange(len(rows)), torch.as_tensor(views).expand(len(rows))]


class _Views(PreparedImages):
    """The views of images: `pixel_values` (views, 3, H, W), and whatever else the tower takes of a single one."""

    def __init__(
        self, images: ImageSet, keys: np.ndarray, image_processor: Any, identity: dict[str, Any], on_error: OnError
    ) -> None:
        evaluation = EvalTransform(image_processor, identity["image_backend"])
        super().__init__(images, evaluation.inputs, on_error, evaluation.decode)
        self.views, self.seed, self.keys = identity["views"], identity["seed"], keys
        low, high = identity["crop_scale"]
        self.training = TrainTransform(image_processor, scale=(low, high)) if self.views > 1 else None

    def inputs(self, row: int) -> dict[str, Tensor]:
        image = self.images.decode(row, self.decode)
        inputs = self.prepare(image, self.images.key(row))
        if self.training is None:
            return inputs
        # Seeded by the key, so that the crops of an image do not depend on its place in the data.
        seed = stable_seed(self.seed, "view", *self.keys[row].tolist())
        crops = [self.training(image, stable_seed(seed, view)) for view in range(1, self.views)]
        return {"pixel_values": torch.stack([inputs["pixel_values"], *crops])}


def open_features(
    model: LLM2CLIPModel,
    image_processor: BaseImageProcessor,
    images: Iterable[ImageSet],
    folder: str | Path,
    *,
    dtype: FeatureDtype = "float32",
    views: int = 1,
    crop_scale: Sequence[float] = (1.0, 1.0),
    seed: int = 0,
    image_backend: ImageBackend = "exact",
    on_error: OnError = "raise",
    batch_size: int = 64,
    num_workers: int = 0,
    shard_size: int = SHARD_SIZE,
) -> ImageFeatures:
    """Open the pooled features of a frozen vision tower, after computing those of images that have none yet.

    Each identity has its own subfolder of `folder`, which later runs use and complete; runs that need it at the same
    time wait for each other. All processes share the work. Equal images are computed once. [`build_store`] says how a
    build survives a kill.

    Args:
        model: A model with the tower, which is moved to the device of the process.
        image_processor: Prepares the images.
        folder: The folder of all such stores.
        dtype: The dtype that the tower computes in.
        views: Views of each image: that of evaluation, and random crops.
        crop_scale, seed: Area of the crops, and what they are drawn by, if there are several views.
        image_backend: How an image is decoded.
        on_error: `raise` the error of an image that cannot be decoded, or `skip` it; see [`ImageFeatures`].
        batch_size, num_workers: Images per forward pass, and worker processes that decode them.
        shard_size: Images of a shard.

    Raises:
        DamagedImageError: An image cannot be decoded, and `on_error` is `raise`.
        NonFiniteError: A feature is NaN or infinite; the message names its image.
        ValueError: No image can be decoded, or a feature exceeds the range of the stored dtype.
    """
    tower = model.vision_model.to(process_state().device)
    several = views > 1
    identity: dict[str, Any] = {
        "fingerprint": vision_fingerprint(model, image_processor, with_projection=False),
        "pooling": model.config.vision_pooling,
        **({"layers": layers} if (layers := model.config.vision_layers) else {}),
        "vision_model_dtype": dtype,
        "image_backend": image_backend,
        "max_pixels": DEFAULT_MAX_PIXELS,
        "views": views,
        "crop_scale": list(crop_scale) if several else [1.0, 1.0],
        "seed": seed if several else 0,
    }
    width = views * model.config.vision_width
    manifest = StoreManifest(kind="features", encoder=type(tower).__name__, identity=identity, width=width)
    joined = JoinedImages(list(images))
    keys = joined.content_keys()
    first = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    prepared = _Views(joined, keys, image_processor, identity, on_error)

    def forward(prepared: dict[str, Tensor]) -> Tensor:
        inputs: dict[str, Any] = {name: value.to(tower.device) for name, value in prepared.items()}
        if several:
            inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
        with torch.autocast(tower.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            return model.get_vision_features(**inputs)

    def compute(positions: np.ndarray) -> Iterator[ComputedRows]:
        return encode_images(model, prepared, first[positions].tolist(), forward, width, batch_size, num_workers)

    features = build_store(
        Path(folder) / digest_json(identity),
        keys[first],
        manifest,
        compute,
        title="Features of images",
        shard_size=shard_size,
        processes=process_state(),
        kind=ImageFeatures,
        name=lambda position: f"image {joined.key(int(first[position]))}",
    )
    stored = features.find(keys[first]).tolist()
    skipped = [features.skipped[row] for row in stored if row in features.skipped]
    if skipped and on_error == "raise":
        raise DamagedImageError(*skipped[0])
    if len(skipped) == len(first):
        raise ValueError(f"none of the {len(first)} images can be read; the first: {skipped[0].reason}.")
    return features
