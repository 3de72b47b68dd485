"""From the output of a vision tower to image embeddings: pooling, standardisation and the head."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Inputs of towers that read images of any shape as padded lists of patches.
MASK_INPUTS = ("pixel_attention_mask", "pixel_mask", "spatial_shapes")
# A standard deviation below this share of the mean (or of 1) is rounding: the feature is constant.
CONSTANT = 1e-6
# Initial factor of the trained part of a residual head.
GATE = 0.1
# Sequences of one token in an attention layer at once: kernels for GPUs take fewer than 2**16.
ATTENTION_ROWS = 2**14


class Float32Buffers(nn.Module):
    """Base of modules whose own buffers stay in float32 when the model is converted to another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != value.dtype:
                device = moved.device
                self._buffers[name] = torch.empty_like(value, device=device) if value.is_meta else value.to(device)
        return self


class LLM2CLIPStandardization(Float32Buffers):
    """Subtract the mean of the features, and divide them by their standard deviation, in float32.

    Until [`LLM2CLIPPreTrainedModel.set_vision_statistics`] sets them, mean and deviation are 0 and 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # The dtype is given, because `from_pretrained` builds models under another default.
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float32))
        self.register_buffer("std", torch.ones(width, dtype=torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean) / self.std


class LLM2CLIPGatedHead(nn.Module):
    """The alignment layer of SAIL (CVPR 2025): `g(ReLU6(f1 x) * f2 x)`.

    Layers, hidden width (`visual_head_expansion` times the input's, 8 in the paper) and activation follow `StarMLP` of
    its code. Its clamping of `f1 x` and `f2 x` to ±1000 is left out; the LayerNorm before it is here
    `standardize_vision`, and its Xavier initialisation that of `initializer`.
    """

    def __init__(self, width: int, expansion: int, output_width: int, bias: bool = True) -> None:
        super().__init__()
        self.f1 = nn.Linear(width, expansion * width, bias=bias)
        self.f2 = nn.Linear(width, expansion * width, bias=bias)
        self.g = nn.Linear(expansion * width, output_width, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.g(F.relu6(self.f1(features)) * self.f2(features))


class LLM2CLIPResidualHead(nn.Module):
    """A linear map, which a closed form can give, plus what is trained on top of it: `linear(x) + gate * part(x)`.

    The gate is a learned number that starts at `GATE`.
    """

    def __init__(self, linear: nn.Linear, part: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.part = part
        # A vector of one element, because FSDP and DeepSpeed do not divide scalars.
        self.gate = nn.Parameter(torch.full((1,), GATE))

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features) + self.gate * self.part(features)


def build_visual_head(config: Any) -> nn.Module:
    """Build the module between the (standardised) vision features and the shared space.

    Args:
        config: An [`LLM2CLIPConfig`].

    Raises:
        ValueError: There is none, and the features have another width than the shared space.
    """
    width, expected = config.vision_width, config.projection_dim
    if config.visual_projection:
        bias = config.visual_projection_bias
        gated_sizes = (width, config.visual_head_expansion, expected, bias)
        # First: a linear head beside it would draw random numbers, and so change all weights that are drawn later.
        if config.visual_head == "gated":
            return LLM2CLIPGatedHead(*gated_sizes)
        linear = nn.Linear(width, expected, bias=bias)
        if config.visual_head == "linear":
            return linear
        return LLM2CLIPResidualHead(linear, LLM2CLIPGatedHead(*gated_sizes))
    if width != expected:
        raise ValueError(f"without a visual projection the tower's width {width} has to be projection_dim {expected}.")
    return nn.Identity()


def refuse_masked_tower(tower: nn.Module, pooling: str) -> None:
    """Raise ValueError if a pooling needs the patches of a tower that pads them."""
    masks = [name for name in inspect.signature(tower.forward).parameters if name in MASK_INPUTS]
    if pooling != "cls" and masks:
        raise ValueError(
            f"vision_pooling {pooling!r} needs the patches of an image, but {type(tower).__name__} pads them "
            f"({masks[0]}); use vision_pooling 'cls'."
        )


def pool_vision(tower: nn.Module, output: Any, pixel_values: Tensor, pooling: str) -> Tensor:
    """Pool the output of a vision tower.

    Args:
        tower: The tower, whose output this is.
        pixel_values: `(batch, channels, height, width)`.
        pooling: One of `VISION_POOLINGS`.

    Returns:
        `(batch, vision_width)`; a mean is in float32, which is more accurate than 16 bits.

    Raises:
        ValueError: The tower has no pooled output of its own, or its patches cannot be told from other tokens.
    """
    own = output.get("pooler_output")
    if pooling != "mean":
        if own is None:
            raise ValueError(f"{type(tower).__name__} has no pooled output; use vision_pooling 'mean'.")
        own = own.flatten(1)
    if pooling == "cls":
        return own
    mean = patch_tokens(tower, output, pixel_values).float().mean(dim=1)
    return mean if pooling == "mean" else torch.cat([own.float(), mean], dim=-1)


def patch_tokens(tower: nn.Module, output: Any, pixel_values: Tensor) -> Tensor:
    """Select the patches of a tower's last hidden state, normalised as the tower normalises its pooled token.

    Class and register tokens, which come first, are as many as there are tokens without a patch. A hierarchical tower
    has none and fewer tokens than patches. The feature map of a convolutional tower has a token per position. A tower
    that reads a list of patches (NaFlex) has no other tokens; `pixel_values` is then `(batch, patches, values)`.

    Returns:
        `(batch, patches, hidden_size)`.

    Raises:
        ValueError: The tower has no fixed patch size.
    """
    states = output.last_hidden_state
    if states.ndim == 4:
        return states.flatten(2).transpose(1, 2)
    first = 0 if pixel_values.ndim == 3 else getattr(tower, "num_prefix_tokens", None)
    if first is None:
        size = getattr(tower.config, "patch_size", None)
        sides = (size, size) if isinstance(size, int) else size
        if not isinstance(sides, (tuple, list)) or len(sides) != 2:
            raise ValueError(f"{type(tower).__name__} has no fixed patch size, so its patches cannot be pooled.")
        height, width = pixel_values.shape[-2:]
        first = max(states.shape[1] - (height // sides[0]) * (width // sides[1]), 0)
    # Towers of the CLIP family have a norm before their layers, and another that they apply to the class token alone.
    inner: Any = getattr(tower, "vision_model", tower)
    is_clip = hasattr(inner, "pre_layrnorm") or hasattr(inner, "pre_layernorm")
    if is_clip and hasattr(inner, "post_layernorm") and output.get("pooler_output") is not None:
        states = inner.post_layernorm(states)
    return states[:, first:]


def pool_alone(tower: nn.Module, patches: Tensor) -> Tensor:
    """Map every patch of [`patch_tokens`] to the space of the tower's pooled token.

    A tower that pools by attention (SigLIP) pools each patch alone. In other towers the spaces are the same.

    Returns:
        `(batch, patches, hidden_size)`.
    """
    head: Any = getattr(getattr(tower, "vision_model", tower), "head", None)
    if not hasattr(head, "probe"):
        return patches
    pooled = [head(part[:, None]) for part in patches.flatten(0, 1).split(ATTENTION_ROWS)]
    return torch.cat(pooled).unflatten(0, patches.shape[:2])


def checked_statistics(name: str, values: Any, width: int) -> Tensor:
    """Return a vector of statistics in float32.

    Raises:
        ValueError: It has another shape than `(width,)`, or a value is not finite.
    """
    vector = torch.as_tensor(values).detach().float()
    if tuple(vector.shape) != (width,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; this model takes ({width},).")
    if not vector.isfinite().all():
        raise ValueError(f"{name} has {int((~vector.isfinite()).sum())} values that are not finite.")
    return vector


def positive_deviation(mean: Tensor, std: Tensor) -> Tensor:
    """Replace the standard deviation of constant features, which is zero up to rounding, by 1.

    Raises:
        ValueError: A standard deviation is negative.
    """
    if (std < 0).any():
        raise ValueError(f"std has {int((std < 0).sum())} negative values.")
    return torch.where(std <= CONSTANT * mean.abs().clamp(min=1), torch.ones_like(std), std)
