"""What the Trainers of all stages share: batches from our own samplers, checkpoints, resuming."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2clip_training.data.sampling import EpochBatchSampler

logger = logging.getLogger(__name__)

# What a checkpoint needs for a run to go on exactly; the Trainer writes the state last.
CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", "trainer_state.json")


@dataclass
class StageConfig(TrainingArguments):
    """Settings of every stage.

    These defaults differ from `TrainingArguments`: `remove_unused_columns=False`, `dataloader_drop_last=True`,
    `label_names=[]`, `logging_steps=10`.
    """

    output_dir: str = field(default="", metadata={"help": "Folder of the checkpoints and of the result."})
    remove_unused_columns: bool = False
    dataloader_drop_last: bool = True
    label_names: list[str] | None = field(default_factory=list)
    logging_steps: float = 10

    @property
    def sampling_seed(self) -> int:
        """Seed of everything that is drawn from the data."""
        return self.seed if self.data_seed is None else self.data_seed


class StageTrainer(Trainer):
    """A Trainer whose batches come from `batch_sampler()` and whose evaluation is retrieval.

    Several processes see the global batches of one process with a larger batch, and a resumed run those of an unbroken
    one.

    Args:
        retrieval: Retrieval sets by name, which `evaluate()` measures.
        kwargs: See `transformers.Trainer`.
    """

    def __init__(self, *, retrieval: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.retrieval = retrieval or {}
        # The Trainer insists on an evaluation set; ours are those of `retrieval`.
        super().__init__(eval_dataset=list(self.retrieval) or None, **kwargs)
        # The losses are means over the batch, so that the Trainer has to divide them by the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def measure(self, model: Any, retrieval: Any) -> dict[str, float | int]:
        """Metrics of the model on one of the retrieval sets."""
        raise NotImplementedError

    def batch_sampler(self) -> EpochBatchSampler:
        """The sampler of a map-style training set: `num_replicas` is the number of processes."""
        raise NotImplementedError

    def get_train_dataloader(self) -> DataLoader:
        dataset: Any = self.train_dataset
        if dataset is None:
            raise ValueError("training needs a train_dataset.")
        workers = self.args.dataloader_num_workers
        options: dict[str, Any] = {
            "collate_fn": self.data_collator,
            "num_workers": workers,
            "pin_memory": self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            "persistent_workers": self.args.dataloader_persistent_workers and workers > 0,
            "prefetch_factor": self.args.dataloader_prefetch_factor if workers > 0 else None,
        }
        if isinstance(dataset, IterableDataset):
            # A stream is split by process already, so accelerate must not split it again.
            return DataLoader(dataset, batch_size=self.args.per_device_train_batch_size, drop_last=True, **options)
        sampler: Any = self.batch_sampler()
        if len(sampler) == 0:
            raise ValueError(
                f"the training data does not fill one batch of {sampler.global_batch_size}; lower "
                "per_device_train_batch_size or add data."
            )
        return self.accelerator.prepare(DataLoader(dataset, batch_sampler=sampler, **options))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure every retrieval set; returns and logs the metrics as `eval_<set>_<metric>`."""
        model = self.accelerator.unwrap_model(self.model).eval()
        metrics: dict[str, float] = {}
        for name, retrieval in self.retrieval.items():
            scores = self.measure(model, retrieval)
            metrics |= {f"{metric_key_prefix}_{name}_{key}": value for key, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def fit(self, checkpoint: str | None) -> dict[str, Any]:
        """Train, evaluate at the end, and keep the log beside the result.

        Args:
            checkpoint: Checkpoint to go on from.

        Returns:
            The metrics of training and evaluation.
        """
        metrics = self.train(resume_from_checkpoint=checkpoint).metrics
        if self.retrieval:
            metrics |= self.evaluate()
        self.save_state()
        return metrics


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run; one that a killed process left half-written is passed over."""
    pattern = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
    folder = Path(output_dir)
    if not folder.is_dir():
        return None
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := pattern.match(path.name))]
    for _, path in sorted(found, reverse=True):
        missing = [name for name in CHECKPOINT_FILES if not (path / name).is_file()]
        if not missing:
            return path
        logger.warning("%s is incomplete (no %s) and is passed over.", path, ", ".join(missing))
    return None


def resume_point(args: StageConfig, resume: bool) -> str | None:
    """Where a run starts from.

    Args:
        args: The run's arguments.
        resume: Whether to go on from the newest checkpoint in `args.output_dir`.

    Returns:
        The checkpoint to load, or `None` for a new run.

    Raises:
        FileExistsError: The folder holds a run already and `resume` is off.
    """
    if args.resume_from_checkpoint:
        return args.resume_from_checkpoint
    found = last_checkpoint(args.output_dir)
    if resume:
        if found is None:
            logger.info("nothing to resume in %s: starting from the beginning.", args.output_dir)
        return None if found is None else str(found)
    if found is not None:
        raise FileExistsError(
            f"{args.output_dir} holds a run already ({found.name}); add --resume to go on with it, "
            "or choose another output_dir."
        )
    return None


def require(config: Any, names: Sequence[str]) -> None:
    """Raise one error for the settings that a job cannot do without.

    Raises:
        ValueError: Some of the fields `names` are empty.
    """
    missing = [name for name in ("output_dir", *names) if not getattr(config, name)]
    if missing:
        raise ValueError(f"{type(config).__name__} needs {', '.join(missing)}; give them in the recipe or as options.")


def loading_options(dtype: str, attn_implementation: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the settings of a run; what is unset is left out.

    Raises:
        ValueError: There is no dtype of that name.
    """
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is unknown; choose float32, bfloat16 or float16.")
    options = {"dtype": torch_dtype, "attn_implementation": attn_implementation, "revision": revision}
    return {key: value for key, value in options.items() if value is not None}
