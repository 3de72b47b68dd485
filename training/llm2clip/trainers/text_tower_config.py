"""Settings of the stages that train an LLM with LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from llm2clip.trainers.base_config import StageConfig

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class TextTowerConfig(StageConfig):
    """Settings of the stages that train an LLM with LoRA.

    Besides those of [`StageConfig`], this default differs from `TrainingArguments`:
    `ddp_find_unused_parameters=False`.
    """

    model_name_or_path: str = field(
        default="", metadata={"help": "LLM to train: Hub id or folder of a plain LLM or of a text tower."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the LLM's Hub repo; unset: main."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={"help": "dtype of the loaded LLM (auto: that of its files). bfloat16 halves its memory."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention implementation: eager, sdpa or flash_attention_2; unset: transformers' choice."},
    )
    prompt_prefix: str | None = field(
        default=None,
        metadata={"help": "Text before every caption, after BOS. It is context: its tokens are not pooled."},
    )
    prompt_suffix: str | None = field(
        default=None, metadata={"help": "Text after every caption; its tokens are pooled."}
    )
    pooling: Literal["mean", "weighted_mean", "last_token", "eos_token", "bos_token"] | None = field(
        default=None, metadata={"help": "How token states become one embedding; unset: mean."}
    )
    max_text_length: int | None = field(
        default=None, metadata={"help": "Maximum length of a caption with its prompt, in tokens; unset: 512."}
    )
    bidirectional: bool | None = field(
        default=None,
        metadata={"help": "Use bidirectional instead of causal attention; unset: true."},
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of LoRA; 0 trains all weights of the LLM instead."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scaling: the update is multiplied by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input of the LoRA layers."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS),
        metadata={"help": "Names of the Linear layers that get LoRA; all-linear for every one of them."},
    )
    eval_sources: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Caption retrieval sets to evaluate: a mapping from a name to PairSource fields."},
    )
    save_format: Literal["merged", "adapter"] = field(
        default="merged", metadata={"help": "What to save at the end: the merged model, or the PEFT adapter alone."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Keep it false: every trained parameter takes part in every step."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_format == "adapter" and self.lora_rank == 0:
            raise ValueError("save_format adapter needs LoRA, but lora_rank is 0.")
