"""The base of all stage trainers: data loaders, evaluation, checkpoints, cards."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from llm2clip.data import SampleIndexBatchSampler
from llm2clip.data.sampling import EpochBatchSampler, EpochDataset
from llm2clip.data.streams import SampleStream
from llm2clip.trainers.base_config import StageConfig, require_batch
from llm2clip.trainers.checkpoints import begin_checkpoint, finish_checkpoint, named_checkpoint
from llm2clip.trainers.finite_steps import FiniteSteps, Observed, describe, require_finite_weights
from llm2clip.trainers.model_card import DataRevisions, write_model_card
from llm2clip.trainers.progress import FirstLog, TrainingProgress
from llm2clip.trainers.pushing import copy_files
from llm2clip.trainers.resuming import ResumingTrainer
from llm2clip.trainers.run_inputs import RunInputs
from llm2clip.trainers.run_settings import copy_settings
from llm2clip.trainers.sharding import gathered, undivided, with_scalars
from llm2clip.trainers.stream_resume import StreamResume, resumed_run, stream_loader
from llm2clip.trainers.weight_average import WeightAverage
from llm2clip.utils.embeddings import BROKEN_MODEL, NonFiniteError
from llm2clip.utils.library_errors import wrap_write_errors
from llm2clip.utils.processes import on_any_process
from llm2clip.utils.stopping import worker_init
from modeling_llm2clip.compatibility_llm2clip import make_readable_by_version_4
from modeling_llm2clip.modeling_llm2clip_utils import keep_freed_memory


class StageTrainer(ResumingTrainer):
    """A [`~transformers.Trainer`] for the stages of LLM2CLIP.

    It trains on any map-style or iterable data set of rows that the stage's collator accepts, with the Trainer's own
    samplers. This package's data sets bring their samplers: several processes then see the global batches of one
    process with a larger batch, and a resumed run sees those of an uninterrupted one.

    `evaluate()` measures the loss and the retrieval metrics of `eval_dataset`, whose rows are those of training, and
    the sets of `retrieval`.

    Args:
        data_collator: By default the stage's collator with `processing_class`.
        train_dataset: Rows to train on.
        eval_dataset: Rows to evaluate, or a mapping from a name to such a data set.
        processing_class: Tokenizer or processor; it is saved with the model.
        retrieval: Retrieval sets by name.
        compute_metrics: By default retrieval metrics from the embeddings.
        kwargs: See `transformers.Trainer`.
    """

    # The pipeline tag of the card, the title of its evaluation table, and the label of the progress bar.
    card_task: ClassVar[str] = ""
    evaluation_title: ClassVar[str] = ""
    title: ClassVar[str] = "Training"
    # Batch sampler of this package's map-style data sets.
    sampler_class: ClassVar[Callable[..., EpochBatchSampler]] = SampleIndexBatchSampler
    # Evaluation of `eval_dataset` gives the loss alone, without metrics from the outputs.
    loss_only: ClassVar[bool] = False
    # The log of an earlier part of the run, whose curves come first in the card.
    earlier_history: Sequence[dict[str, Any]] = ()
    args: StageConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: StageConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        retrieval: Mapping[str, Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            raise ValueError(f"{type(self).__name__} needs args, the config of its stage.")
        self.retrieval = retrieval or {}
        self._has_eval_rows = eval_dataset is not None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or self.default_collator(model, args, processing_class),
            train_dataset=train_dataset,
            # With eval_strategy the Trainer insists on a data set; the names of the retrieval sets serve as one.
            eval_dataset=eval_dataset if self._has_eval_rows else (list(self.retrieval) or None),
            processing_class=processing_class,
            compute_metrics=compute_metrics or self.retrieval_scores,
            **kwargs,
        )
        self.eval_revisions = DataRevisions(getattr(args, "eval_sources", {}) if self.is_world_process_zero() else {})
        self.inputs = RunInputs(self)
        self.finite_steps = FiniteSteps(self, self.args.skip_bad_steps)
        self.add_callback(self.finite_steps)
        half_life = self.args.ema_half_life
        self.average = None if half_life is None else WeightAverage(self, half_life)
        if self.average is not None:
            self.add_callback(self.average)
        is_endless = isinstance(train_dataset, SampleStream) and train_dataset.repeat
        self.stream = StreamResume(train_dataset, self.args) if is_endless else None
        if self.stream is not None:
            self.add_callback(self.stream)
        self.first_log = FirstLog()
        self.add_callback(self.first_log)
        self.progress = TrainingProgress(self.title)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(self.progress)
        if self.args.device.type == "cpu":
            keep_freed_memory()
        # The losses are means over the batch, so that the Trainer has to divide them by the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def default_collator(self, model: Any, args: Any, processing_class: Any) -> Callable[..., Any] | None:
        """Make the collator of the stage; `None` for that of transformers."""
        raise NotImplementedError

    def measure(self, model: Any, retrieval: Any) -> dict[str, float | int]:
        """Compute the metrics of one of the retrieval sets."""
        raise NotImplementedError

    def batch_sampler(self) -> EpochBatchSampler:
        """Make the batch sampler of this package's map-style data sets, for all processes."""
        return self.make_sampler(type(self).sampler_class)

    def make_sampler(self, sampler_class: Callable[..., EpochBatchSampler]) -> EpochBatchSampler:
        """Make a batch sampler of a class, for all processes."""
        return sampler_class(
            self.train_dataset,
            self.args.per_device_train_batch_size,
            num_replicas=self.accelerator.num_processes,
            seed=self.args.sampling_seed,
            drop_last=self.args.dataloader_drop_last,
        )

    def loss_and_outputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch and the outputs that the metrics of `eval_dataset` are computed from.

        The mean over processes is the loss of the batch of all of them, of the rows that [`without_repeats`] keeps.
        """
        raise NotImplementedError

    def save_result(self, output_dir: str | Path) -> None:
        """Save the trained model as a folder for the Hub; called in all processes."""
        raise NotImplementedError

    def complete_result(self, output_dir: str | Path) -> None:
        """Add to the saved model what takes long or much memory; called in all processes when all else is saved."""

    @staticmethod
    def retrieval_scores(prediction: EvalPrediction) -> dict[str, float | int]:
        """Compute retrieval metrics from the embeddings of `eval_dataset` and their [`eval_labels`]."""
        raise NotImplementedError

    @property
    def has_steps(self) -> bool:
        """Whether there is anything to train after [`initialize_weights`]."""
        return True

    def initialize_weights(self) -> dict[str, float]:
        """Compute initial weights from the training data, in all processes; returns what to report of them."""
        return {}

    def frozen_inputs(self) -> dict[str, str | None]:
        """Identify the weights that a run reads and that its checkpoints do not contain, by name in words."""
        return {}

    def eval_labels(self, inputs: dict[str, Any], num_rows: int) -> Any:
        """Which rows of a batch belong together: labels for `compute_metrics`. By default, each with itself."""
        return torch.zeros(num_rows, device=self.args.device)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see [`~transformers.Trainer.train`]. `output_dir` is locked meanwhile; see [`run_folder`] for errors.

        Args:
            resume_from_checkpoint: Folder of a checkpoint, or True for the newest whole one in `output_dir`.
            args, kwargs: See [`~transformers.Trainer.train`].
        """
        choose = partial(named_checkpoint, self.args, resume_from_checkpoint)
        try:
            with resumed_run(self, choose) as checkpoint:
                found = {} if checkpoint is not None else self.initialize_weights()
                if not self.has_steps:
                    self.log(dict(found))
                    return TrainOutput(0, 0.0, found)
                self.first_log.values = found
                output = super().train(checkpoint, *args, **kwargs)
                return output._replace(metrics={**output.metrics, **found})
        finally:
            self.progress.close()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        require_finite_weights(self.model, self.state.global_step, self.is_fsdp_enabled)
        if self.args.should_save:
            begin_checkpoint(Path(output_dir or str(self.args.output_dir)))
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            make_readable_by_version_4(output_dir or str(self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        own = self.model
        self.model = undivided(cast(nn.Module, own))
        try:
            super()._save(output_dir, None if state_dict is None else with_scalars(state_dict))
        finally:
            self.model = own

    # transformers (5.2 to 5.23) has no callback between the last file of a checkpoint and the deletion of old ones.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint and mark it as whole, and only then delete older ones."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with wrap_write_errors(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.average is not None and self.args.should_save:
            self.average.save(folder)
        if self.stream is not None and self.args.should_save:
            self.stream.save(folder, self.state.global_step)
        if self.args.should_save:
            self.inputs.save(folder)
            copy_settings(self.args, folder)
        # The other processes have written their states of random numbers.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish_checkpoint(folder, limit, self.state.best_model_checkpoint)

    def publish_checkpoint(self, checkpoint: Path) -> None:
        super().publish_checkpoint(checkpoint)
        if self.average is None:
            return
        with self.average.in_place(), tempfile.TemporaryDirectory() as scratch:
            self.accelerator.unwrap_model(self.model).save_pretrained(scratch)
            make_readable_by_version_4(scratch)
            copy_files(Path(scratch), Path(str(self.args.output_dir)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.average is not None and checkpoint is not None:
            self.average.checkpoint = Path(checkpoint)

    def _load_best_model(self) -> None:
        adapted = getattr(self.accelerator.unwrap_model(self.model), "has_adapter", False)
        if (self.is_deepspeed_enabled or self.is_fsdp_enabled) and not adapted:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        if self.average is not None:
            self.average.restore(Path(str(self.state.best_model_checkpoint)))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write this package's model card into `output_dir`; text that people added to the existing card stays."""
        if self.is_world_process_zero():
            write_model_card(self)

    def get_train_dataloader(self) -> DataLoader:
        dataset: Any = self.train_dataset
        workers = self.args.dataloader_num_workers
        options: dict[str, Any] = {
            "collate_fn": self.data_collator,
            "num_workers": workers,
            "worker_init_fn": worker_init(workers),
            "pin_memory": self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            "persistent_workers": self.args.dataloader_persistent_workers and workers > 0,
            "prefetch_factor": self.args.dataloader_prefetch_factor if workers > 0 else None,
        }
        if isinstance(dataset, SampleStream):
            return stream_loader(dataset, self.args.per_device_train_batch_size, options)
        if isinstance(dataset, EpochDataset):
            sampler: Any = self.batch_sampler()
            num_batches, batch_size = len(sampler), sampler.global_batch_size
            loader = self.accelerator.prepare(DataLoader(dataset, batch_sampler=sampler, **options))
        else:
            loader = super().get_train_dataloader()
            num_batches = len(loader) if hasattr(dataset, "__len__") else 1
            batch_size = self.args.per_device_train_batch_size * self.args.world_size
        require_batch(num_batches, batch_size)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        # Dropping the last batch is for training; metrics are over all rows.
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = self.loss_and_outputs(model, {name: x for name, x in inputs.items() if name != "keys"})
        if model.training:
            self.finite_steps.observe(self._observed(loss, outputs, inputs))
        return (loss, outputs) if return_outputs else loss

    def _observed(self, loss: Tensor, outputs: dict[str, Tensor], inputs: dict[str, Any]) -> Observed:
        # Without embeddings, the outputs are states, of which those of padding may be anything.
        return Observed.of(loss, () if self.loss_only else outputs.values(), inputs.get("keys"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.average is not None and self.average.in_model and any(name.startswith("eval_") for name in logs):
            logs["eval_ema_half_life"] = self.average.half_life
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Any, Any]:
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        observed = self._observed(loss, outputs, inputs)
        if on_any_process(observed.is_broken()):
            what = describe(gather_object([observed.report()]))
            raise NonFiniteError(f"evaluation at step {self.state.global_step}: {what}. {BROKEN_MODEL}")
        # The loss of the batch of all processes, which the Trainer weights with their rows.
        loss = cast(Tensor, self.accelerator.reduce(loss, "mean"))
        if prediction_loss_only or self.loss_only:
            return loss, None, None
        embeds = tuple(outputs.values())
        return loss, embeds, self.eval_labels(inputs, len(embeds[0]))

    def without_repeats(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Drop the rows with which accelerate fills the last batch of an evaluation on several processes.

        They are those that `gather_for_metrics` drops. A data set without a length keeps them, as it does there.

        Args:
            batch: Tensors of this process, (rows, ...) each, or None; returned as they are in training.
        """
        state = self.accelerator.gradient_state
        if cast(nn.Module, self.model).training or not state.end_of_dataloader or state.remainder <= 0:
            return batch
        index = self.accelerator.process_index
        return {
            name: rows if rows is None else rows[: max(0, state.remainder - index * len(rows))]
            for name, rows in batch.items()
        }

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate `eval_dataset`, by default the one given at construction, and in that case the retrieval sets too.

        Returns:
            `eval_loss` and `eval_<metric>` of the data set, `eval_<set>_<metric>` of each retrieval set; of averaged
            weights also their half-life, `eval_ema_half_life`.
        """
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            return self._measure_all(eval_dataset, ignore_keys, metric_key_prefix)

    def _measure_all(
        self, eval_dataset: Any, ignore_keys: list[str] | None, metric_key_prefix: str
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if eval_dataset is not None or self._has_eval_rows:
            metrics |= super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is not None or not self.retrieval:
            return metrics
        model = self.accelerator.unwrap_model(self.model).eval()
        with gathered(self):
            found = {
                f"{metric_key_prefix}_{name}_{key}": value
                for name, retrieval in self.retrieval.items()
                for key, value in self.measure(model, retrieval).items()
            }
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return metrics | found

    def fit(self, checkpoint: str | None) -> dict[str, Any]:
        """Train, from a checkpoint if one is given, save and evaluate the result, write the card and push if set.

        Returns:
            The metrics of training and evaluation.
        """
        metrics = self.train(resume_from_checkpoint=checkpoint).metrics
        # Before the evaluation, so that a failing one loses nothing.
        self.accelerator.wait_for_everyone()
        require_finite_weights(self.model, self.state.global_step, self.is_fsdp_enabled)
        with wrap_write_errors(Path(str(self.args.output_dir))):
            self.save_result(str(self.args.output_dir))
            self.accelerator.wait_for_everyone()
            if self.retrieval or self._has_eval_rows:
                metrics |= self.evaluate()
            self.save_state()
            self.create_model_card()
            self.complete_result(str(self.args.output_dir))
        if self.args.push_to_hub:
            self.push_result()
        return metrics
