"""Steps whose embeddings, loss or gradients are NaN or infinite: they end a run, or a given number is skipped."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerState

from llm2clip.utils.embeddings import NonFiniteError, finite_rows
from llm2clip.utils.logs import shortened
from llm2clip.utils.processes import on_any_process

if TYPE_CHECKING:
    from llm2clip.trainers.base_trainer import StageTrainer

logger = logging.getLogger(__name__)

SKIPPED_STEPS = "skipped_steps"
CURE = (
    "Look at these samples; train with a lower learning_rate, more warmup_steps or a lower max_grad_norm, and with "
    "bf16 instead of fp16. Earlier checkpoints are good. --skip-bad-steps N leaves out up to N such steps."
)


class Observed(NamedTuple):
    """What is known of one batch, on its device, so that nothing waits for the device before the optimizer step.

    Attributes:
        loss: Its loss.
        rows: `(rows,)` bool, which rows have finite embeddings; None if the stage has none.
        keys: The keys of the rows, if the collator gives them.
    """

    loss: Tensor
    rows: Tensor | None
    keys: Sequence[str] | None

    @classmethod
    def of(cls, loss: Tensor, embeds: Iterable[Tensor], keys: Sequence[str] | None) -> Observed:
        """Observe the loss and the embeddings, `(rows, width)` each, of a batch."""
        flags = [finite_rows(rows) for rows in embeds]
        return cls(loss.detach(), torch.stack(flags).all(dim=0) if flags else None, keys)

    def is_broken(self) -> Tensor:
        """Whether anything is not finite, as a bool on the device."""
        loss = ~self.loss.isfinite().all()
        return loss if self.rows is None else loss | ~self.rows.all()

    def report(self) -> dict[str, Any]:
        """Describe the batch for other processes: the names of its broken rows and of all its rows, and its loss."""
        rows = [] if self.rows is None else (~self.rows).nonzero()[:, 0].tolist()
        name = (lambda row: f"row {row} of its batch") if self.keys is None else self.keys.__getitem__
        return {"broken": [name(row) for row in rows], "keys": list(self.keys or []), "loss": float(self.loss.mean())}


def describe(reports: Sequence[dict[str, Any]]) -> str:
    """Say what is not finite, and name the samples, from the reports of all batches of all processes."""
    broken = [name for report in reports for name in report["broken"]]
    keys = shortened([key for report in reports for key in report["keys"]])
    bad = [report["loss"] for report in reports if not math.isfinite(report["loss"])]
    if broken:
        return f"embeddings are NaN or infinite, those of {shortened(broken)}"
    samples = f" The samples of this step are {keys}." if keys else ""
    return f"the {f'loss is {bad[0]}' if bad else 'gradients are NaN or infinite'}.{samples}".rstrip(".")


class FiniteSteps(TrainerCallback):
    """Checks every optimizer step before it changes the weights; all processes decide the same.

    A step is broken if the embeddings or the loss of one of its batches (of any accumulation step, on any process) or
    the gradients have a NaN or an infinite value. The first `allowed` broken steps are left out, which the log counts
    as `skipped_steps`; a resumed run goes on counting. The next one raises a [`NonFiniteError`].

    With a loss scale (fp16), infinite gradients are how the scale finds its size: they count only at a scale of 1.
    """

    def __init__(self, trainer: StageTrainer, allowed: int) -> None:
        if allowed and trainer.is_deepspeed_enabled:
            raise ValueError(
                "skip_bad_steps does not work with DeepSpeed, which updates weights in backward; set it to 0."
            )
        self.trainer, self.allowed = trainer, allowed
        self.skipped = 0
        self._observed: list[Observed] = []

    def observe(self, observed: Observed) -> None:
        """Take note of a batch whose gradients the next optimizer step contains."""
        self._observed.append(observed)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._observed.clear()
        self.skipped = max((int(entry.get(SKIPPED_STEPS, 0)) for entry in state.log_history), default=0)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        observed, self._observed = self._observed, []
        flags = [batch.is_broken() for batch in observed] + [self._gradients_are_broken()]
        if not on_any_process(torch.stack([flag.to(args.device) for flag in flags]).any()):
            return
        what = describe(gather_object([batch.report() for batch in observed]))
        message = f"step {state.global_step + 1}: {what}."
        if self.skipped >= self.allowed:
            skipped = f" {self.skipped} steps were skipped before it." if self.skipped else ""
            raise NonFiniteError(f"{message}{skipped} {CURE}")
        self.skipped += 1
        logger.warning("%s The step is skipped, number %d of %d.", message, self.skipped, self.allowed)
        # An optimizer leaves out parameters without gradient.
        self.trainer.model_wrapped.zero_grad(set_to_none=True)
        self.trainer.log({SKIPPED_STEPS: self.skipped})

    def _gradients_are_broken(self) -> Tensor:
        model = cast(nn.Module, self.trainer.model)
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        scaler = self.trainer.accelerator.scaler
        if not grads or (scaler is not None and scaler.get_scale() > 1):
            return torch.tensor(False)
        return ~largest(grads).isfinite()


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """Compute the largest absolute value of this process's parts of tensors; NaN if there is one."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return get_total_norm([part.detach() for part in parts if part.numel()], norm_type=math.inf)


def require_finite_weights(model: Any, step: int, sharded: bool) -> None:
    """Check the trained weights of a model before they are saved; see [`require_finite`]."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    require_finite(trained, step, sharded)


def require_finite(weights: Mapping[str, Tensor], step: int, sharded: bool, what: str = "trained weights") -> None:
    """Check weights before they are saved.

    Args:
        weights: The weights by name.
        step: The number of optimizer steps so far.
        sharded: Each process holds a part of the weights; then all processes have to call this.
        what: The weights in words.

    Raises:
        NonFiniteError: A weight is NaN or infinite.
    """
    if not weights:
        return
    broken = ~largest(weights.values()).isfinite()
    if not (on_any_process(broken) if sharded else bool(broken)):
        return
    names = [name for name, weight in weights.items() if weight.numel() and not largest([weight]).isfinite()]
    where = f" ({shortened(names)})" if names else ""
    raise NonFiniteError(
        f"after step {step}, {what} are NaN or infinite{where}, and are not saved. Go on from an earlier "
        "checkpoint with a lower learning_rate, more warmup_steps or a lower max_grad_norm."
    )
