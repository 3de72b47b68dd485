"""What follows the towers: standardisation, visual heads and the text adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from .configuration_llm2clip import EVA02VisionConfig, LLM2CLIPConfig

# Initial factor of the trained part of a residual head.
GATE = 0.1


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

    In a new model these are 0 and 1.
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

    Layers, hidden width (`visual_head_expansion` times that of one layer's features, 8 in the paper) and activation
    follow `StarMLP` of its code. Its clamping of `f1 x` and `f2 x` to ±1000 is left out; the LayerNorm before it is
    here `standardize_vision`, and its Xavier initialisation that of `initializer`.
    """

    def __init__(self, width: int, hidden_width: int, output_width: int, bias: bool = True) -> None:
        super().__init__()
        self.f1 = nn.Linear(width, hidden_width, bias=bias)
        self.f2 = nn.Linear(width, hidden_width, bias=bias)
        self.g = nn.Linear(hidden_width, output_width, bias=bias)

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


def build_visual_head(config: LLM2CLIPConfig) -> nn.Module:
    """Build the module between the (standardised) vision features and the shared space.

    Raises:
        ValueError: There is none, and the features have another width than the shared space.
    """
    width, expected = config.vision_width, config.projection_dim
    if config.visual_projection:
        bias = config.visual_projection_bias
        gated_sizes = (width, config.visual_head_expansion * config.layer_width, expected, bias)
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


class LLM2CLIPAdapterBlock(nn.Module):
    """Residual block: `x + W2 GELU(W1 LN(x))`."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, expansion * width)
        self.fc2 = nn.Linear(expansion * width, width)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.fc2(F.gelu(self.fc1(self.norm(states))))


class LLM2CLIPTextAdapter(Float32Buffers):
    """Map an LLM's caption embedding to the space shared with images (paper, section 3.2).

    With `text_head` `linear` there is only `proj`, and with `residual` this adapter is added to a linear map.
    """

    center: Tensor | None

    def __init__(self, config: LLM2CLIPConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.normalize = config.adapter_normalize
        self.register_buffer("center", torch.zeros(width, dtype=torch.float32) if config.center_text else None)
        is_linear = config.text_head == "linear"
        self.blocks = nn.Sequential(
            *(
                LLM2CLIPAdapterBlock(width, config.adapter_expansion)
                for _ in range(0 if is_linear else config.adapter_num_layers)
            )
        )
        self.norm: nn.Module = nn.Identity() if is_linear else nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.projection_dim)
        is_residual = config.text_head == "residual"
        self.linear = nn.Linear(width, config.projection_dim) if is_residual else None
        self.gate = nn.Parameter(torch.full((1,), GATE)) if is_residual else None

    def prepare(self, llm_embeds: Tensor) -> Tensor:
        """Centre and normalise embeddings `(batch, hidden_size)` as the config says; what the layers see."""
        if self.center is None:
            return F.normalize(llm_embeds, dim=-1) if self.normalize else llm_embeds
        # In float32: the difference of two nearby values of 16 bits would be inaccurate.
        states = llm_embeds.float() - self.center
        return F.normalize(states, dim=-1) if self.normalize else states

    def forward(self, llm_embeds: Tensor) -> Tensor:
        dtype = self.proj.weight.dtype
        states = self.prepare(llm_embeds if self.center is not None else llm_embeds.to(dtype)).to(dtype)
        output = self.proj(self.norm(self.blocks(states)))
        return output if self.linear is None else self.linear(states) + self.gate * output


def init_like_the_original(linear: nn.Linear, tower: PretrainedConfig | None) -> None:
    """Initialise a projection or a layer of the adapter as the original code does.

    EVA's head starts near zero (`eva_vit_model.py`: 0.02 times `init_scale` 0.001), OpenAI's projection at
    `width**-0.5` (`transformer.py`); the adapter, and the projection after a tower of timm, as torch's Linear.

    Args:
        tower: Config of the vision tower before the projection; None for the adapter.
    """
    # Only torch.nn.init, for the reason given in EVA02VisionModel.
    bound = 0.0
    if tower is not None and tower.model_type == EVA02VisionConfig.model_type:
        nn.init.trunc_normal_(linear.weight, std=0.02 * 0.001)
    elif tower is not None and tower.model_type == "clip_vision_model":
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    else:
        nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        bound = linear.in_features**-0.5
    if linear.bias is not None:
        nn.init.uniform_(linear.bias, -bound, bound)
