"""Frozen lower layers of a vision tower, whose outputs can be stored and trained on.

A training step then costs the upper layers only. The images have no augmentation, since one view of each is stored.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Parameters that have no part in the pooled output, by the tower's model type. DDP would wait for their gradients.
# For other towers it has to look for such parameters in every step, which is the Trainer's default.
UNUSED = {
    "dinov2": ["embeddings.mask_token"],
    "dinov2_with_registers": ["embeddings.mask_token"],
    "dinov3_vit": ["embeddings.mask_token"],
}


def freeze_unused(tower: nn.Module) -> None:
    """Freeze the parameters of a vision tower that its pooled output does not depend on."""
    model_type = getattr(getattr(tower, "config", None), "model_type", "")
    for name in UNUSED.get(model_type, []):
        tower.get_parameter(name).requires_grad_(False)


@dataclass
class LayerStack:
    """The place of the transformer layers in a vision tower."""

    parent: nn.Module
    name: str

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.parent, self.name)

    @contextlib.contextmanager
    def replaced(self, layers: nn.ModuleList) -> Iterator[None]:
        """Within this context, the tower has other layers."""
        own = self.layers
        setattr(self.parent, self.name, layers)
        try:
            yield
        finally:
            setattr(self.parent, self.name, own)

    @classmethod
    def find(cls, tower: nn.Module) -> LayerStack:
        """Find the longest `ModuleList` in a tower.

        Raises:
            ValueError: There is none.
        """
        stacks = [
            (len(child), parent, name)
            for parent in tower.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.ModuleList)
        ]
        if not stacks:
            raise ValueError(
                f"{type(tower).__name__} has no ModuleList of layers, which freeze_vision_layers needs; set it to 0."
            )
        _, parent, name = max(stacks, key=lambda stack: stack[0])
        return cls(parent, name)


class _StoredStates(nn.Module):
    """Stands in for the frozen layers and returns their stored outputs."""

    def __init__(self, states: Tensor, extra_outputs: int) -> None:
        super().__init__()
        self.states = states
        self.extra_outputs = extra_outputs

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        states = self.states.to(hidden_states.dtype)
        return (states, *[None] * self.extra_outputs) if self.extra_outputs else states


class FrozenLayers:
    """The lower part of a vision tower, frozen: some of its transformer layers and everything before them.

    Args:
        tower: The vision tower.
        num_layers: Number of transformer layers to freeze; `-n` leaves the last `n` trainable.
        image_size: Height and width of the images in pixels.

    Attributes:
        state_shape: (tokens, width) of the states that enter the first trained layer.

    Raises:
        ValueError: The tower has fewer layers.
    """

    def __init__(self, tower: nn.Module, num_layers: int, image_size: tuple[int, int]) -> None:
        self.tower = tower
        self.image_size = image_size
        self.stack = LayerStack.find(tower)
        count = len(self.stack.layers)
        self.num_layers = num_layers if num_layers >= 0 else count + num_layers
        if not 0 < self.num_layers <= count:
            raise ValueError(f"freeze_vision_layers is {num_layers}, but the tower has {count} layers.")
        self._extra_outputs = 0
        self.state_shape = tuple(self.compute(self._placeholder(1)).shape[1:])
        for parameter in self._before_first_trained():
            parameter.requires_grad_(False)

    def _before_first_trained(self) -> Iterator[nn.Parameter]:
        """The embeddings, which towers register before their layers, and the frozen layers."""
        layers = {id(parameter) for parameter in self.stack.layers.parameters()}
        for parameter in self.tower.parameters():
            if id(parameter) in layers:
                break
            yield parameter
        yield from self.stack.layers[: self.num_layers].parameters()

    def _placeholder(self, batch: int) -> Tensor:
        parameter = next(self.tower.parameters())
        pixel = torch.zeros(1, 1, 1, 1, device=parameter.device, dtype=parameter.dtype)
        return pixel.expand(batch, 3, *self.image_size)

    @torch.no_grad()
    def compute(self, pixel_values: Tensor) -> Tensor:
        """Compute the states that enter the first trained layer: `(batch, tokens, hidden_size)`."""
        captured: list[Tensor] = []

        def capture(module: nn.Module, args: Any, output: Any) -> None:
            states, *extra = output if isinstance(output, tuple) else (output,)
            captured.append(states)
            self._extra_outputs = len(extra)

        layers = self.stack.layers[: self.num_layers]
        handle = layers[-1].register_forward_hook(capture)
        try:
            with self.stack.replaced(layers):
                self.tower(pixel_values=pixel_values)
        finally:
            handle.remove()
        return captured[0]

    @contextlib.contextmanager
    def replaced_by(self, states: Tensor) -> Iterator[Tensor]:
        """Within this context, the tower starts from stored states `(batch, tokens, hidden_size)`.

        Yields:
            Placeholder pixel values `(batch, 3, height, width)` for the tower's forward pass.
        """
        stored = _StoredStates(states, self._extra_outputs)
        with self.stack.replaced(nn.ModuleList([stored, *self.stack.layers[self.num_layers :]])):
            yield self._placeholder(len(states))

    def fingerprint(self) -> str:
        """Compute a hash of the frozen weights."""
        digest = hashlib.sha256(f"{type(self.tower).__name__} {self.num_layers}".encode())
        for name, parameter in self.tower.named_parameters():
            if not parameter.requires_grad:
                digest.update(name.encode())
                digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]
