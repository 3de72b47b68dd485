"""What a run counts across resumes: its mean loss, and the captions that were cut."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from accelerate.utils import gather
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from llm2clip.utils.processes import sum_over_processes


class RunCount(TrainerCallback, ExportableState):
    """A count that checkpoints contain, so that a resumed run goes on with it."""

    def stored(self, state: TrainerState) -> dict[str, Any]:
        """Return what the checkpoint contains that a run is resumed from; nothing if it starts anew."""
        states: Any = state.stateful_callbacks if state.global_step else {}
        return states.get(type(self).__name__, {}).get("attributes", {})

    def gather(self) -> None:
        """Gather what all processes count, before a checkpoint; all of them have to call this."""
        raise NotImplementedError


class RunTotals(RunCount):
    """Sums that checkpoints contain, so that a resumed run logs the numbers of an uninterrupted one.

    The Trainer's own sums start at the resume: its next logged loss leaves out the steps between the last entry of the
    log and the checkpoint, and its mean loss is that of the last part of the run.
    """

    NAMES: ClassVar = ("loss", "steps", "unlogged_loss", "unlogged_steps", "cut_captions")

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        # Sums over the steps that are logged, and the number of all steps.
        self.loss, self.steps = 0.0, 0
        self.unlogged_loss, self.unlogged_steps = torch.tensor(0.0), 0
        self.cut_captions, self._new_cut_captions = 0, 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._reset()
        for name, value in self.stored(state).items():
            setattr(self, name, value)
        self.unlogged_loss = torch.as_tensor(self.unlogged_loss, device=args.device)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        self.unlogged_steps += 1

    def add(self, loss: Tensor, cut_captions: int = 0) -> None:
        """Count a batch of this process: its share of the loss of a step, and its captions that were cut.

        A loss that is not finite counts as the mean of those since the last entry of the log, as in the Trainer.
        """
        instead = self.unlogged_loss / (1 + self.unlogged_steps)
        self.unlogged_loss = self.unlogged_loss + torch.where(loss.isfinite(), loss, instead)
        self._new_cut_captions += cut_captions

    def gather(self) -> None:
        """Replace the sums of this process by those of all processes, which all have to call this."""
        self.unlogged_loss = gather(self.unlogged_loss[None]).mean()
        self.cut_captions += int(sum_over_processes(torch.tensor(self._new_cut_captions)))
        self._new_cut_captions = 0

    def take_loss(self) -> float:
        """Return the mean loss of the steps since the last entry of the log, after [`gather`]."""
        mean = self.unlogged_loss.item() / max(1, self.unlogged_steps)
        self.loss += self.unlogged_loss.item()
        self.unlogged_loss, self.unlogged_steps = torch.zeros_like(self.unlogged_loss), 0
        return mean

    def mean_loss(self) -> float:
        """Return the mean loss of all steps, after [`gather`]."""
        return (self.loss + self.unlogged_loss.item()) / max(1, self.steps)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint contains, after [`gather`]."""
        values = {name: getattr(self, name) for name in self.NAMES}
        return {"args": {}, "attributes": values | {"unlogged_loss": self.unlogged_loss.item()}}
