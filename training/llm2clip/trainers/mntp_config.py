"""Settings of masked next token prediction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llm2clip.trainers.text_tower_config import TextTowerConfig


@dataclass
class MNTPConfig(TextTowerConfig):
    """Settings of masked next token prediction.

    Besides those of [`TextTowerConfig`], these defaults differ from `TrainingArguments` (the original recipe):
    `num_train_epochs=1`, `per_device_train_batch_size=32`.
    """

    sources: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={"help": "Training texts: a list of CaptionSource mappings. All caption columns are used."},
    )
    block_size: int = field(
        default=512, metadata={"help": "Tokens per sample: the texts are concatenated and cut into blocks."}
    )
    mlm_probability: float = field(default=0.2, metadata={"help": "Probability that a token is masked."})
    mask_token: str = field(
        default="_", metadata={"help": "Token that replaces a masked one; it must be in the LLM's vocabulary."}
    )
    mask_replace_prob: float = field(
        default=0.8, metadata={"help": "Share of the masked tokens that become the mask token; 1: all of them."}
    )
    random_replace_prob: float = field(
        default=0.1, metadata={"help": "Share of the masked tokens that become a random token; the rest stays."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Blocks per device and step."})
