"""Outputs of the frozen layers of a vision tower, computed once per data set and stored on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Subset

from llm2clip.data import CaptionImageDataset, SampleIndex, SkippedSample
from llm2clip.data.sampling import EpochDataset
from llm2clip.embedding.image_batches import forward_images
from llm2clip.trainers.frozen_layers import FrozenLayers
from llm2clip.utils.files import write_json
from llm2clip.utils.processes import process_state

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATES = "states.npy"


class FrozenStatesDataset(EpochDataset):
    """Captioned images whose pixels are replaced by the outputs of the frozen layers.

    These states are computed on first use, by all processes together, and stored in float16 in `folder`, in one
    subfolder per combination of frozen weights, data and preprocessing, which later runs reuse.

    Args:
        captions: The data set without images, which draws the captions.
        images: Evaluation samples of the same data set in the same order, prepared by `image_processor`.
        batch_size: Images per forward pass.
        num_workers: Worker processes that read images.

    Raises:
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
        self.captions = captions
        identity = {
            "layers": frozen.num_layers,
            "weights": frozen.fingerprint(),
            "data": [table._fingerprint for table in images.tables],
            "image_processor": image_processor.to_dict(),
            "on_error": images.make_sample.on_error,
        }
        if images.make_sample.eval_transform is not None and images.make_sample.eval_transform.backend != "exact":
            identity["image_backend"] = images.make_sample.eval_transform.backend
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder = Path(folder) / digest
        if (self.folder / MANIFEST).exists():
            logger.info("reusing the outputs of the frozen layers in %s.", self.folder)
        else:
            self._build(images, frozen, batch_size, num_workers)
        manifest = json.loads((self.folder / MANIFEST).read_text())
        self.skipped: dict[int, tuple[str, str]] = {row: (key, reason) for row, key, reason in manifest["skipped"]}
        self.states: np.ndarray = np.load(self.folder / STATES, mmap_mode="r")

    def _build(self, images: CaptionImageDataset, frozen: FrozenLayers, batch_size: int, num_workers: int) -> None:
        state = process_state()
        state.wait_for_everyone()  # until all have checked for the manifest
        if state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            shape = (len(images), *frozen.state_shape)
            np.lib.format.open_memmap(self.folder / STATES, mode="w+", dtype=np.float16, shape=shape)
        state.wait_for_everyone()
        states = np.lib.format.open_memmap(self.folder / STATES, mode="r+")
        start, stop = (len(images) * (state.process_index + i) // state.num_processes for i in (0, 1))
        frozen.tower.eval()
        device = next(frozen.tower.parameters()).device

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            output = frozen.compute(inputs["pixel_values"].to(device)).half()
            if not output.isfinite().all():
                raise ValueError("the outputs of the frozen layers exceed float16; unset frozen_states_dir.")
            return output.cpu()

        part, title, skipped = Subset(images, range(start, stop)), "Computing frozen vision layers", []
        for batch in forward_images(part, forward, batch_size, num_workers, title, state.is_main_process):
            first = start + batch.start
            skipped += [(row, *sample) for row, sample in enumerate(batch.skipped, first) if sample is not None]
            if batch.output is not None:
                states[[first + index for index in batch.good]] = batch.output.numpy()
        states.flush()
        skipped = gather_object(skipped)
        if len(skipped) == len(images):
            raise ValueError(f"none of the {len(images)} images can be read.")
        if state.is_main_process:
            # Written last: states without a manifest are incomplete.
            write_json(self.folder / MANIFEST, {"skipped": skipped})
        state.wait_for_everyone()

    @property
    def starts(self) -> np.ndarray:
        """See [`ConcatenatedTables`]."""
        return self.captions.starts

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: SampleIndex) -> dict[str, Any] | SkippedSample:
        if index.index in self.skipped:
            return SkippedSample(*self.skipped[index.index])
        sample = self.captions[index]
        if isinstance(sample, dict):
            sample["vision_states"] = torch.from_numpy(np.array(self.states[index.index]))
        return sample
