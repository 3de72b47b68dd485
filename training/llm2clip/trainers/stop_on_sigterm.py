"""The end of a training by SIGTERM: a checkpoint after the present step, in all processes."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2clip.utils.processes import on_any_process, process_state
from llm2clip.utils.stopping import TERMINATED, StoppedError, on_sigterm

if TYPE_CHECKING:
    from llm2clip.trainers.base_trainer import StageTrainer

logger = logging.getLogger(__name__)


class StopOnSigterm(TrainerCallback):
    """After SIGTERM in any process, saves a checkpoint at the end of the step and raises [`StoppedError`] in all.

    The callback of transformers (`enable_jit_checkpoint`) does not fit: every process decides by a clock of its own,
    so that two can stop at different steps and wait for each other; it counts a file as part of the checkpoint that it
    deletes afterwards; and the run ends as one that is complete.

    Args:
        grace_seconds: How long after the signal the process ends in any case.
        output_dir: Folder of the checkpoints.
    """

    def __init__(self, grace_seconds: float, output_dir: str) -> None:
        self.grace_seconds, self.output_dir = grace_seconds, output_dir
        self.received = self._stopping = False
        self._deadline = threading.Timer(grace_seconds, self._give_up)
        self._deadline.daemon = True

    def receive(self) -> None:
        """Take note of the signal."""
        if not self.received:
            self.received = True
            self._deadline.start()

    def close(self) -> None:
        """Forget the deadline."""
        self._deadline.cancel()

    def _give_up(self) -> None:
        """End the process at the deadline, wherever it is: in a long step, an evaluation or a save."""
        logger.warning(
            "SIGTERM came %.0f seconds ago, and no checkpoint has been completed since; the one before it is the "
            "newest in %s, from which --resume goes on. --grace-seconds gives more time.",
            self.grace_seconds,
            self.output_dir,
        )
        os._exit(TERMINATED)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if on_any_process(torch.tensor(self.received, device=args.device)):
            self._stopping = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Called when the checkpoint is whole."""
        if not self._stopping:
            return
        # A launcher kills the others when the first process ends.
        process_state().wait_for_everyone()
        if state.is_world_process_zero:
            logger.warning("SIGTERM: %s-%d is saved in %s.", PREFIX_CHECKPOINT_DIR, state.global_step, self.output_dir)
        raise StoppedError


@contextmanager
def stopped_by_sigterm(trainer: StageTrainer) -> Iterator[None]:
    """Let [`StopOnSigterm`] decide on SIGTERM during a training."""
    callback = StopOnSigterm(trainer.args.grace_seconds, str(trainer.args.output_dir))
    trainer.add_callback(callback)
    try:
        with on_sigterm(callback.receive):
            yield
        if callback.received:  # after the last step
            raise StoppedError
    finally:
        callback.close()
        trainer.remove_callback(callback)
