"""Settings that all stages share."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from fnmatch import fnmatch
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from llm2clip.command_line.settings import check_choices, refuse, setting
from llm2clip.trainers.optimizer import check_warmup

logger = logging.getLogger(__name__)

# Settings of transformers' Trainer that no stage follows, and why.
SETTINGS_NOT_FOLLOWED = {
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint without it",
    "remove_unused_columns": "the collators read columns that the model does not",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "evaluation computes as training, see bf16"),
    **dict.fromkeys(("batch_eval_metrics", "eval_do_concat_batches"), "recalls are over all rows"),
    **dict.fromkeys(("deepspeed", "parallelism_config"), "models are sharded by FSDP2 here"),
    "label_names": "the losses need no labels",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "use_liger_kernel": "it has no kernels for these models",
    "do_predict": "there is nothing to predict; llm2clip evaluate measures a model",
}
# Fields of `TrainingArguments` on which no trained number depends, as patterns of `fnmatch`; settings of this package
# say it themselves (`affects_numbers`).
WITHOUT_EFFECT_ON_NUMBERS = (
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "push_to_hub", "hub_*", "trackio_*"),
    *("log_*", "logging_*", "save_*", "eval_*", "do_*", "include_*", "per_device_eval_batch_size"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("dataloader_persistent_workers", "prediction_loss_only", "batch_eval_metrics", "resume_from_checkpoint"),
    *("restore_callback_states_from_checkpoint", "gradient_checkpointing*", "activation_checkpointing*"),
    *("ddp_timeout", "skip_memory_metrics", "local_rank", "debug", "torch_empty_cache_steps", "jit_mode_eval"),
)
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
# Schedules that follow a metric of the evaluations.
METRIC_SCHEDULES = WITHOUT_WARMUP[1:]
# The mean of all recalls of the retrieval sets.
MEAN_RECALL = "mean_recall"


def affects_numbers(entry: Field[Any]) -> bool:
    """Tell whether what a run computes depends on a setting, given as the field of its dataclass."""
    own = entry.metadata.get("affects_numbers", True)
    return own and not any(fnmatch(entry.name, pattern) for pattern in WITHOUT_EFFECT_ON_NUMBERS)


@dataclass
class ContrastiveConfig:
    """What the contrastive stages have to save memory, beside [`StageConfig`]."""

    tower_chunk_size: int | None = setting(
        None,
        "Rows per forward pass of the towers (GradCache). Set it when a batch's activations do not fit into memory: "
        "the gradients stay the same, and the towers compute their forward pass twice. Unset: the whole batch at "
        "once.",
    )


def require_prefixes(dims: Sequence[int], width: int) -> None:
    """Raise ValueError unless each of `matryoshka_dims` is fewer values than embeddings have."""
    if wrong := [dim for dim in dims if not 0 < dim < width]:
        raise ValueError(f"matryoshka_dims has {wrong[0]}, but a prefix of {width} values has 1 to {width - 1}.")


@dataclass
class StageConfig(TrainingArguments):
    """Settings of every stage.

    These defaults differ from `TrainingArguments`: `remove_unused_columns=False`, `dataloader_drop_last=True`,
    `label_names=[]`, `logging_nan_inf_filter=False`, `logging_steps=10`; where a metric is needed,
    `metric_for_best_model="mean_recall"`, the mean of all recalls of the retrieval sets, or the loss if there are
    none.
    """

    output_dir: str = setting("", "Folder of the checkpoints and of the trained model.")
    remove_unused_columns: bool = setting(False, "Keep it false: the collators read columns that the model does not.")
    dataloader_drop_last: bool = setting(True, "Drop an incomplete last batch: its loss would have fewer negatives.")
    label_names: list[str] | None = setting([], "Keep it empty: the losses need no labels.")
    logging_nan_inf_filter: bool = setting(
        False, "Keep it false: a loss that is not finite ends the run, and the filter would wait for the GPU."
    )
    logging_steps: float = setting(10, "Optimizer steps between two log entries; below 1, a share of all steps.")
    resume_anyway: bool = setting(
        False,
        "With --resume: continue although settings have changed that change the trained numbers.",
        affects_numbers=False,
    )
    activation_checkpointing: bool | None = setting(
        None, "Recompute activations in backward instead of storing them: less memory, about 20% slower."
    )

    def __post_init__(self) -> None:
        check_choices(self)
        self._validate_numbers()
        for name, why in SETTINGS_NOT_FOLLOWED.items():
            refuse(self, [name], why)
        # transformers 5.6 fills it with values that are 0 or false, which a copy of the settings has.
        if not self.fsdp and (isinstance(self.fsdp_config, str) or any((self.fsdp_config or {}).values())):
            refuse(self, ["fsdp_config"], "fsdp is unset")
        if self.eval_strategy != "steps":
            refuse(self, ["eval_steps"], "it is for eval_strategy: steps")
        if self.lr_scheduler_type in WITHOUT_WARMUP and self.warmup_steps:
            refuse(self, ["warmup_steps"], "this lr_scheduler_type has no warm-up (constant_with_warmup has)")
        # transformers 5.6 has only gradient_checkpointing, which later versions rename and warn about.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        self.gradient_checkpointing = self.activation_checkpointing
        chooses = (
            self.load_best_model_at_end or self.save_strategy == "best" or self.lr_scheduler_type in METRIC_SCHEDULES
        )
        if chooses and self.metric_for_best_model is None:
            self.metric_for_best_model = MEAN_RECALL  # transformers would take the loss, which retrieval sets lack
        # The Trainer refuses bf16 without an accelerator unless use_cpu is set.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self._read_accelerator_config()
        super().__post_init__()
        if (count := self.n_gpu) > 1:
            logger.warning(
                "training on 1 of %d GPUs; start `torchrun --nproc_per_node %d -m llm2clip ...` (or your script) to "
                "use all of them.",
                count,
                count,
            )
            # Otherwise the Trainer uses nn.DataParallel, with which parts of a batch would be compared.
            self._n_gpu = 1
        # Otherwise accelerate cuts the batches of an iterable data set itself, which only works on tensors.
        accelerator_config: Any = self.accelerator_config
        if accelerator_config.dispatch_batches is None:
            accelerator_config.dispatch_batches = False
        # From pinned memory, the copy of a batch to a GPU need not wait for it.
        accelerator_config.non_blocking = accelerator_config.non_blocking or self.dataloader_pin_memory

    def _validate_numbers(self) -> None:
        """Refuse numbers with which a run would end long after its start, or train something else without a word."""
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            unlimited = name == "max_grad_norm" and value == math.inf
            if isinstance(value, float) and not math.isfinite(value) and not unlimited:
                raise ValueError(f"{name} is {value}, but it has to be a finite number.")
        for name in ("tower_chunk_size", "gradient_accumulation_steps"):
            if (size := getattr(self, name, None)) is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, but is {size}.")
        if self.max_steps == 0:
            raise ValueError("max_steps is 0; set it to a number of steps, or to -1 for num_train_epochs.")

    def _read_accelerator_config(self) -> None:
        """Read the one setting whose errors in `TrainingArguments` do not name it."""
        given: Any = self.accelerator_config
        try:
            if isinstance(given, dict):
                self.accelerator_config = AcceleratorConfig(**given)  # type: ignore[assignment]
            elif isinstance(given, str):
                self.accelerator_config = AcceleratorConfig.from_json_file(given)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"accelerator_config is {given!r:.80}, which cannot be used: {error}.") from error

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the steps of the warm-up; a share of the steps, unlike a number of them, leaves at least one."""
        steps = super().get_warmup_steps(num_training_steps)
        return steps if self.warmup_steps >= 1 else min(steps, max(num_training_steps - 1, 0))

    def check_length(self, num_rows: int) -> None:
        """Refuse what makes a run impossible with so few rows, to be called before anything is computed of them.

        Raises:
            ValueError: There are fewer rows than a batch has, or the training has no more steps than its warm-up.
        """
        if not self.dataloader_drop_last:
            return
        batch = self.per_device_train_batch_size * self.world_size
        require_batch(num_rows // batch, batch, num_rows)
        steps = self.max_steps
        if steps < 0:
            steps = math.ceil(self.num_train_epochs * math.ceil(num_rows // batch / self.gradient_accumulation_steps))
        check_warmup(self.get_warmup_steps(steps), steps)

    @property
    def sampling_seed(self) -> int:
        """Seed of every random choice about the data: order, captions, crops."""
        return self.seed if self.data_seed is None else self.data_seed


def require_batch(num_batches: int, batch_size: int, num_rows: int | None = None) -> None:
    """Raise a ValueError if there is no batch of `batch_size` rows, which says how many rows there are, if known."""
    if num_batches == 0:
        found = "" if num_rows is None else f" ({num_rows})"
        raise ValueError(
            f"the training data has fewer rows than one batch of {batch_size}{found}; lower "
            "per_device_train_batch_size or add data."
        )


def validate_collator_settings(args: StageConfig, collator: Any, names: Sequence[str]) -> None:
    """Raise a ValueError if a setting has another value than its default, and a collator of the caller's not that one.

    Args:
        names: The settings that the collator of the stage follows.
    """
    others = [name for name in names if getattr(args, name) != getattr(collator, name, None)]
    refuse(args, others, "the given data_collator does not follow it: give it to that")
