"""Outputs of the frozen layers of a vision tower, stored once per image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from llm2clip.data import CaptionImageDataset, SampleIndex, SkippedSample
from llm2clip.data.sampling import EpochDataset
from llm2clip.encoders.batches import TableImages
from llm2clip.encoders.image_features import store_features
from llm2clip.store import StoreManifest
from llm2clip.trainers.frozen_layers import FrozenLayers

# Fields of a tower's config that say where it is from and how it trains, not what it computes in evaluation.
NOT_COMPUTED = ("_name_or_path", "transformers_version", "patch_dropout", "initializer_range")
# Bytes of a shard, since a row has the states of all tokens.
SHARD_BYTES = 64 * 2**20


class FrozenStatesDataset(EpochDataset):
    """Captioned images whose pixels are replaced by the outputs of the frozen layers.

    These states are computed on first use, by all processes together, and stored in float16 in a subfolder of `folder`
    for each combination of frozen weights and preprocessing; see [`store_features`].

    Args:
        captions: The data set without images, which draws the captions.
        images: Evaluation samples of the same data set in the same order, prepared by `image_processor`.
        batch_size: Images per forward pass.
        num_workers: Worker processes that read images.

    Raises:
        OSError: There is no space for the states.
        ValueError: No image can be read, the states exceed float16, or the tower uses patch dropout, which is
            impossible with stored states.
    """

    def __init__(
        self,
        captions: CaptionImageDataset,
        images: CaptionImageDataset,
        frozen: FrozenLayers,
        image_processor: Any,
        folder: str | Path,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        if getattr(frozen.tower.config, "patch_dropout", 0):
            raise ValueError("patch_dropout does not work with frozen_states_dir; set it to 0.")
        self.captions, self._images, self._shape = captions, images, frozen.state_shape

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            frozen.tower.eval()
            device = next(frozen.tower.parameters()).device
            return frozen.compute(inputs["pixel_values"].to(device)).flatten(1).cpu()

        manifest = _manifest(images, frozen, image_processor)
        tables = [
            TableImages(table, columns, images.make_sample.max_pixels)
            for table, columns in zip(images.tables, images.columns, strict=True)
        ]
        self.states = store_features(
            folder,
            tables,
            manifest,
            forward,
            image_processor,
            on_error=images.make_sample.on_error,
            batch_size=batch_size,
            num_workers=num_workers,
            shard_size=max(1, SHARD_BYTES // (2 * manifest.width)),
            title="Computing frozen vision layers",
        )
        self.rows = self.states.find(np.concatenate([table.content_keys() for table in tables]))
        self._tables = tables
        self.folder = self.states.path

    @property
    def starts(self) -> np.ndarray:
        """See [`ConcatenatedTables`]."""
        return self.captions.starts

    def content_digest(self) -> str:
        return self._images.content_digest()

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: SampleIndex) -> dict[str, Any] | SkippedSample:
        row = int(self.rows[index.index])
        if row in self.states.skipped:
            number = int(np.searchsorted(self.starts, index.index, side="right")) - 1
            key = self._tables[number].key(index.index - int(self.starts[number]))
            return SkippedSample(key, self.states.skipped[row].reason)
        sample = self.captions[index]
        if isinstance(sample, dict):
            sample["vision_states"] = self.states.read(self.rows[[index.index]]).view(self._shape)
        return sample


def _manifest(images: CaptionImageDataset, frozen: FrozenLayers, image_processor: Any) -> StoreManifest:
    sample, tower = images.make_sample, frozen.tower
    config: dict[str, Any] = tower.config.to_dict()  # type: ignore[operator, union-attr]
    identity = {
        "fingerprint": frozen.fingerprint(),
        "layers": frozen.num_layers,
        "tower": {key: value for key, value in config.items() if key not in NOT_COMPUTED},
        "state_shape": frozen.state_shape,
        "image_processor": image_processor.to_dict(),
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
