"""What the Trainers of all stages share: batches from our own samplers, checkpoints, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from llm2clip.data.sampling import EpochBatchSampler
from llm2clip.hub.cards import (
    CARD,
    CardFacts,
    Evaluation,
    base_models,
    read_card,
    render,
    split_card,
    summary,
    write_curves,
)
from llm2clip.trainers.pushing import PushingTrainer
from llm2clip.utils.files import write_text
from llm2clip.utils.identity import data_revision
from llm2clip.utils.repos import hub_ids
from modeling_llm2clip.compatibility_llm2clip import make_readable_by_version_4
from modeling_llm2clip.modeling_llm2clip_utils import keep_freed_memory

# Settings that say where a run was, or that are nobody else's business, and not what it did.
PRIVATE_SETTINGS = ("output_dir", "hub_", "push_to_hub", "report_to", "run_name", "logging_", "use_cpu", "local_rank")


class StageTrainer(PushingTrainer):
    """A Trainer whose batches come from `batch_sampler()` and whose evaluation is retrieval.

    Several processes see the global batches of one process with a larger batch, and a resumed run those of an unbroken
    one.

    Args:
        retrieval: Retrieval sets by name, which `evaluate()` measures.
        kwargs: See `transformers.Trainer`.
    """

    # The pipeline tag of the card, and what `retrieval` measures, for subclasses to say.
    card_task = ""
    evaluation_title = ""
    # How `from_pretrained` reads a checkpoint of what is trained.
    load_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, *, retrieval: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.retrieval = retrieval or {}
        # The Trainer insists on an evaluation set; ours are those of `retrieval`.
        super().__init__(eval_dataset=list(self.retrieval) or None, **kwargs)
        sources = getattr(self.args, "eval_sources", {}) if self.is_world_process_zero() else {}
        # Now, since a data set on the Hub may change while the model trains.
        self._revisions = {name: data_revision(source) for name, source in sources.items()}
        if self.args.device.type == "cpu":
            keep_freed_memory()
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights as `from_pretrained` does: some have other names in the file than in the model."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        target: Any = self.accelerator.unwrap_model(model or self.model)
        saved = type(target).from_pretrained(resume_from_checkpoint, **self.load_options)
        missing, unexpected = target.load_state_dict(saved.state_dict(), strict=False)
        # A frozen LLM has its weights already.
        missing = [name for name in missing if not name.startswith("text_model.")]
        if missing or unexpected:
            raise ValueError(
                f"{resume_from_checkpoint} is of another model: it lacks {missing[:5]} and has {unexpected[:5]}. "
                "Resume with the settings that the run began with."
            )

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write our card, and not the Trainer's, around what a person wrote on the one that is there."""
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        model = self.accelerator.unwrap_model(self.model)
        folder.mkdir(parents=True, exist_ok=True)
        sources = [str(source["path"]) for source in getattr(self.args, "sources", []) if source.get("path")]
        facts = CardFacts(
            name=(self.args.hub_model_id or folder.name).split("/")[-1],
            task=self.card_task,
            repo=self.hub_model_id or str(self.args.output_dir),
            summary=summary(model),
            base_models=hub_ids(*self._trained_from(), *base_models(model.config)),
            datasets=hub_ids(*sources),
            sources=[Path(source).name for source in sources if not hub_ids(source)],
            recipe=self._recipe(),
            evaluations=self._evaluations(),
            has_curves=write_curves(folder, self.state.log_history),
            is_adapter=getattr(model, "has_adapter", False),
        )
        on_the_hub = self.card_on_the_hub()
        write_text(
            folder / CARD, render(facts, *(read_card(folder) if on_the_hub is None else split_card(on_the_hub)))
        )

    def _trained_from(self) -> list[str | None]:
        names = ("model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path")
        return [getattr(self.args, name, None) for name in names]

    def _recipe(self) -> dict[str, Any]:
        """Settings that differ from the defaults and are not a path of this machine."""
        recipe = {}
        for entry in fields(self.args):
            value = getattr(self.args, entry.name)
            default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            public = not entry.name.startswith(PRIVATE_SETTINGS) and entry.name not in ("sources", "eval_sources")
            plain = isinstance(value, (bool, int, float, str, list, dict))
            if entry.init and public and plain and value != default and not _is_local(value):
                recipe[entry.name] = value
        return json.loads(json.dumps(recipe, default=str))

    def _evaluations(self) -> list[Evaluation]:
        found = []
        for name in self.retrieval:
            prefix = f"eval_{name}_"
            others = [f"eval_{other}_" for other in self.retrieval if other.startswith(f"{name}_")]
            logged = [entry for entry in self.state.log_history if any(key.startswith(prefix) for key in entry)]
            source = getattr(self.args, "eval_sources", {}).get(name, {})
            source = {"path": source} if isinstance(source, str) else source
            if logged:
                metrics = {
                    key.removeprefix(prefix): value
                    for key, value in logged[-1].items()
                    if key.startswith(prefix) and not key.startswith(tuple(others))
                }
                path = str(source.get("path") or name)
                dataset = path if hub_ids(path) else Path(path).name
                split, revision = str(source.get("split") or name), self._revisions.get(name)
                found.append(Evaluation(self.evaluation_title, dataset, split, revision, metrics))
        return found

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
        # An upload of a checkpoint may still be reading the folder.
        self._finish_current_push()
        save()
        if self.retrieval:
            metrics |= self.evaluate()
        self.save_state()
        self.create_model_card()
        if self.args.push_to_hub:
            self.push_result()
        return metrics


def _is_local(value: Any) -> bool:
    return isinstance(value, (str, Path)) and ("/" in str(value) or Path(value).exists()) and not hub_ids(str(value))
