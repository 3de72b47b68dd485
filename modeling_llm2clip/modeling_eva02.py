"""The EVA02 vision tower (arXiv 2303.11331): a ViT with 2-D rotary positions, SwiGLU and sub-LayerNorm.

The config's flags select the other EVA-CLIP towers (arXiv 2303.15389): EVA01 and EVA02-CLIP-bigE.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compatibility_llm2clip import AttentionBackends, attention_function
from .configuration_llm2clip import EVA02VisionConfig

ROPE_BASE = 10000.0


def rotary_table(
    head_dim: int, grid: tuple[int, int], pretrained_grid: int, device: torch.device | None = None
) -> Tensor:
    """Compute cosines and sines of the 2-D rotary positions: first the class token (not rotated), then the patches.

    The first half of a head encodes the row, the second half the column. Positions are scaled to the
    pretraining grid, so that another image size covers the same range of angles.

    Args:
        grid: Number of patch rows and columns.
        pretrained_grid: Side length of the pretraining grid in patches.

    Returns:
        float32 `(1 + rows * columns, head_dim / 2, 2)`: a cosine and a sine for each pair of adjacent channels.
    """
    axis_dim = head_dim // 2
    exponents = torch.arange(0, axis_dim, 2, dtype=torch.float32, device=device) / axis_dim
    frequencies = 1.0 / ROPE_BASE**exponents
    rows, columns = (
        torch.outer(torch.arange(size, dtype=torch.float32, device=device) / size * pretrained_grid, frequencies)
        for size in grid
    )
    angles = torch.cat([rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)], dim=-1)
    angles = F.pad(angles.flatten(0, 1), (0, 0, 1, 0))
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rotary(states: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs of adjacent channels by the angles of their token.

    Args:
        states: `(batch, tokens, heads, head_dim)`.
        table: `(tokens, head_dim / 2, 2)`, or one table per sample, `(batch, tokens, head_dim / 2, 2)`.
    """
    # In float32 at least, also if FSDP has rounded the table: there are no complex numbers of bfloat16.
    table = table.to(torch.promote_types(states.dtype, torch.float32)).unsqueeze(-3)
    pairs = states.to(table.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # Compilers and exporters fuse these operations; most do not support complex numbers.
        (first, second), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        # A complex product computes the same in a single pass.
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return rotated.flatten(-2).to(states.dtype)


def resize_position_embedding(position_embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize the position embedding `(1, 1 + patches, width)` of a square grid to another grid.

    Bicubic without corner alignment, as in EVA-CLIP; the class token keeps its position.
    """
    class_position, patch_positions = position_embedding[:, :1], position_embedding[:, 1:]
    side = round(patch_positions.shape[1] ** 0.5)
    if (side, side) == grid:
        return position_embedding
    square = patch_positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square.float(), size=grid, mode="bicubic", align_corners=False)
    resized = resized.to(position_embedding.dtype).permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([class_position, resized], dim=1)


def _sub_layer_norm(config: EVA02VisionConfig, width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=config.layer_norm_eps) if config.sub_layer_norm else nn.Identity()


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    output = torch.matmul(F.dropout(weights, dropout, training=module.training), value)
    return output.transpose(1, 2), weights


class EVA02Attention(nn.Module):
    def __init__(self, config: EVA02VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.head_dim = width // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        # The biases are part of the Linear layers, so that offloading, LoRA and quantisation apply to them.
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.inner_attn_ln = _sub_layer_norm(config, width)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor | None]:
        batch, tokens, width = hidden_states.shape
        shape = (batch, tokens, -1, self.head_dim)
        query, key = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        value = self.v_proj(hidden_states).view(shape)
        attend = attention_function(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            None,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=False,
        )
        return self.proj(self.inner_attn_ln(output.reshape(batch, tokens, width))), weights


class EVA02SwiGLU(nn.Module):
    """Gated MLP with SiLU; in EVA02 a LayerNorm precedes the output projection."""

    def __init__(self, config: EVA02VisionConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = _sub_layer_norm(config, config.intermediate_size)
        self.w3 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = F.silu(self.w1(hidden_states))
        if torch.is_grad_enabled():
            hidden = hidden * self.w2(hidden_states)
        else:
            hidden.mul_(self.w2(hidden_states))  # in place: allocating memory costs more than the product
        return self.w3(self.ffn_ln(hidden))


class EVA02MLP(nn.Module):
    """MLP with exact GELU, for the EVA-CLIP towers without SwiGLU."""

    def __init__(self, config: EVA02VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = _sub_layer_norm(config, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.ffn_ln(F.gelu(self.fc1(hidden_states))))


class EVA02Block(GradientCheckpointingLayer):
    def __init__(self, config: EVA02VisionConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = EVA02Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EVA02SwiGLU(config) if config.swiglu else EVA02MLP(config)
        self.post_norm = config.post_norm
        self.gamma_1 = self.gamma_2 = None
        if config.layer_scale_init_value is not None:
            self.gamma_1 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init_value))
            self.gamma_2 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init_value))
        self.drop_path_rate = drop_path_rate

    def forward(self, hidden_states: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.post_norm:
            attention, weights = self.attn(hidden_states, rotary)
            hidden_states = hidden_states + self._branch(self.norm1(attention), self.gamma_1)
            mlp = self.norm2(self.mlp(hidden_states))
        else:
            attention, weights = self.attn(self.norm1(hidden_states), rotary)
            hidden_states = hidden_states + self._branch(attention, self.gamma_1)
            mlp = self.mlp(self.norm2(hidden_states))
        return hidden_states + self._branch(mlp, self.gamma_2), weights

    def _branch(self, states: Tensor, gain: Tensor | None) -> Tensor:
        """Apply layer scale and stochastic depth, which drops the branch of random samples and rescales the others."""
        states = states if gain is None else states * gain
        if not self.training or self.drop_path_rate == 0:
            return states
        keep = states.new_empty(states.shape[0], 1, 1).bernoulli_(1 - self.drop_path_rate)
        return states * keep / (1 - self.drop_path_rate)


class EVA02PatchEmbedding(nn.Module):
    def __init__(self, config: EVA02VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class EVA02VisionModel(AttentionBackends, PreTrainedModel):
    """EVA02 vision tower.

    `pooler_output` is the normalised class token; `last_hidden_state` contains the normalised tokens, class token
    first. `hidden_states` contains the embeddings and the output of every block before the final norm: a multimodal
    LLM typically uses `hidden_states[-2][:, 1:]`.
    """

    config_class = EVA02VisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _no_split_modules = ["EVA02Block"]
    # Tokens before the patches. With patch dropout the number of patches does not tell it.
    num_prefix_tokens = 1

    def __init__(self, config: EVA02VisionConfig) -> None:
        super().__init__(config)
        width, layers = config.hidden_size, config.num_hidden_layers
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = EVA02PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, width))
        self.blocks = nn.ModuleList(
            EVA02Block(config, config.drop_path_rate * index / max(layers - 1, 1)) for index in range(layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Only torch.nn.init: transformers 5 keeps it from overwriting loaded weights, which writing to .data would do.
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, EVA02Block):
            for gain in (module.gamma_1, module.gamma_2):
                if gain is not None:
                    nn.init.constant_(gain, self.config.layer_scale_init_value)
        elif isinstance(module, EVA02VisionModel):
            nn.init.trunc_normal_(module.cls_token, std=std)
            nn.init.trunc_normal_(module.pos_embed, std=std)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embed

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            interpolate_pos_encoding: Accept an image size other than the config's by interpolating the positions.
            output_attentions: Also return attention weights; requires eager attention.

        Raises:
            ValueError: The image size differs from the config's without `interpolate_pos_encoding`, or is not a
                multiple of the patch size.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                f"attention weights do not exist under attn_implementation={config._attn_implementation!r}; "
                'call model.set_attn_implementation("eager") first.'
            )
        grid = self._grid(pixel_values, interpolate_pos_encoding)
        hidden_states = self.patch_embed(pixel_values.to(self.patch_embed.proj.weight.dtype))
        # Not len(): exporters would fix the batch size.
        class_tokens = self.cls_token.expand(hidden_states.shape[0], -1, -1)
        hidden_states = torch.cat([class_tokens, hidden_states], dim=1)
        hidden_states = hidden_states + resize_position_embedding(self.pos_embed, grid)
        rotary = None
        if config.rope_grid_size is not None:
            head_dim = config.hidden_size // config.num_attention_heads
            rotary = rotary_table(head_dim, grid, config.rope_grid_size, hidden_states.device)
        if self.training and config.patch_dropout > 0:
            hidden_states, rotary = self._drop_patches(hidden_states, rotary)

        all_hidden_states: tuple[Tensor, ...] = (hidden_states,)
        all_attentions: tuple[Tensor, ...] = ()
        for block in self.blocks:
            hidden_states, weights = block(hidden_states, rotary)
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            if output_attentions:
                all_attentions += (weights,)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            hidden_states=all_hidden_states if output_hidden_states else None,
            attentions=all_attentions if output_attentions else None,
        )

    def _grid(self, pixel_values: Tensor, interpolate: bool) -> tuple[int, int]:
        height, width = pixel_values.shape[-2:]
        size, patch = self.config.image_size, self.config.patch_size
        if (height, width) != (size, size) and not interpolate:
            raise ValueError(
                f"pixel_values are {height} x {width}, but this tower takes {size} x {size}; resize them with the "
                "processor, or pass interpolate_pos_encoding=True."
            )
        if height % patch or width % patch:
            raise ValueError(f"pixel_values are {height} x {width}, which the patch size {patch} does not divide.")
        return height // patch, width // patch

    def _drop_patches(self, hidden_states: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor | None]:
        batch, tokens, width = hidden_states.shape
        kept = max(1, int((tokens - 1) * (1 - self.config.patch_dropout)))
        order = torch.rand(batch, tokens - 1, device=hidden_states.device).argsort(dim=1)[:, :kept]
        order = F.pad(order + 1, (1, 0))  # prepend the class token
        hidden_states = hidden_states.gather(1, order[..., None].expand(-1, -1, width))
        return hidden_states, None if rotary is None else rotary[order]
