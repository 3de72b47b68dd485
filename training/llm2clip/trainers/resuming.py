"""Resuming a run whose steps are all done: it was ended while its result was saved."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from llm2clip.trainers.pushing import PushingTrainer


class _NoStepIsLeft(Exception):  # noqa: N818
    """All steps are done before the first one."""


class _Watch(TrainerCallback):
    """Ends training before its first step if none is left; the Trainer would make one more."""

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps > 0:
            raise _NoStepIsLeft


class ResumingTrainer(PushingTrainer):
    """A Trainer that makes no step beyond the last one when it resumes from the checkpoint of that."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_Watch())

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; see [`~transformers.Trainer.train`]."""
        try:
            return super().train(*args, **kwargs)
        except _NoStepIsLeft:
            metrics = {"total_flos": self.state.total_flos}
            self.log(dict(metrics))
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            self.is_in_train = False
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            return TrainOutput(self.state.global_step, 0.0, metrics)
