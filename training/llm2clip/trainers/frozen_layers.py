"""A vision tower whose lower layers are frozen and whose outputs there are computed once.

Training then costs the upper layers only. The images are seen without augmentation, since the stored states are those
of one view.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def freeze_unused(tower: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Turn off the gradients of what has no part in the pooled output, such as DINOv2's mask token.

    DDP would wait for their gradients for ever.

    Args:
        tower: A vision tower.
        inputs: What its image processor makes of an image.
    """
    parameter = next(tower.parameters())
    with torch.enable_grad():
        inputs = {name: value.to(parameter.device) for name, value in inputs.items()}
        tower(**inputs).pooler_output.sum().backward()
    _freeze_without_gradient(tower)


def _freeze_without_gradient(tower: nn.Module) -> None:
    for parameter in tower.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
        parameter.grad = None


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
        num_layers: How many of its transformer layers are frozen, with everything before them; `-n` leaves the last
            `n` to be trained.
        image_size: Height and width of its images in pixels.

    Attributes:
        state_shape: (tokens, width) of the states that enter the first trained layer.

    Raises:
        ValueError: The tower has not that many layers.
    """

    def __init__(self, tower: nn.Module, num_layers: int, image_size: tuple[int, int]) -> None:
        self.tower = tower
        self.image_size = image_size
        self.stack = LayerStack.find(tower)
        count = len(self.stack.layers)
        self.num_layers = num_layers if num_layers >= 0 else count + num_layers
        if not 0 < self.num_layers <= count:
            raise ValueError(f"freeze_vision_layers is {num_layers}, but the tower has {count} layers.")
        self.state_shape: tuple[int, ...] = ()
        self._extra_outputs = 0
        self._freeze()

    def _freeze(self) -> None:
        """Turn off the gradients of everything that runs before the first trained layer.

        Which parameters those are is found by a backward pass that stops at that layer's input.
        """

        def detach(module: nn.Module, args: Any, output: Any) -> Any:
            states, *extra = output if isinstance(output, tuple) else (output,)
            self._extra_outputs = len(extra)
            self.state_shape = tuple(states.shape[1:])
            states = states.detach().requires_grad_()
            return (states, *extra) if extra else states

        handle = self.stack.layers[self.num_layers - 1].register_forward_hook(detach)
        try:
            with torch.enable_grad():
                self.tower(pixel_values=self._placeholder(1)).pooler_output.sum().backward()
        finally:
            handle.remove()
        _freeze_without_gradient(self.tower)

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
