"""Settings of stage 1, caption contrastive fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm2clip.trainers.base_config import ContrastiveConfig
from llm2clip.trainers.text_tower_config import TextTowerConfig
from llm2clip.utils.settings import setting


@dataclass
class Stage1Config(ContrastiveConfig, TextTowerConfig):
    """Settings of stage 1.

    Besides those of [`TextTowerConfig`], these defaults differ from `TrainingArguments` (paper, appendix A, and the
    original recipe): `learning_rate=2e-4`, `warmup_steps=300`, `num_train_epochs=1`,
    `per_device_train_batch_size=64`.
    """

    sources: list[dict[str, Any]] = setting(
        [], "Training data: a list of PairSource mappings. Each batch comes from one of them."
    )
    scale: float = setting(50.0, "Factor on the cosine similarities, the inverse of the temperature.")
    symmetric_loss: bool = setting(False, "Add the loss of retrieving anchors from positives; the paper does not.")
    learning_rate: float = setting(2e-4, "Peak learning rate.")
    warmup_steps: float = setting(300, "Optimizer steps of linear warm-up; below 1, a share of all steps.")
    num_train_epochs: float = setting(1.0, "Passes over the training data.")
    per_device_train_batch_size: int = setting(64, "Pairs per device and step; more pairs mean more negatives.")
