"""What may end a run at a step, for all processes alike: values that are not finite, and SIGTERM."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2clip.utils.embeddings import NonFiniteError, finite_rows
from llm2clip.utils.logs import shortened
from llm2clip.utils.processes import on_any_process, process_state, world_size
from llm2clip.utils.stopping import TERMINATED, StoppedError, on_sigterm

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


class StepGuard(TrainerCallback):
    """Checks every optimizer step before it changes the weights, and ends a run after SIGTERM, in all processes alike.

    A step is broken if the embeddings or the loss of one of its batches (of any accumulation step, on any process) or
    the gradients have a NaN or an infinite value. The first `allowed` broken steps are left out, which the log counts
    as `skipped_steps`; a resumed run goes on counting. The next one raises a [`NonFiniteError`]. With a loss scale
    (fp16), infinite gradients are how the scale finds its size: they count only at a scale of 1.

    After SIGTERM in any process, a checkpoint is saved at the end of a step, and [`StoppedError`] raised in all. The
    callback of transformers (`enable_jit_checkpoint`) does not fit: every process decides by a clock of its own, so
    that two can stop at different steps and wait for each other; it counts a file as part of the checkpoint that it
    deletes afterwards; and the run ends as one that is complete.

    Both are one reduction over the processes, of two flags. It starts with the loss of a step and runs beside the
    backward pass. Gradients need none: those that DDP has averaged, and the norm over the shards of FSDP, are the same
    in all processes.

    Args:
        allowed: How many broken steps are left out.
        grace_seconds: How long after SIGTERM the process ends in any case.
        output_dir: Folder of the checkpoints.
        log: Logs values, in all processes.
    """

    def __init__(
        self, allowed: int, grace_seconds: float, output_dir: str, log: Callable[[dict[str, float]], None]
    ) -> None:
        self.allowed, self.grace_seconds, self.output_dir, self.log = allowed, grace_seconds, output_dir, log
        self.skipped = 0
        # The norm of the gradients of this step, where they are clipped.
        self.grad_norm: Tensor | float | None = None
        self.received = self._stopping = False
        self._observed: list[Observed] = []
        self._flags: Tensor | None = None
        self._reduction: Any = None
        self._deadline: threading.Timer | None = None

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Within this context, SIGTERM ends the run at the end of a step."""
        self.received = self._stopping = False
        self._deadline = threading.Timer(self.grace_seconds, self._give_up)
        self._deadline.daemon = True
        try:
            with on_sigterm(self.receive):
                yield
            if self.received:  # after the last step
                raise StoppedError
        finally:
            self._deadline.cancel()

    def receive(self) -> None:
        """Take note of the signal."""
        if not self.received and self._deadline is not None:
            self.received = True
            self._deadline.start()

    def _give_up(self) -> None:
        """End the process at the deadline, wherever it is: in a long step, an evaluation or a save."""
        logger.warning(
            "SIGTERM came %.0f seconds ago, and no checkpoint has been completed since; the one before it is the "
            "newest in %s, from which --resume goes on. --grace-seconds gives more time.",
            self.grace_seconds,
            self.output_dir,
        )
        os._exit(TERMINATED)

    def observe(self, observed: Observed, is_last: bool) -> None:
        """Take note of a batch whose gradients the next optimizer step contains.

        Args:
            is_last: Whether it is the last batch of that step.
        """
        self._observed.append(observed)
        if not is_last:
            return
        broken = torch.stack([batch.is_broken() for batch in self._observed]).any()
        flags = torch.stack([broken, torch.tensor(self.received, device=broken.device)])
        self._flags = flags.to(torch.int32)
        if world_size() > 1:
            self._reduction = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, async_op=True)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._observed, self._flags, self._reduction = [], None, None
        self.skipped = max((int(entry.get(SKIPPED_STEPS, 0)) for entry in state.log_history), default=0)

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        observed, self._observed = self._observed, []
        is_broken, self._stopping = self._agreed()
        norm, self.grad_norm = self.grad_norm, None
        if not is_broken and not self._gradients_are_broken(model, optimizer, norm):
            return
        what = describe(gather_object([batch.report() for batch in observed]))
        message = f"step {state.global_step + 1}: {what}."
        if self.skipped >= self.allowed:
            skipped = f" {self.skipped} steps were skipped before it." if self.skipped else ""
            raise NonFiniteError(f"{message}{skipped} {CURE}")
        self.skipped += 1
        logger.warning("%s The step is skipped, number %d of %d.", message, self.skipped, self.allowed)
        # An optimizer leaves out parameters without gradient.
        optimizer.zero_grad(set_to_none=True)
        self.log({SKIPPED_STEPS: self.skipped})

    def _agreed(self) -> tuple[bool, bool]:
        """Whether something is broken on any process, and whether one was sent SIGTERM."""
        if self._reduction is not None:
            self._reduction.wait()
        if self._flags is None:  # a loss of others, which observes nothing
            return False, on_any_process(torch.tensor(self.received, device=process_state().device))
        broken, stopping = self._flags.tolist()
        self._flags = self._reduction = None
        return bool(broken), bool(stopping)

    def _gradients_are_broken(self, model: nn.Module, optimizer: Any, norm: Tensor | float | None) -> bool:
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1:
            return False
        if norm is None:
            grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            is_sharded = any(isinstance(grad, DTensor) for grad in grads)
            broken = ~largest(grads).isfinite() if grads else torch.tensor(False)
            return on_any_process(broken) if is_sharded else bool(broken)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return not math.isfinite(float(norm))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._stopping:
            control.should_save = control.should_training_stop = True
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


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """Compute the largest absolute value of this process's parts of tensors; NaN if there is one."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return get_total_norm([part.detach() for part in parts if part.numel()], norm_type=math.inf)


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
    if not weights and not sharded:
        return
    broken = ~largest(weights.values()).isfinite() if weights else torch.tensor(False)
    if not (on_any_process(broken.to(process_state().device)) if sharded else bool(broken)):
        return
    names = [name for name, weight in weights.items() if weight.numel() and not largest([weight]).isfinite()]
    where = f" ({shortened(names)})" if names else ""
    raise NonFiniteError(
        f"after step {step}, {what} are NaN or infinite{where}, and are not saved. Go on from an earlier "
        "checkpoint with a lower learning_rate, more warmup_steps or a lower max_grad_norm."
    )
