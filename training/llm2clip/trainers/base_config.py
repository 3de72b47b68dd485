"""Settings that all stages share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from llm2clip.utils.settings import check_choices

TOWER_CHUNK_HELP = (
    "Rows per forward pass of the towers (GradCache). Set it when a batch's activations do not fit into memory: the "
    "gradients stay the same, and the towers compute their forward pass twice. Unset: the whole batch at once."
)
LOSS_CHUNK_HELP = (
    "Rows of the similarity matrix that the loss computes at once. Lower it if the loss of a large global batch runs "
    "out of memory; the result stays the same."
)


@dataclass
class StageConfig(TrainingArguments):
    """Settings of every stage.

    These defaults differ from `TrainingArguments`: `remove_unused_columns=False`, `dataloader_drop_last=True`,
    `label_names=[]`, `logging_steps=10`.
    """

    output_dir: str = field(default="", metadata={"help": "Folder of the checkpoints and of the trained model."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep it false: the collators read columns that the model does not."}
    )
    dataloader_drop_last: bool = field(
        default=True,
        metadata={"help": "Drop the last batch if it is incomplete: its loss would have fewer negatives."},
    )
    label_names: list[str] | None = field(
        default_factory=list, metadata={"help": "Keep it empty: the losses need no labels."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Optimizer steps between two log entries; below 1, a share of all steps."}
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in backward instead of storing them: less memory, about 20% slower."},
    )

    def __post_init__(self) -> None:
        check_choices(self)
        # transformers 5.2 has only gradient_checkpointing, which later versions rename and warn about.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        self.gradient_checkpointing = self.activation_checkpointing
        # The Trainer refuses bf16 without an accelerator unless use_cpu is set.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        # Otherwise accelerate cuts the batches of an iterable data set itself, which only works on tensors.
        accelerator_config: Any = self.accelerator_config
        if accelerator_config.dispatch_batches is None:
            accelerator_config.dispatch_batches = False

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer pickles its arguments into the folder that it pushes.
        return {**self.__dict__, "hub_token": None}

    @property
    def sampling_seed(self) -> int:
        """Seed of every random choice about the data: order, captions, crops."""
        return self.seed if self.data_seed is None else self.data_seed


def check_chunk_sizes(tower_chunk_size: int | None, loss_chunk_size: int) -> None:
    """Raise a `ValueError` if a chunk size is below 1."""
    for name, size in (("tower_chunk_size", tower_chunk_size), ("loss_chunk_size", loss_chunk_size)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, but is {size}.")
