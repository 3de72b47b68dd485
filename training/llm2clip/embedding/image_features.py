"""Pooled features of a frozen vision tower, stored once per image, in the same form as caption embeddings."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from llm2clip.data import EvalTransform, ImageBackend, OnError, SampleError, SkippedSample, TrainTransform
from llm2clip.data.sampling import stable_seed
from llm2clip.embedding.cache_files import CacheDamagedError, StoreManifest
from llm2clip.embedding.image_batches import TableImages, forward_images
from llm2clip.embedding.keyed_rows import KeyedRows
from llm2clip.embedding.row_builder import build_rows, stored_rows
from llm2clip.utils.files import digest_json
from llm2clip.utils.library_errors import reading
from llm2clip.utils.locks import folder_lock
from llm2clip.utils.progress import ProgressBar
from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError

# Rows of a shard are few, because an image costs much more than a caption.
SHARD_SIZE = 2048
# Rows that are read at once for the statistics.
PART = 4096
# Seconds to wait for another run that computes the same features: a week, or 20 minutes with several processes, of
# which the others wait in a collective operation, which ends after 30 minutes by default.
PATIENCE, PATIENCE_OF_SEVERAL = 7 * 24 * 3600.0, 20 * 60.0


@dataclass(kw_only=True)
class FeatureManifest(StoreManifest):
    """The manifest of [`ImageFeatures`].

    Attributes:
        fingerprint, vision_model_name: Identity of the vision tower and its image processor, and its name in messages.
        pooling: How the tower's states become features; see `vision_pooling` of [`LLM2CLIPConfig`].
        vision_model_dtype: The dtype that the tower computed in.
        image_backend, max_pixels: How an image is decoded.
        views: Views of an image in a row, side by side: the one of evaluation, then random crops.
        crop_scale, seed: Area of the crops, and what they were drawn by; only with several views.
        num_skipped: Images that could not be decoded.
        kwargs: See [`StoreManifest`]; `hidden_size` is that of all views together.
    """

    FORMAT = "llm2clip-image-features"
    NAME = "image feature cache"
    UNIT = "image"
    REMEDY = "start the training again"
    IDENTITY = (
        *("fingerprint", "pooling", "hidden_size", "vision_model_dtype", "dtype", "image_backend", "max_pixels"),
        *("views", "crop_scale", "seed"),
    )

    vision_model_name: str
    pooling: str
    image_backend: ImageBackend
    max_pixels: int
    vision_model_dtype: str = "float32"
    views: int = 1
    crop_scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    seed: int = 0
    shard_size: int = SHARD_SIZE
    num_skipped: int = 0

    @property
    def encoder(self) -> str:
        return self.vision_model_name

    def finish(self, metadata: list[dict[str, str]]) -> None:
        self.num_skipped = sum(len(json.loads(entries["skipped"])) for entries in metadata)


class ImageFeatures(KeyedRows[FeatureManifest]):
    """Stored features of images, found by the key of the image; see [`FeatureStore`].

    Attributes:
        skipped: Key and reason of the rows whose image could not be decoded; their features are zero.
    """

    def __init__(self, path: Path, manifest: FeatureManifest) -> None:
        shards = self.open_shards(path, manifest)
        super().__init__(path, manifest, shards)
        self.skipped: dict[int, SkippedSample] = {}
        for start, shard in zip(self._starts.tolist(), shards, strict=False):
            with reading(shard.path, CacheDamagedError):
                for row, key, reason in json.loads(shard.metadata["skipped"]):
                    self.skipped[start + row] = SkippedSample(key, reason)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself; the folder may grow meanwhile.
        return type(self), (self.path, self.manifest)

    def read_views(self, rows: np.ndarray, views: np.ndarray | int = 0) -> Tensor:
        """Return the features of one view of each row, `(rows, width)` in the dtype of the cache."""
        features = self.read(rows)
        count = self.manifest.views
        if count == 1:
            return features
        by_view = features.view(len(rows), count, -1)
        return by_view[torch.arange(len(rows)), torch.as_tensor(views).expand(len(rows))]

    def statistics(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Compute mean and standard deviation of each feature over rows (which may repeat) and views, in float64.

        Returns:
            Two float32 tensors of the width of a view.
        """
        total = squares = torch.zeros(())
        for start in range(0, len(rows), PART):
            part = self.read(rows[start : start + PART]).double().view(-1, self.hidden_size // self.manifest.views)
            total, squares = total + part.sum(dim=0), squares + part.square().sum(dim=0)
        count = len(rows) * self.manifest.views
        mean = total / count
        return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()


class _Views(Dataset):
    """The views of some images: `pixel_values` (views, 3, H, W), and whatever else the tower takes of a single one."""

    def __init__(
        self,
        sets: Sequence[TableImages],
        places: Sequence[tuple[int, int]],
        seeds: Sequence[int],
        evaluation: EvalTransform,
        training: TrainTransform | None,
        views: int,
        on_error: OnError,
    ) -> None:
        self.sets, self.places, self.seeds = sets, places, seeds
        self.evaluation, self.training, self.views, self.on_error = evaluation, training, views, on_error

    def __len__(self) -> int:
        return len(self.places)

    def key(self, index: int) -> str:
        """Key of an image in messages."""
        number, row = self.places[index]
        return self.sets[number].key(row)

    def __getitem__(self, index: int) -> dict[str, Tensor] | SkippedSample:
        number, row = self.places[index]
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


class FeatureStore:
    """Computes the pooled features of images by a frozen vision tower, as far as they are not stored, and opens them.

    Each combination of tower, pooling and preprocessing has its own subfolder of `folder`, which later runs use and
    complete; runs that need it at the same time wait for each other. Equal images are computed once. [`build_rows`]
    says how a build survives a kill.

    Args:
        folder: The folder of all feature caches.
        model: A model with `get_vision_features`, on its device.
        image_processor: Prepares the images.
        manifest: The identity and the format of the features.
        state: The processes that share the work.
        on_error: `raise` the error of an image that cannot be decoded, or `skip` it; see [`ImageFeatures`].
        batch_size, num_workers: Images per forward pass, and worker processes that decode them.
    """

    def __init__(
        self,
        folder: str | Path,
        model: Any,
        image_processor: BaseImageProcessor,
        manifest: FeatureManifest,
        *,
        state: PartialState,
        on_error: OnError = "raise",
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        identity = {name: getattr(manifest, name) for name in manifest.IDENTITY}
        self.folder = Path(folder) / digest_json(identity)
        self.model, self.manifest, self.state, self.on_error = model, manifest, state, on_error
        self.batch_size, self.num_workers = batch_size, num_workers
        self.evaluation = EvalTransform(image_processor, manifest.image_backend)
        scale = (manifest.crop_scale[0], manifest.crop_scale[1])
        self.training = TrainTransform(image_processor, scale=scale) if manifest.views > 1 else None

    def open(self, sets: Sequence[TableImages]) -> ImageFeatures:
        """Store the features of images as far as they are missing, and open the store.

        Raises:
            DamagedImageError: An image cannot be decoded, and `on_error` is `raise`.
            ValueError: No image can be decoded, or features are not finite or exceed the range of the dtype.
        """
        all_keys = np.concatenate([images.content_keys() for images in sets]).astype(np.int64)
        first = np.sort(np.unique(all_keys, axis=0, return_index=True)[1])
        bounds = np.cumsum([0, *map(len, sets)])
        numbers = np.searchsorted(bounds, first, side="right") - 1
        places = list(zip(numbers.tolist(), (first - bounds[numbers]).tolist(), strict=True))
        compute = partial(self._compute, sets, places, all_keys[first])
        options: dict[str, Any] = {"rank": self.state.process_index, "world_size": self.state.num_processes}
        options |= {"barrier": self.state.wait_for_everyone, "title": "Features of images"}
        with contextlib.ExitStack() as lock:
            if self.state.is_main_process:
                patience = PATIENCE_OF_SEVERAL if self.state.num_processes > 1 else PATIENCE
                lock.enter_context(folder_lock(self.folder, patience))
            self.state.wait_for_everyone()
            features = ImageFeatures(
                self.folder, build_rows(self.folder, all_keys[first], compute, self.manifest, **options)
            )
            self.state.wait_for_everyone()
        skipped = [features.skipped[row] for row in features.find(all_keys[first]).tolist() if row in features.skipped]
        if skipped and self.on_error == "raise":
            raise DamagedImageError(*skipped[0])
        if len(skipped) == len(first):
            raise ValueError(f"none of the {len(first)} images can be read; the first: {skipped[0].reason}.")
        return features

    def _compute(
        self,
        sets: Sequence[TableImages],
        places: Sequence[tuple[int, int]],
        keys: np.ndarray,
        positions: np.ndarray,
        bar: ProgressBar,
    ) -> tuple[Tensor, dict[str, str]]:
        """Compute the rows of a shard; see `Compute`."""
        manifest, chosen = self.manifest, [places[position] for position in positions]
        # Of the key, so that the crops of an image do not depend on its place in the data.
        seeds = [stable_seed(manifest.seed, "view", *keys[position].tolist()) for position in positions]
        views = _Views(sets, chosen, seeds, self.evaluation, self.training, manifest.views, self.on_error)
        rows = torch.zeros(len(positions), manifest.hidden_size, dtype=getattr(torch, manifest.dtype))
        skipped: list[Any] = []
        for batch in forward_images(views, self._forward, self.batch_size, self.num_workers, show=False):
            skipped += [[row, *found] for row, found in enumerate(batch.skipped, batch.start) if found is not None]
            if batch.output is not None:
                good = [batch.start + index for index in batch.good]
                names = [f"image {views.key(index)}" for index in good]
                rows[good] = stored_rows(batch.output, manifest, names.__getitem__)
            bar.update(advance=len(batch.skipped))
        return rows, {"skipped": json.dumps(skipped)}

    @torch.inference_mode()
    def _forward(self, inputs: dict[str, Tensor]) -> Tensor:
        self.model.eval()
        tower = self.model.vision_model
        inputs = {name: value.to(tower.device) for name, value in inputs.items()}
        if self.manifest.views > 1:
            inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
        dtype = getattr(torch, self.manifest.vision_model_dtype)
        with torch.autocast(tower.device.type, dtype, enabled=dtype != torch.float32):
            features = self.model.get_vision_features(**inputs)
        return features.float().cpu().view(-1, self.manifest.hidden_size)
