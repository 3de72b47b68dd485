"""Settings of the stages that train an LLM with LoRA, and those of their commands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from llm2clip.command_line.settings import refuse, setting
from llm2clip.trainers.base_config import StageConfig

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class TextTowerRecipe:
    """What the command of such a stage opens: the LLM, which becomes a text tower, and the retrieval sets."""

    model_name_or_path: str = setting(
        "",
        "Text model to train: Hub id or folder of a plain LLM, encoder or embedding model, or of a text tower.",
        affects_numbers=False,
    )
    model_revision: str | None = setting(
        None, "Branch, tag or commit of the LLM's Hub repo; unset: main.", affects_numbers=False
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = setting(
        "float32", "dtype of the loaded LLM (auto: that of its files). bfloat16 halves its memory."
    )
    attn_implementation: str | None = setting(
        None, "Attention implementation: eager, sdpa or flash_attention_2; unset: transformers' choice."
    )
    prompt_prefix: str | None = setting(
        None,
        "Text before every caption, after BOS. It is context: its tokens are not pooled. Unset: that of "
        "the original code for the LLM's name, or the default prompt of an embedding model, if any.",
    )
    prompt_suffix: str | None = setting(
        None, "Text after every caption; its tokens are pooled. Unset: as prompt_prefix."
    )
    pooling: Literal["mean", "weighted_mean", "last_token", "eos_token", "bos_token"] | None = setting(
        None, "How token states become one embedding; unset: mean, or as the embedding model does."
    )
    max_text_length: int | None = setting(None, "Maximum length of a caption with its prompt, in tokens; unset: 512.")
    bidirectional: bool | None = setting(
        None,
        "Use bidirectional instead of causal attention; unset: true for an LLM, its own attention for an encoder or "
        "an embedding model.",
    )
    eval_sources: dict[str, Any] = setting(
        {}, "Caption retrieval sets to evaluate: a mapping from a name to PairSource fields.", affects_numbers=False
    )


@dataclass
class LoraSettings:
    """Settings of LoRA layers on an LLM, beside their rank."""

    lora_alpha: int = setting(32, "LoRA scaling: the update is multiplied by alpha / rank.")
    lora_dropout: float = setting(0.0, "Dropout probability on the input of the LoRA layers.")
    lora_target_modules: list[str] = setting(
        LORA_TARGETS, "Names of the Linear layers that get LoRA; all-linear for every one of them."
    )


LORA_SETTINGS = tuple(field.name for field in fields(LoraSettings))


def require_lora(config: Any, names: Iterable[str]) -> None:
    """Raise ValueError if one of these settings of LoRA is given without it, or the rank is negative."""
    if config.lora_rank < 0:
        raise ValueError(f"lora_rank must be at least 0, but is {config.lora_rank}.")
    if config.lora_rank == 0:
        refuse(config, names, "it needs lora_rank above 0")


@dataclass
class TextTowerConfig(LoraSettings, StageConfig):
    """Settings of the Trainers that train a text tower with LoRA.

    Besides those of [`StageConfig`], this default differs from `TrainingArguments`:
    `ddp_find_unused_parameters=False`.
    """

    lora_rank: int = setting(16, "Rank of LoRA; 0 trains all weights of the LLM instead.")
    save_format: Literal["merged", "adapter"] = setting(
        "merged", "What to save of the LLM at the end: the merged weights, or the PEFT adapter alone."
    )
    ddp_find_unused_parameters: bool | None = setting(False, "Keep it false: every step uses every trained parameter.")

    def __post_init__(self) -> None:
        super().__post_init__()
        # A rank of 0, which is not the default, says that the others of a recipe do not count.
        require_lora(self, ["save_format"])
        refuse(self, ["label_smoothing_factor"], "the losses of this stage have none")
