"""The base of all stage trainers: a Trainer that resumes exactly, and writes folders for the Hub."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, cast

import datasets
import torch
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy, TrainOutput
from transformers.utils import ModelOutput, PushInProgress

from llm2clip.command_line.settings import refuse
from llm2clip.command_line.tables import RECALL
from llm2clip.data.sampling import EpochDataset
from llm2clip.data.streams import SampleStream
from llm2clip.evaluation.data import CaptionPairData
from llm2clip.files.atomic import read_json, write_json
from llm2clip.files.library_errors import wrap_write_errors
from llm2clip.hub.cards.facts import Evaluation
from llm2clip.trainers.base_config import MEAN_RECALL, StageConfig, require_batch
from llm2clip.trainers.checkpoints import SETTINGS, begin_checkpoint, finish_checkpoint, unregister_result
from llm2clip.trainers.loaders import (
    data_inputs,
    epoch_loader,
    loader_options,
    rows_that_count,
    stream_loader,
    validate_loader_settings,
)
from llm2clip.trainers.model_card import DataRevisions, continued, latest_evaluations, write_model_card
from llm2clip.trainers.optimizer import SCHEDULE_SETTINGS, OptimizerSettings, check_warmup
from llm2clip.trainers.pushing import RunRepo, copy_model
from llm2clip.trainers.run_context import RunContext
from llm2clip.trainers.run_state import RunState, SkipLog, StreamPosition, recalls_before
from llm2clip.trainers.saving import finite_weights, load_weights
from llm2clip.trainers.sharding import gathered, is_sharded, prepare_for_fsdp, unsharded
from llm2clip.trainers.step_guard import Observed, StepGuard, close_bars
from modeling_llm2clip.compatibility_llm2clip import make_readable_by_version_4
from modeling_llm2clip.modeling_llm2clip_utils import shorten

logger = logging.getLogger(__name__)

# Settings of the losses that `compute_loss_func` replaces.
LOSS_SETTINGS = ("label_smoothing_factor", "loss")


class EmbeddedBatch(NamedTuple):
    """What the loss of a batch is computed from, of this process.

    Attributes:
        embeds: Embeddings by name, `(rows, width)` each, of unit length.
        logit_scale, logit_bias: Scalars, if the model or the settings have them; the scale is not a logarithm.
        ids: Which rows belong together, `(rows,)` each, or None.
    """

    embeds: dict[str, Tensor]
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None
    ids: Mapping[str, Tensor | None] = MappingProxyType({})


class StageTrainer(Trainer):
    """A [`~transformers.Trainer`] for the stages of LLM2CLIP.

    It trains on any map-style or iterable data set of rows that the stage's collator accepts, with the Trainer's own
    samplers. This package's data sets bring their samplers: several processes then see the global batches of one
    process with a larger batch, and a resumed run sees those of an uninterrupted one.

    `evaluate()` measures the sets of `retrieval`, and the loss of `eval_dataset`, whose rows are those of training.

    Args:
        data_collator: By default the stage's collator with `processing_class`.
        train_dataset: Rows to train on.
        eval_dataset: Rows to evaluate, or a mapping from a name to such a data set.
        processing_class: Tokenizer or processor; it is saved with the model.
        retrieval: Retrieval sets by name.
        kwargs: See `transformers.Trainer`.
    """

    # The pipeline tag of the card, and the title of its evaluation table.
    card_task: ClassVar[str] = ""
    evaluation_title: ClassVar[str] = ""
    config_class: ClassVar[type] = StageConfig
    # Class of the sets of `retrieval`.
    retrieval_class: ClassVar[type] = CaptionPairData
    # Arguments of `from_pretrained` for a checkpoint of the model.
    load_options: ClassVar[dict[str, Any]] = {}
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
        **kwargs: Any,
    ) -> None:
        if args is None or not isinstance(args, self.config_class):
            wanted, given = self.config_class.__name__, "nothing" if args is None else type(args).__name__
            raise ValueError(f"{type(self).__name__} needs args of type {wanted}, not {given}.")
        if model is None or kwargs.get("model_init") is not None:
            raise ValueError(f"{type(self).__name__} needs a model: a run trains one, without model_init.")
        if isinstance(train_dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
            raise ValueError(f"train_dataset has the splits {', '.join(train_dataset)}; give one of them.")
        for name, rows in (retrieval or {}).items():
            if not isinstance(rows, self.retrieval_class):
                wanted, given = self.retrieval_class.__name__, type(rows).__name__
                raise ValueError(f"retrieval[{name!r}] is a {given}, not a {wanted}; rows are eval_dataset.")
        if kwargs.get("compute_metrics") is not None:
            raise ValueError("compute_metrics is given, but eval_dataset has its loss alone; give sets to retrieval.")
        self.args, self.retrieval, self.processing_class = args, retrieval or {}, processing_class
        self._has_own_collator = data_collator is not None
        if args.metric_for_best_model == MEAN_RECALL and not self.retrieval:
            args.metric_for_best_model, args.greater_is_better = "loss", False
        # That which the run pushes to.
        self.repo: RunRepo | None = None
        # The revisions of the retrieval sets, for the card.
        self.revisions: DataRevisions | None = None
        self.run: RunContext | None = None
        self.prepare_model(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            # With eval_strategy the Trainer insists on a data set; the names of the retrieval sets serve as one.
            eval_dataset=eval_dataset if eval_dataset is not None else [*self.retrieval] or None,
            processing_class=processing_class,
            **kwargs,
        )
        self.eval_dataset = eval_dataset
        if data_collator is None and (collator := self.default_collator()) is not None:
            self.data_collator = collator
        self._validate_settings()
        self.guard = StepGuard(str(args.output_dir))
        is_endless = isinstance(train_dataset, SampleStream) and train_dataset.repeat
        position = StreamPosition(train_dataset, args) if is_endless else None
        skip_log = SkipLog(Path(str(args.output_dir)) / f"skipped-{args.process_index}.jsonl")
        self.run_state = RunState(skip_log, position, self.measure_before)
        self.add_callback(self.guard)
        self.add_callback(self.run_state)
        # The losses are means over the batch, so that the Trainer has to divide them by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        # Batches have a loss without labels.
        self.can_return_loss = True

    # What a stage defines.

    def prepare_model(self, model: nn.Module) -> None:
        """Do to the model what the settings say, at construction."""

    def default_collator(self) -> Callable[..., Any] | None:
        """Make the collator of the stage; `None` for that of transformers."""
        raise NotImplementedError

    def evaluation_collator(self, dataset: Any) -> Callable[..., Any]:
        """Return the collator of a data set that is evaluated."""
        return self.data_collator

    def measure(self, model: Any, retrieval: Any) -> dict[str, float | int]:
        """Compute the metrics of one of the retrieval sets."""
        raise NotImplementedError

    def embed_batch(self, model: nn.Module, inputs: dict[str, Any]) -> EmbeddedBatch:
        """Embed a batch of this process with the (wrapped) model, in chunks."""
        raise NotImplementedError

    def loss_views(self, embeds: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Yield what the loss compares, the whole embeddings last; the loss of the batch is the mean over these.

        With `matryoshka_dims`, also the first values of the embeddings, of unit length.
        """
        for dim in getattr(self.args, "matryoshka_dims", ()):
            yield {name: shorten(rows, dim) for name, rows in embeds.items()}
        yield embeds

    def contrastive_loss(self, batch: EmbeddedBatch) -> Tensor:
        """Compute the loss of a batch from its embeddings; override it for a loss of your own.

        Args:
            batch: The rows of this process. The losses of [`llm2clip.losses`] gather those of the other processes.

        Returns:
            A scalar whose mean over the processes is the loss of the batch of all of them.
        """
        raise NotImplementedError

    def save_result(self, output_dir: str | Path) -> None:
        """Save the trained model as a folder for the Hub; called in all processes."""
        raise NotImplementedError

    def merge_result(self) -> None:
        """Make of the trained model what is saved, so that the evaluation measures that."""

    def complete_result(self, output_dir: str | Path) -> None:
        """Add to the saved model what takes long or much memory; called in all processes when all else is saved."""

    def comparison(self, evaluations: list[Evaluation]) -> str:
        """Return a table for the card, in Markdown, beside that of the recalls."""
        return ""

    def frozen_inputs(self) -> dict[str, str | None]:
        """Identify what a run reads and its checkpoints do not contain, by name in words."""
        return {}

    # Training.

    def unwrapped(self) -> Any:
        """Return the model without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def _validate_settings(self) -> None:
        """Refuse settings that cannot be followed with this model or these rows."""
        validate_loader_settings(self.args, self.train_dataset)
        if self.compute_loss_func is not None:
            refuse(self.args, LOSS_SETTINGS, "compute_loss_func computes the loss")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; see [`~transformers.Trainer.train`]. `output_dir` is locked meanwhile; see [`RunContext`] for errors.

        Args:
            resume_from_checkpoint: Folder of a checkpoint, or True for the newest whole one in `output_dir`.
            args, kwargs: See [`~transformers.Trainer.train`].
        """
        # The rows of an iterable data set of others depend on the number of processes.
        elastic = isinstance(self.train_dataset, SampleStream) or not isinstance(self.train_dataset, IterableDataset)
        with contextlib.ExitStack() as stack:
            if self.run is None or not self.run.is_open:
                self.run = stack.enter_context(RunContext(self.args, resume_from_checkpoint, elastic=elastic))
            checkpoint = self.run.checkpoint
            # Another number of processes may have changed it.
            self._train_batch_size = self.args.train_batch_size
            unregister_result(self.args)
            stack.callback(close_bars, self.callback_handler.callbacks)
            stack.enter_context(self.run_state.resumed(checkpoint))
            stack.enter_context(self.guard.on_sigterm())
            prepare_for_fsdp(self.accelerator, cast(nn.Module, self.model))
            self.run.compare_inputs(lambda: data_inputs(self.train_dataset) | self.frozen_inputs())
            try:
                output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            except pickle.UnpicklingError as error:
                raise ValueError(
                    f"{checkpoint}: a file cannot be read safely: it is damaged, or contains more than tensors, and "
                    "would run code. Continue from an older checkpoint: --resume takes one if you delete this one."
                ) from error
        return output._replace(metrics={**output.metrics, **recalls_before(self.state.log_history)})

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """Count epochs and steps: none for a run that has made all of them, where the Trainer would make one more."""
        num_epochs, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        checkpoint = cast(RunContext, self.run).checkpoint
        if checkpoint is not None and read_json(checkpoint / TRAINER_STATE_NAME)["global_step"] >= max_steps:
            num_epochs = 0
        return num_epochs, *others, max_steps

    def get_train_dataloader(self) -> DataLoader:
        dataset: Any = self.train_dataset
        options = loader_options(self.args, self.data_collator, self.args.dataloader_persistent_workers)
        if isinstance(dataset, SampleStream):
            return stream_loader(dataset, self._train_batch_size, options)
        if isinstance(dataset, EpochDataset):
            return epoch_loader(dataset, self._train_batch_size, self.args, self.accelerator, options)
        loader = super().get_train_dataloader()
        batch_size = self._train_batch_size * self.args.world_size
        require_batch(len(loader) if hasattr(dataset, "__len__") else 1, batch_size)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Make the loader of all rows of a data set; dropping the last batch is for training."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = cast(Any, self.eval_dataset)[dataset]
        options = loader_options(self.args, self.evaluation_collator(dataset))
        return self.accelerator.prepare(DataLoader(dataset, self.args.eval_batch_size, **options))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None:
            check_warmup(self.args.get_warmup_steps(num_training_steps), num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a batch: embed it, and compare.

        It is that of this process in training, whose mean over the processes is the loss of the batch of all of them,
        and that mean in an evaluation, of which the Trainer makes a mean over the rows.
        """
        inputs = dict(inputs)
        keys = inputs.pop("keys", None)
        self.run_state.count_batch(inputs.pop("skipped", ()), inputs.pop("num_truncated", 0) if model.training else 0)
        batch = self.embed_batch(model, inputs)
        compared = batch
        if not model.training:
            rows = rows_that_count({**batch.embeds, **batch.ids}, self.accelerator)
            compared = batch._replace(
                embeds={name: rows[name] for name in batch.embeds}, ids={name: rows[name] for name in batch.ids}
            )
        losses = []
        for view in self.loss_views(compared.embeds):
            if self.compute_loss_func is None:
                losses.append(self.contrastive_loss(compared._replace(embeds=view)))
            else:
                output = ModelOutput(**view, logit_scale=batch.logit_scale, logit_bias=batch.logit_bias)
                losses.append(self.compute_loss_func(output, compared.ids or None, num_items_in_batch=None))
        loss = torch.stack(losses).mean()
        # The states of tokens, (rows, tokens, width), may be anything where there is padding.
        observed = Observed.of(loss, [embeds for embeds in batch.embeds.values() if embeds.dim() == 2], keys)
        if model.training:
            self.guard.observe(observed, self.accelerator.sync_gradients)
            if self.compute_loss_func is not None:  # whose loss the Trainer does not divide
                loss = loss / self.current_gradient_accumulation_steps
        else:
            observed.require_finite(f"evaluation at step {self.state.global_step}")
            loss = cast(Tensor, self.accelerator.reduce(loss, "mean"))
        return (loss, batch.embeds) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.guard.grad_norm = super()._clip_grad_norm(model)
        return self.guard.grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; see [`~transformers.Trainer.log`]: also how many captions were cut and samples skipped so far."""
        if "loss" in logs or "train_loss" in logs:
            logs |= self.run_state.counts()
        logger.debug("step %d: %s", self.state.global_step, ", ".join(f"{name} {x}" for name, x in logs.items()))
        super().log(logs, start_time)

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint with the state of the run, mark it as whole, and only then delete older ones."""
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.run_state.counts()
        # The Trainer would delete older ones first.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with wrap_write_errors(folder):
                if self.args.should_save:
                    begin_checkpoint(folder)
                super()._save_checkpoint(model, trial)
                # The other processes have written their states of random numbers.
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    run = cast(RunContext, self.run)
                    self.run_state.save(folder, self.state.global_step, run.inputs)
                    write_json(folder / SETTINGS, run.settings)
                    finish_checkpoint(folder, limit, self.state.best_model_checkpoint)
        finally:
            self.args.save_total_limit = limit
        if self.args.push_to_hub:
            self._push_checkpoint(folder)

    # transformers (5.6 to 5.23) has no public method for loading a checkpoint's weights: it reads the files by the
    # names of the parameters, which `from_pretrained` and `save_pretrained` may change.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights through `from_pretrained`."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        target: Any = self.accelerator.unwrap_model(model or self.model)
        saved = type(target).from_pretrained(resume_from_checkpoint, **self.load_options)
        load_weights(target, saved, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        changed = cast(RunContext, self.run).changed & SCHEDULE_SETTINGS if checkpoint is not None else set()
        new = OptimizerSettings.of(self.optimizer, self.lr_scheduler) if changed else None
        super()._load_optimizer_and_scheduler(checkpoint)
        if new is not None:
            new.apply(self.optimizer, self.lr_scheduler)

    def _load_best_model(self) -> None:
        if is_sharded(self.accelerator) and not self.saves_adapter():
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model: in a checkpoint as it trains, and where you call it as the result, as the settings say."""
        folder = output_dir or str(self.args.output_dir)
        if _internal_call:
            self.save_weights(folder)
            return
        self._save_whole(folder)
        if self.args.push_to_hub:
            self.upload(folder, "Model save")

    def _save_whole(self, folder: str) -> None:
        if self.args.should_save:
            begin_checkpoint(Path(folder))
        self.save_result(folder)
        self.complete_result(folder)

    def save_weights(self, folder: str | Path) -> None:
        """Save the model as it trains, with its processor; called in all processes.

        Raises:
            NonFiniteError: A trained weight is NaN or infinite; in all processes.
        """
        model = unsharded(self.unwrapped())
        weights = finite_weights(self.accelerator, model, self.model_wrapped, self.state.global_step)
        if self.args.should_save:
            self.write_model(model, folder, weights)

    def write_model(self, model: Any, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write a model, by default with its own weights, and its processor; called in the main process."""
        model.save_pretrained(folder, state_dict=weights)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        make_readable_by_version_4(folder)

    def saves_adapter(self) -> bool:
        """Tell whether checkpoints have an adapter in place of the frozen LLM."""
        return getattr(self.unwrapped(), "has_adapter", False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled or not self.saves_adapter():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Otherwise each checkpoint would have the whole frozen LLM, which a resumed run does not read.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    # Evaluation.

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate `eval_dataset`, by default the one given at construction, and in that case the retrieval sets too.

        Returns:
            `eval_loss` of the data set, `eval_<set>_<metric>` of each retrieval set and the mean of
            all their recalls, `eval_mean_recall`.
        """
        metrics: dict[str, float] = {}
        if eval_dataset is not None or self.eval_dataset is not None:
            metrics |= super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None and self.retrieval:
            metrics |= self._measure_retrieval(metric_key_prefix)
        return metrics

    def measure_before(self) -> None:
        """Measure the retrieval sets before the first step, in all processes; random numbers stay as they are."""
        if self.retrieval and not self.args.eval_on_start:
            with torch.random.fork_rng(devices=[]):
                self._measure_retrieval("eval")

    def _measure_retrieval(self, prefix: str) -> dict[str, float]:
        model = self.unwrapped().eval()
        with gathered(self.accelerator, self.model_wrapped), self.accelerator.autocast():
            metrics: dict[str, float] = {
                f"{prefix}_{name}_{key}": value
                for name, retrieval in self.retrieval.items()
                for key, value in self.measure(model, retrieval).items()
            }
        recalls = [value for name, value in metrics.items() if RECALL.fullmatch(name)]
        if recalls:
            metrics[f"{prefix}_{MEAN_RECALL}"] = fmean(recalls)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # The card.

    def create_model_card(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Write this package's model card into `output_dir`; text that people added to the existing card stays."""
        if not self.is_world_process_zero():
            return
        if kwargs:  # as scripts for the card of transformers end; an error would come after the training
            logger.warning("Ignoring %s: the model card is written from what the run knows.", ", ".join(kwargs))
        log, sources = self.state.log_history, getattr(self.args, "eval_sources", {})
        evaluations = latest_evaluations(
            [*self.retrieval], log, sources, self.evaluation_title, self.revisions, wait=not self.is_in_train
        )
        write_model_card(
            self.args,
            self.unwrapped(),
            self.processing_class,
            task=self.card_task,
            evaluations=evaluations,
            history=continued(self.earlier_history, log),
            comparison=self.comparison(evaluations),
            repo=self.hub_model_id,
            license=None if self.repo is None else self.repo.license,
        )

    # Pushing: transformers would upload all files of the output folder, and the token in training_args.bin.

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repo and its branch, and check the license of what is pushed, before training; see [`RunRepo`].

        `token` and `private` are by default `hub_token` and `hub_private_repo`.
        """
        if self.is_world_process_zero():
            self.repo = RunRepo(self.args, self.unwrapped(), token, private)
            # Any, since the Trainer declares it as None.
            repo_id: Any = self.repo.repo_id
            self.hub_model_id, self.push_in_progress = repo_id, None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Leave it to [`_push_checkpoint`]: the Trainer calls this before the checkpoint is whole."""

    def _push_checkpoint(self, checkpoint: Path) -> None:
        """Push the model of a whole checkpoint with the card of the run, unless an upload runs; see `hub_strategy`."""
        if self.repo is None or self.args.hub_strategy == HubStrategy.END:
            return
        running = cast(Any, self.push_in_progress)
        if running is not None and not running.is_done() and not self.args.hub_always_push:
            return
        copy_model(checkpoint, Path(str(self.args.output_dir)))
        self.create_model_card()
        self.control = self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_steps, epoch = self.args.save_strategy == SaveStrategy.STEPS, int(self.state.epoch or 0)
        when = f"step {self.state.global_step}" if by_steps else f"epoch {epoch}"
        jobs = self.repo.push_checkpoint(checkpoint, f"Training in progress, {when}")
        waiting: Any = [*(running.jobs if running else []), *jobs]
        self.push_in_progress = cast(Any, PushInProgress(waiting))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the result into `output_dir`, write the card, and upload both; see `transformers.Trainer`.

        Returns:
            The `CommitInfo`; its `Future` unless `blocking`.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self._save_whole(str(self.args.output_dir))
        if kwargs:  # else `upload` writes the card
            self.create_model_card(**kwargs)
        return self.upload(str(self.args.output_dir), str(commit_message), blocking, token, revision)

    def upload(
        self,
        folder: str,
        message: str,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        """Upload a folder as it is, with its card; called in all processes. See [`RunRepo.push`]."""
        if self.repo is None:
            return None
        self.create_model_card()
        self.control = self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        return self.repo.push(Path(folder), message, blocking, token, revision)
