"""Settings of masked next token prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm2clip.trainers.text_tower_config import TextTowerConfig
from llm2clip.utils.settings import setting


@dataclass
class MNTPConfig(TextTowerConfig):
    """Settings of masked next token prediction.

    Besides those of [`TextTowerConfig`], these defaults differ from `TrainingArguments` (the original recipe):
    `num_train_epochs=1`, `per_device_train_batch_size=32`.
    """

    sources: list[dict[str, Any]] = setting(
        [], "Training texts: a list of CaptionSource mappings. All caption columns are used."
    )
    block_size: int = setting(512, "Tokens per sample: the texts are concatenated and cut into blocks.")
    mlm_probability: float = setting(0.2, "Probability that a token is masked.")
    mask_token: str = setting("_", "Token that replaces a masked one; it must be in the LLM's vocabulary.")
    mask_replace_prob: float = setting(0.8, "Share of the masked tokens that become the mask token; 1: all of them.")
    random_replace_prob: float = setting(0.1, "Share of the masked tokens that become a random token; the rest stays.")
    num_train_epochs: float = setting(1.0, "Passes over the training data.")
    per_device_train_batch_size: int = setting(32, "Blocks per device and step.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2:
            raise ValueError(
                f"block_size must be at least 2, since a token is predicted from others, not {self.block_size}."
            )
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"mlm_probability must be above 0 and at most 1, but is {self.mlm_probability}.")
