"""The progress bar of training, in place of transformers' bar and its printed dictionaries."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback, TrainerState

from llm2clip.utils.progress import ProgressBar, in_section
from llm2clip.utils.tables import short_name, split_recalls

logger = logging.getLogger(__name__)


class TrainingProgress(TrainerCallback):
    """Show the step, the rate, the loss and the time left; the logged values go to the log at debug level.

    It takes the place of `ProgressCallback` and `PrinterCallback`; a script that has not set up logging gets their
    output, the logged values on standard output. `close` removes the bar after an error, for which the Trainer calls
    no callback.
    """

    def __init__(self, description: str = "Training") -> None:
        self.description = description
        self._bar: ProgressBar | None = None
        self._evaluated_step: int | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close()
        if state.is_world_process_zero:
            self._bar = ProgressBar(self.description, state.max_steps, "step", initial=state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        values = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in logs.items()}
        values.pop("total_flos", None)
        if not logger.isEnabledFor(logging.INFO):
            print(values, flush=True)
        logger.debug("step %d: %s", state.global_step, ", ".join(f"{key} {value}" for key, value in values.items()))
        if self._bar is not None and "loss" in logs:
            self._bar.set_postfix_str(f"loss {float(logs['loss']):.4f}", refresh=False)
        recalls, _ = split_recalls(logs)
        # A run that ends with an evaluation measures its result again after saving it.
        if recalls and state.global_step != self._evaluated_step:
            self._evaluated_step = state.global_step
            scores = ", ".join(
                f"{name} {short_name(score)} {100 * value:.1f}%".lstrip()
                for name, found in recalls.items()
                for score, value in found.items()
                if score.endswith("@1")
            )
            level = logging.DEBUG if in_section() else logging.INFO
            logger.log(level, "Evaluation at step %d: %s", state.global_step, scores)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close(done=True)

    def close(self, done: bool = False) -> None:
        """Remove the bar; if the work is done, log one line in its place."""
        if self._bar is not None:
            self._bar.close(done)
            self._bar = None
