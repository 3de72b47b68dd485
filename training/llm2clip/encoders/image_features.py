"""What a frozen vision tower makes of images, stored once per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from llm2clip.command_line.processes import process_state
from llm2clip.data import EvalTransform, ImageBackend, OnError, SampleError, SkippedSample, TrainTransform
from llm2clip.data.rows import stable_seed
from llm2clip.encoders.batches import ContentSet, forward_images
from llm2clip.files.atomic import digest_json
from llm2clip.store import Store, StoreManifest, build_store
from llm2clip.store.building import ComputedRows, check_rows
from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError

# Rows of a shard are few, because an image costs much more than a caption.
SHARD_SIZE = 2048
# Rows that are read at once for the statistics.
PART = 4096


class ImageFeatures(Store):
    """What a model computed of images, found by the key of the image; see [`store_features`].

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

    def statistics(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Compute mean and standard deviation of each feature over rows (which may repeat) and views, in float64.

        Returns:
            Two float32 tensors of the width of a view.
        """
        total = squares = torch.zeros(())
        for start in range(0, len(rows), PART):
            part = self.read(rows[start : start + PART]).double().view(-1, self.width // self.views)
            total, squares = total + part.sum(dim=0), squares + part.square().sum(dim=0)
        count = len(rows) * self.views
        mean = total / count
        return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()


def feature_manifest(
    vision_model: str,
    fingerprint: str,
    *,
    width: int,
    pooling: str,
    image_backend: ImageBackend,
    max_pixels: int,
    vision_model_dtype: str = "float32",
    views: int = 1,
    crop_scale: Sequence[float] = (1.0, 1.0),
    seed: int = 0,
) -> StoreManifest:
    """Describe the pooled features of a frozen vision tower.

    Args:
        vision_model: Name of the tower in messages.
        fingerprint: Identity of the tower and its image processor.
        width: Of a row, which has all views side by side.
        pooling: How the tower's states become features; see `vision_pooling` of [`LLM2CLIPConfig`].
        image_backend, max_pixels: How an image is decoded.
        vision_model_dtype: The dtype that the tower computes in.
        views: See [`ImageFeatures`].
        crop_scale, seed: Area of the crops, and what they are drawn by, if there are several views.
    """
    identity: dict[str, Any] = {
        "fingerprint": fingerprint,
        "pooling": pooling,
        "vision_model_dtype": vision_model_dtype,
        "image_backend": image_backend,
        "max_pixels": max_pixels,
        "views": views,
        "crop_scale": list(crop_scale) if views > 1 else [1.0, 1.0],
        "seed": seed if views > 1 else 0,
    }
    return StoreManifest(kind="features", encoder=vision_model, identity=identity, width=width)


class _Views(Dataset):
    """The views of some images: `pixel_values` (views, 3, H, W), and whatever else the tower takes of a single one."""

    def __init__(
        self,
        sets: Sequence[ContentSet],
        locations: Sequence[tuple[int, int]],
        seeds: Sequence[int],
        evaluation: EvalTransform,
        training: TrainTransform | None,
        views: int,
        on_error: OnError,
    ) -> None:
        self.sets, self.locations, self.seeds = sets, locations, seeds
        self.evaluation, self.training, self.views, self.on_error = evaluation, training, views, on_error

    def __len__(self) -> int:
        return len(self.locations)

    def key(self, index: int) -> str:
        """Key of an image in messages."""
        number, row = self.locations[index]
        return self.sets[number].key(row)

    def __getitem__(self, index: int) -> dict[str, Tensor] | SkippedSample:
        number, row = self.locations[index]
        images = self.sets[number]
        try:
            image = images.decode(row, self.evaluation.decode)
            inputs = self.evaluation.inputs(image, images.key(row))
        except SampleError as error:
            if self.on_error == "raise":
                raise
            return SkippedSample(error.key, error.reason or str(error))
        if self.training is None:
            return inputs
        crops = [self.training(image, stable_seed(self.seeds[index], view)) for view in range(1, self.views)]
        return {"pixel_values": torch.stack([inputs["pixel_values"], *crops])}


def store_features(
    folder: str | Path,
    sets: Sequence[ContentSet],
    manifest: StoreManifest,
    forward: Callable[[dict[str, Tensor]], Tensor],
    image_processor: BaseImageProcessor,
    *,
    on_error: OnError = "raise",
    batch_size: int = 64,
    num_workers: int = 0,
    shard_size: int = SHARD_SIZE,
    title: str = "Features of images",
) -> ImageFeatures:
    """Compute what a frozen model makes of images, as far as it is not stored, and open the store.

    Each identity has its own subfolder of `folder`, which later runs use and complete; runs that need it at the same
    time wait for each other. All processes share the work. Equal images are computed once. [`build_store`] says how a
    build survives a kill.

    Args:
        folder: The folder of all such stores.
        sets: The images.
        manifest: The identity and the format of the rows.
        forward: Maps the inputs of images, on the CPU, to rows, `(images * views, width)`.
        image_processor: Prepares the images.
        on_error: `raise` the error of an image that cannot be decoded, or `skip` it; see [`ImageFeatures`].
        batch_size, num_workers: Images per forward pass, and worker processes that decode them.
        shard_size: Images of a shard.
        title: Of the progress bar.

    Raises:
        DamagedImageError: An image cannot be decoded, and `on_error` is `raise`.
        ValueError: No image can be decoded, or a row is not finite or exceeds the range of the dtype.
    """
    identity = manifest.identity
    evaluation, training = EvalTransform(image_processor, identity["image_backend"]), None
    num_views = identity.get("views", 1)
    if num_views > 1:
        low, high = identity["crop_scale"]
        training = TrainTransform(image_processor, scale=(low, high))
    all_keys = np.concatenate([images.content_keys() for images in sets]).astype(np.int64)
    first = np.sort(np.unique(all_keys, axis=0, return_index=True)[1])
    bounds = np.cumsum([0, *map(len, sets)])
    numbers = np.searchsorted(bounds, first, side="right") - 1
    locations = list(zip(numbers.tolist(), (first - bounds[numbers]).tolist(), strict=True))
    keys = all_keys[first]

    state = process_state()
    with build_store(
        Path(folder) / digest_json(dict(identity)),
        keys,
        manifest,
        title=title,
        shard_size=shard_size,
        wait_for_others=True,
        rank=state.process_index,
        world_size=state.num_processes,
        barrier=state.wait_for_everyone,
        kind=ImageFeatures,
    ) as build:
        for number, positions in build:
            # Seeded by the key, so that the crops of an image do not depend on its place in the data.
            seeds = [stable_seed(identity.get("seed", 0), "view", *keys[position].tolist()) for position in positions]
            chosen = [locations[position] for position in positions]
            views = _Views(sets, chosen, seeds, evaluation, training, num_views, on_error)
            rows = torch.zeros(len(positions), manifest.width, dtype=getattr(torch, manifest.dtype))
            unreadable: list[tuple[int, str, str]] = []
            for batch in forward_images(views, forward, batch_size, num_workers, show=False):
                unreadable += [
                    (row, *sample) for row, sample in enumerate(batch.skipped, batch.start) if sample is not None
                ]
                if batch.output is not None:
                    good = [row for row, sample in enumerate(batch.skipped, batch.start) if sample is None]
                    names = [f"image {views.key(index)}" for index in good]
                    rows[good] = check_rows(batch.output.reshape(len(good), -1), manifest.dtype, names.__getitem__)
                build.bar.update(len(batch.skipped))
            build.write(number, positions, ComputedRows(rows, skipped=unreadable))
    features = build.store
    skipped = [features.skipped[row] for row in features.find(keys).tolist() if row in features.skipped]
    if skipped and on_error == "raise":
        raise DamagedImageError(*skipped[0])
    if len(skipped) == len(first):
        raise ValueError(f"none of the {len(first)} images can be read; the first: {skipped[0].reason}.")
    return features


def pooled_features(model: Any, dtype_name: str, views: int) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return what a [`store_features`] computes of images: the pooled features of a model's vision tower.

    Args:
        model: A model with `get_vision_features`, on its device.
        dtype_name: The dtype that the tower computes in.
        views: Views of an image.
    """
    dtype = getattr(torch, dtype_name)

    @torch.inference_mode()
    def forward(inputs: dict[str, Tensor]) -> Tensor:
        model.eval()
        tower = model.vision_model
        inputs = {name: value.to(tower.device) for name, value in inputs.items()}
        if views > 1:
            inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
        with torch.autocast(tower.device.type, dtype, enabled=dtype != torch.float32):
            features = model.get_vision_features(**inputs)
        return features.float().cpu()

    return forward
