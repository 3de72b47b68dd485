"""Settings of stage 1, caption contrastive fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llm2clip.losses import DEFAULT_TILE_SIZE
from llm2clip.trainers.base_config import LOSS_CHUNK_HELP, TOWER_CHUNK_HELP, check_chunk_sizes
from llm2clip.trainers.text_tower_config import TextTowerConfig


@dataclass
class Stage1Config(TextTowerConfig):
    """Settings of stage 1.

    Besides those of [`TextTowerConfig`], these defaults differ from `TrainingArguments` (paper, appendix A, and the
    original recipe): `learning_rate=2e-4`, `warmup_steps=300`, `num_train_epochs=1`,
    `per_device_train_batch_size=64`.
    """

    sources: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={"help": "Training data: a list of PairSource mappings. Each batch comes from one of them."},
    )
    scale: float = field(
        default=50.0, metadata={"help": "Factor on the cosine similarities, the inverse of the temperature."}
    )
    symmetric_loss: bool = field(
        default=False,
        metadata={"help": "Add the loss of retrieving anchors from positives; the paper uses one direction."},
    )
    tower_chunk_size: int | None = field(default=None, metadata={"help": TOWER_CHUNK_HELP})
    loss_chunk_size: int = field(default=DEFAULT_TILE_SIZE, metadata={"help": LOSS_CHUNK_HELP})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(
        default=300, metadata={"help": "Optimizer steps of linear warm-up; below 1, a share of all steps."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Pairs per device and step. More pairs mean more negatives in the loss."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_chunk_sizes(self.tower_chunk_size, self.loss_chunk_size)
