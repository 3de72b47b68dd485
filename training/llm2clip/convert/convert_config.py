"""The settings of `llm2clip convert`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm2clip.command_line.settings import setting


@dataclass
class ConvertConfig:
    """Settings of `llm2clip convert`."""

    source: str = setting("", "Checkpoint to convert: file, folder or Hub id.")
    destination: str = setting("", "Folder to write; a .pt file with --to original.")
    to: Literal["transformers", "original"] = setting(
        "transformers", "Format to write: transformers, or original for a .pt file of the original code."
    )
    model_config: str | None = setting(
        None, "model_configs JSON of the original code; needed if no published model has these sizes."
    )
    text_model: str | None = setting(
        None, "LLM of the adapter: Hub id or folder. Default: that of the published model."
    )
    text_model_revision: str | None = setting(None, "Branch, tag or commit of that LLM on the Hub.")
    adapters: list[str] = setting([], "PEFT adapters to merge into an LLM, in this order: Hub ids or folders.")
    prompt_name: str | None = setting(
        None, "Name of the LLM that selects its prompt as in the original code. Default: from its config."
    )
    image_size: int | None = setting(None, "Resize the position embeddings to this image size in pixels.")
    projection_dim: int = setting(1280, "Width of the new projection of a plain CLIP tower.")
    quick_gelu: bool | None = setting(
        None, "Use QuickGELU in an OpenAI tower. Default: from --model-config, otherwise true."
    )
    reset_heads: bool = setting(
        False, "Replace trained projection and adapter with new ones, like --pretrained of the original."
    )
    initializer: Literal["original", "normal"] = setting(
        "original", "Initial values of new weights: as the original code, or normal for N(0, 0.02²)."
    )
    seed: int = setting(42, "Random seed of new weights.")
    overwrite: bool = setting(
        False, "Replace a destination that an earlier conversion wrote and that holds nothing else."
    )
