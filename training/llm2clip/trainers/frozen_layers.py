"""Frozen lower layers of a vision tower, whose outputs can be stored and trained on.

A training step then costs the upper layers only. The images have no augmentation, since one view of each is stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# The pooled output of these towers does not depend on their mask token, for whose gradient DDP would wait. For other
# towers it has to look for such parameters in every step, which is the Trainer's default.
WITH_UNUSED_MASK_TOKEN = ("dinov2", "dinov2_with_registers", "dinov3_vit")


def freeze_unused(tower: nn.Module) -> None:
    """Freeze the parameters of a vision tower that its pooled output does not depend on."""
    if getattr(getattr(tower, "config", None), "model_type", "") in WITH_UNUSED_MASK_TOKEN:
        tower.get_parameter("embeddings.mask_token").requires_grad_(False)


def _find_layers(tower: nn.Module) -> tuple[nn.Module, str]:
    """Find the longest `ModuleList` in a tower; returns its parent and its name there."""
    stacks = [
        (parent, name)
        for parent in tower.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList)
    ]
    if not stacks:
        raise ValueError(
            f"{type(tower).__name__} has no ModuleList of layers, which freeze_vision_layers needs; set it to 0."
        )
    return max(stacks, key=lambda stack: len(getattr(*stack)))


class _StoredStates(nn.Module):
    """Stands in for the frozen layers and returns their stored outputs."""

    def __init__(self, extra_outputs: int) -> None:
        super().__init__()
        self.states: Tensor | None = None
        self.extra_outputs = extra_outputs

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.states is not None
        states = self.states.to(hidden_states.dtype)
        return (states, *[None] * self.extra_outputs) if self.extra_outputs else states


class FrozenLayers:
    """The lower part of a vision tower, frozen: some of its transformer layers and everything before them.

    Args:
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
        self._parent_and_name = _find_layers(tower)
        count = len(self.layers)
        self.num_layers = num_layers if num_layers >= 0 else count + num_layers
        if not 0 < self.num_layers <= count:
            raise ValueError(f"freeze_vision_layers is {num_layers}, but the tower has {count} layers.")
        self._extra_outputs = 0
        # One for all steps, since a compiled tower is compiled again for other modules.
        self._stored: tuple[_StoredStates, nn.ModuleList] | None = None
        self.state_shape = tuple(self.compute(self._placeholder(1)).shape[1:])
        # Towers register the embeddings before their layers.
        layers = set(self.layers.parameters())
        below = itertools.takewhile(lambda parameter: parameter not in layers, tower.parameters())
        for parameter in itertools.chain(below, self.layers[: self.num_layers].parameters()):
            parameter.requires_grad_(False)

    @property
    def layers(self) -> nn.ModuleList:
        """All transformer layers of the tower."""
        return getattr(*self._parent_and_name)

    @contextlib.contextmanager
    def _replaced(self, layers: nn.ModuleList) -> Iterator[None]:
        replaced = self.layers
        setattr(*self._parent_and_name, layers)
        try:
            yield
        finally:
            setattr(*self._parent_and_name, replaced)

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

        layers = self.layers[: self.num_layers]
        handle = layers[-1].register_forward_hook(capture)
        try:
            with self._replaced(layers):
                self.tower(pixel_values=pixel_values)
        finally:
            handle.remove()
        return captured[0]

    @contextlib.contextmanager
    def replaced_by(self, states: Tensor) -> Iterator[Tensor]:
        """Within this context, the tower starts from stored states `(batch, tokens, hidden_size)`, whatever its
        pixel values are; yields some of the right shape.
        """
        if self._stored is None:
            stand_in = _StoredStates(self._extra_outputs)
            self._stored = stand_in, nn.ModuleList([stand_in, *self.layers[self.num_layers :]])
        self._stored[0].states = states
        with self._replaced(self._stored[1]):
            yield self._placeholder(len(states))

    def fingerprint(self) -> str:
        """Compute a hash of the frozen weights."""
        digest = hashlib.sha256(f"{type(self.tower).__name__} {self.num_layers}".encode())
        for name, parameter in self.tower.named_parameters():
            if not parameter.requires_grad:
                digest.update(name.encode())
                digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]
