"""The text adapter, which maps an LLM's caption embedding to the space shared with images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_llm2clip import LLM2CLIPConfig


class LLM2CLIPAdapterBlock(nn.Module):
    """Residual block: `x + W2 GELU(W1 LN(x))`."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, expansion * width)
        self.fc2 = nn.Linear(expansion * width, width)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.fc2(F.gelu(self.fc1(self.norm(states))))


class LLM2CLIPTextAdapter(nn.Module):
    """Residual blocks, a LayerNorm and a Linear layer (paper, section 3.2)."""

    def __init__(self, config: LLM2CLIPConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.normalize = config.adapter_normalize
        self.blocks = nn.ModuleList(
            LLM2CLIPAdapterBlock(width, config.adapter_expansion) for _ in range(config.adapter_num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.projection_dim)

    def forward(self, llm_embeds: Tensor) -> Tensor:
        states = F.normalize(llm_embeds, dim=-1) if self.normalize else llm_embeds
        for block in self.blocks:
            states = block(states)
        return self.proj(self.norm(states))


__all__ = ["LLM2CLIPTextAdapter"]
