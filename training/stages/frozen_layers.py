"""A vision tower whose lower layers are frozen and whose outputs there are computed once.

Training then costs the upper layers only. The images are seen without augmentation, since the stored states are those
of one view.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from llm2clip_training.data import CaptionImageDataset, SampleIndex, SkippedSample
from llm2clip_training.data.sampling import EpochDataset

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATES = "states.npy"


@dataclass
class LayerStack:
    """Where a vision tower keeps its transformer layers."""

    parent: nn.Module
    name: str

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.parent, self.name)

    @classmethod
    def find(cls, tower: nn.Module) -> LayerStack:
        """The longest `ModuleList` in a tower.

        Raises:
            ValueError: The tower has none.
        """
        stacks = [
            (len(child), parent, name)
            for parent in tower.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.ModuleList)
        ]
        if not stacks:
            raise ValueError(
                f"{type(tower).__name__} keeps its layers in no ModuleList: freeze_vision_layers cannot be used."
            )
        _, parent, name = max(stacks, key=lambda stack: stack[0])
        return cls(parent, name)


class _StoredStates(nn.Module):
    """Takes the place of the frozen layers and answers with what they computed earlier."""

    def __init__(self, states: Tensor, extra_outputs: int) -> None:
        super().__init__()
        self.states = states
        self.extra_outputs = extra_outputs

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        states = self.states.to(hidden_states.dtype)
        return (states, *[None] * self.extra_outputs) if self.extra_outputs else states


class FrozenLayers:
    """The lower part of a vision tower.

    Args:
        tower: The vision tower.
        num_layers: How many of its transformer layers are frozen, with everything before them.
        image_size: Height and width of its images in pixels.

    Raises:
        ValueError: The tower has not that many layers.
    """

    def __init__(self, tower: nn.Module, num_layers: int, image_size: tuple[int, int]) -> None:
        self.tower = tower
        self.image_size = image_size
        self.stack = LayerStack.find(tower)
        self.num_layers = num_layers
        if not 0 < num_layers <= len(self.stack.layers):
            raise ValueError(
                f"freeze_vision_layers is {num_layers}, but the tower has {len(self.stack.layers)} layers."
            )
        self._extra_outputs = 0
        self._freeze()

    def _freeze(self) -> None:
        """Turn off the gradients of everything that runs before the first trained layer.

        Which parameters those are is found by a backward pass that stops at that layer's input.
        """

        def detach(module: nn.Module, args: Any, output: Any) -> Any:
            states, *extra = output if isinstance(output, tuple) else (output,)
            self._extra_outputs = len(extra)
            states = states.detach().requires_grad_()
            return (states, *extra) if extra else states

        handle = self.stack.layers[self.num_layers - 1].register_forward_hook(detach)
        try:
            with torch.enable_grad():
                self.tower(pixel_values=self._placeholder(1)).pooler_output.sum().backward()
        finally:
            handle.remove()
        for parameter in self.tower.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    def _placeholder(self, batch: int) -> Tensor:
        parameter = next(self.tower.parameters())
        pixel = torch.zeros(1, 1, 1, 1, device=parameter.device, dtype=parameter.dtype)
        return pixel.expand(batch, 3, *self.image_size)

    @torch.no_grad()
    def compute(self, pixel_values: Tensor) -> Tensor:
        """The states that enter the first trained layer: `(batch, tokens, hidden_size)`."""
        captured: list[Tensor] = []

        def capture(module: nn.Module, args: Any, output: Any) -> None:
            captured.append(output[0] if isinstance(output, tuple) else output)
            raise _Done

        handle = self.stack.layers[self.num_layers - 1].register_forward_hook(capture)
        try:
            with contextlib.suppress(_Done):
                self.tower(pixel_values=pixel_values)
        finally:
            handle.remove()
        return captured[0]

    @contextlib.contextmanager
    def replaced_by(self, states: Tensor) -> Iterator[Tensor]:
        """Within this context the tower starts from `states` `(batch, tokens, hidden_size)`.

        Yields:
            Placeholder pixel values `(batch, 3, height, width)` for the tower's forward pass.
        """
        layers = self.stack.layers
        stand_in = nn.ModuleList([_StoredStates(states, self._extra_outputs), *layers[self.num_layers :]])
        setattr(self.stack.parent, self.stack.name, stand_in)
        try:
            yield self._placeholder(len(states))
        finally:
            setattr(self.stack.parent, self.stack.name, layers)

    def fingerprint(self) -> str:
        """Identifies the frozen weights."""
        digest = hashlib.sha256(f"{type(self.tower).__name__} {self.num_layers}".encode())
        for name, parameter in self.tower.named_parameters():
            if not parameter.requires_grad:
                digest.update(name.encode())
                digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]


class _Done(Exception):  # noqa: N818
    """Ends a forward pass as soon as the wanted states are there."""


class FrozenStatesDataset(EpochDataset):
    """Captioned images as the states of the frozen layers instead of pixels.

    The states are computed on first use and kept in `folder`, one subfolder per combination of frozen weights, data
    and image size, so that several runs share them.

    Args:
        captions: The data set, without images: it draws the captions.
        images: The data set's images, in the same order: evaluation samples.
        frozen: The frozen layers.
        folder: Where states are kept.
        batch_size: Images per forward pass.
        num_workers: Processes that read images.
    """

    def __init__(
        self,
        captions: CaptionImageDataset,
        images: CaptionImageDataset,
        frozen: FrozenLayers,
        folder: str | Path,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        self.captions = captions
        identity = {
            "layers": frozen.num_layers,
            "weights": frozen.fingerprint(),
            "data": [table._fingerprint for table in images.tables],
            "image_size": list(frozen.image_size),
        }
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self.folder = Path(folder) / digest
        state = PartialState()
        if state.is_main_process and not (self.folder / MANIFEST).exists():
            self._build(images, frozen, identity, batch_size, num_workers)
        elif state.is_main_process:
            logger.info("the frozen layers' states are in %s already.", self.folder)
        state.wait_for_everyone()
        self.skipped: dict[int, tuple[str, str]] = {
            int(row): (key, reason)
            for row, (key, reason) in json.loads((self.folder / MANIFEST).read_text())["skipped"].items()
        }
        self.states: np.ndarray = np.load(self.folder / STATES, mmap_mode="r")

    def _build(
        self,
        images: CaptionImageDataset,
        frozen: FrozenLayers,
        identity: dict[str, Any],
        batch_size: int,
        num_workers: int,
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        frozen.tower.eval()
        loader = DataLoader(images, batch_size=batch_size, num_workers=num_workers, collate_fn=list)
        skipped: dict[int, tuple[str, str]] = {}
        states: np.memmap | None = None
        row = 0
        for samples in tqdm(loader, desc="Frozen vision layers", disable=not sys.stderr.isatty()):
            good = [index for index, sample in enumerate(samples) if not isinstance(sample, SkippedSample)]
            skipped |= {
                row + index: (sample.key, sample.reason)
                for index, sample in enumerate(samples)
                if isinstance(sample, SkippedSample)
            }
            if good:
                device = next(frozen.tower.parameters()).device
                output = frozen.compute(torch.stack([samples[index]["pixel_values"] for index in good]).to(device))
                if states is None:
                    shape = (len(images), *output.shape[1:])
                    states = np.lib.format.open_memmap(self.folder / STATES, mode="w+", dtype=np.float16, shape=shape)
                states[[row + index for index in good]] = output.half().cpu().numpy()
            row += len(samples)
        if states is None:
            raise ValueError(f"none of the {len(images)} images can be read.")
        states.flush()
        # The manifest comes last: states without one are not used.
        manifest = {**identity, "skipped": skipped}
        temporary = self.folder / f"{MANIFEST}.tmp"
        temporary.write_text(json.dumps(manifest, indent=2))
        temporary.replace(self.folder / MANIFEST)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: SampleIndex) -> dict[str, Any] | SkippedSample:
        if index.index in self.skipped:
            return SkippedSample(*self.skipped[index.index])
        sample = self.captions[index]
        if isinstance(sample, dict):
            sample["vision_states"] = torch.from_numpy(np.array(self.states[index.index]))
        return sample
