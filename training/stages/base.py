"""What the Trainers of all stages share: batches from our own samplers, checkpoints, resuming."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2clip_training.data.sampling import EpochBatchSampler
from modeling_llm2clip.compatibility_llm2clip import make_readable_by_version_4

logger = logging.getLogger(__name__)

# The Trainer writes it last, so that a checkpoint without it was not finished.
CHECKPOINT_MARK = "trainer_state.json"
RESULT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


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

    def __post_init__(self) -> None:
        # Without this the Trainer refuses bf16 where there is no accelerator.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()

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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            make_readable_by_version_4(output_dir or str(self.args.output_dir))

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
        """Measure every retrieval set; returns and logs the metrics as `eval_<set>_<metric>`.

        Raises:
            ValueError: Another data set is given: what is measured is fixed by `retrieval`.
        """
        if eval_dataset is not None:
            raise ValueError("evaluate() measures the sets given as retrieval=; it takes no eval_dataset.")
        model = self.accelerator.unwrap_model(self.model).eval()
        metrics: dict[str, float] = {}
        for name, retrieval in self.retrieval.items():
            scores = self.measure(model, retrieval)
            metrics |= {f"{metric_key_prefix}_{name}_{key}": value for key, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def fit(self, checkpoint: str | None, save: Callable[[], None]) -> dict[str, Any]:
        """Train, save the result, then evaluate it, and keep the log beside it.

        Args:
            checkpoint: Checkpoint to go on from.
            save: Saves the result; before the evaluation, which may fail.

        Returns:
            The metrics of training and evaluation.
        """
        metrics = self.train(resume_from_checkpoint=checkpoint).metrics
        save()
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
        if (path / CHECKPOINT_MARK).is_file():
            return path
        logger.warning("%s is incomplete (no %s) and is passed over.", path, CHECKPOINT_MARK)
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
    results = [name for name in RESULT_FILES if Path(args.output_dir, name).exists()]
    if found is not None or results:
        raise FileExistsError(
            f"{args.output_dir} holds a run already ({found.name if found else results[0]}); add --resume to go on "
            "with it, or choose another output_dir."
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
