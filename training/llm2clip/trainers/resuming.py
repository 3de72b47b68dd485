"""Resuming a run as if it had not ended: its totals go on, and no step is made beyond the last one."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from llm2clip.trainers.pushing import PushingTrainer
from llm2clip.trainers.run_totals import RunCount, RunTotals


class _NoStepIsLeft(Exception):  # noqa: N818
    """All steps are done before the first one."""


class _Watch(TrainerCallback):
    """Keeps a resumed run to its settings, and ends it before its first step if none is left.

    The Trainer would make one more, and go on with the `logging_steps`, `eval_steps`, `save_steps` of the checkpoint.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps > 0:
            raise _NoStepIsLeft


class ResumingTrainer(PushingTrainer):
    """A Trainer whose resumed runs log the losses of uninterrupted ones, and end where those end."""

    # Arguments of `from_pretrained` for a checkpoint of the model.
    load_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.totals = RunTotals()
        self.add_callback(self.totals)
        self.add_callback(_Watch())

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; see [`~transformers.Trainer.train`]. `train_loss` is the mean over all steps of the run."""
        try:
            output = super().train(*args, **kwargs)
        except _NoStepIsLeft:
            metrics = {"total_flos": self.state.total_flos, "train_loss": 0.0}
            self.log(metrics)
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            self.is_in_train = False
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            output = TrainOutput(self.state.global_step, 0.0, metrics)
        return output._replace(training_loss=output.metrics["train_loss"])

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Make a step; see [`~transformers.Trainer.training_step`]."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.totals.add(loss, inputs.get("num_truncated", 0))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; see [`~transformers.Trainer.log`]. The losses are those of an uninterrupted run."""
        if "loss" in logs or "train_loss" in logs:
            self.totals.gather()
            if self.totals.cut_captions:
                logs["cut_captions"] = self.totals.cut_captions
        if "loss" in logs:
            logs["loss"] = self.totals.take_loss()
        if "train_loss" in logs:
            logs["train_loss"] = self.totals.mean_loss()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RunCount):
                callback.gather()
        super()._save_checkpoint(model, trial)

    # transformers (5.2 to 5.23) has no public method for loading a checkpoint's weights: it reads the files by the
    # names of the parameters, which `from_pretrained` and `save_pretrained` may change.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights through `from_pretrained`."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        target: Any = self.accelerator.unwrap_model(model or self.model)
        saved = type(target).from_pretrained(resume_from_checkpoint, **self.load_options)
        missing, unexpected = target.load_state_dict(saved.state_dict(), strict=False)
        # The frozen LLM is already loaded.
        missing = [name for name in missing if not name.startswith("text_model.")]
        if missing or unexpected:
            raise ValueError(
                f"{resume_from_checkpoint} does not fit: missing {missing[:5]}, unexpected {unexpected[:5]}; "
                "resume with the settings of the original run."
            )
