"""The exponential moving average (EMA) of the trained weights over the optimizer steps, given by its half-life."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback

from llm2clip.trainers.base_config import StageConfig
from llm2clip.trainers.sharding import is_sharded
from llm2clip.trainers.step_guard import require_finite
from llm2clip.utils.settings import refuse
from modeling_llm2clip.modeling_llm2clip_utils import apply_umask

logger = logging.getLogger(__name__)

AVERAGE_FILE = "ema.safetensors"


class WeightAverage(TrainerCallback):
    """Averages the trained weights in float32: `average = d * average + (1 - d) * weights` after each optimizer step.

    The decay `d` is `0.5 ** (1 / half_life)`, and the average begins with the weights before the first step. A skipped
    step counts as one that left the weights as they were. At the end of training the model gets the averaged weights.

    `AveragedModel` of torch would copy the frozen LLM too; this uses its rule on the trained weights alone. Under DDP
    all processes hold the same weights, and so the same average.

    Args:
        model: Returns the model, without wrappers.
        half_life: Optimizer steps after which the weights of a step have half of their share left.
        resume_anyway: Begin with the weights of a checkpoint that has no average.

    Attributes:
        in_model: Whether the model has the averaged weights now: in evaluation, and after training.
        checkpoint: The checkpoint that the next training resumes from.
    """

    def __init__(self, model: Callable[[], nn.Module], half_life: float, resume_anyway: bool = False) -> None:
        self.model, self.half_life, self.resume_anyway = model, half_life, resume_anyway
        self.checkpoint: Path | None = None
        self.in_model = False
        self._average: dict[str, Tensor] = {}
        self._update = get_ema_multi_avg_fn(0.5 ** (1 / half_life))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_model = False
        checkpoint, self.checkpoint = self.checkpoint, None
        if checkpoint is None:
            self._begin()
        else:
            self.restore(checkpoint)

    # Later than `on_optimizer_step`, where stage 2 limits the logit scale.
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        current = [weight.float() for weight in self._trained().values()]
        self._update(list(self._average.values()), current, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(self._average)
        self.in_model, self._average = True, {}

    @torch.no_grad()
    def run(self, **inputs: Any) -> Any:
        """Run the model with the averaged weights, in evaluation mode; only during training.

        The average takes the place of the weights as it is: no model is copied.
        """
        model = self.model()
        # In their order, since stored states of frozen layers give the layers after them other names.
        pairs = zip(self._trained().items(), self._average.values(), strict=True)
        weights = {name: average.to(weight.dtype) for (name, weight), average in pairs}
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            return functional_call(model, weights, (), inputs)
        finally:
            for module in training:
                module.training = True

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context, the model has the averaged weights; then it has its own again, bit for bit."""
        if self.in_model or not self._average:
            yield
            return
        before = {name: weight.clone() for name, weight in self._trained().items()}
        self._write(self._average)
        self.in_model = True
        try:
            yield
        finally:
            self._write(before)
            self.in_model = False

    def save(self, checkpoint: Path, step: int) -> None:
        """Write the average after a step into a checkpoint.

        Raises:
            NonFiniteError: An average is NaN or infinite.
        """
        require_finite(self._average, step, sharded=False, what="averages of weights")
        save_file(self._average, checkpoint / AVERAGE_FILE, metadata={"format": "pt"})
        apply_umask(checkpoint / AVERAGE_FILE)

    def restore(self, checkpoint: Path) -> None:
        """Continue with the average in a checkpoint, whose weights the model has.

        Raises:
            ValueError: The checkpoint has no average, or one of other weights.
        """
        self._begin()
        path = checkpoint / AVERAGE_FILE
        if not path.is_file():
            if not self.resume_anyway:
                raise ValueError(
                    f"{checkpoint} has no {AVERAGE_FILE}, since its run did not set ema_half_life; leave it unset, or "
                    "add --resume-anyway to begin the average with the weights of the checkpoint."
                )
            logger.warning("%s has no %s: the average begins with its weights.", checkpoint, AVERAGE_FILE)
            return
        saved = load_file(path)
        shapes, expected = ({name: x.shape for name, x in weights.items()} for weights in (saved, self._average))
        if shapes != expected:
            differing = sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name))
            raise ValueError(
                f"{path} does not contain the averages of the weights that this run trains ({differing[0]}, ...); "
                "resume with the settings of the original run."
            )
        for name, average in self._average.items():
            average.copy_(saved[name])

    def _begin(self) -> None:
        options: dict[str, Any] = {"copy": True, "memory_format": torch.contiguous_format}
        self._average = {name: weight.to(torch.float32, **options) for name, weight in self._trained().items()}

    def _trained(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.model().named_parameters() if weight.requires_grad}

    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._trained().items():
            weight.copy_(values[name])


def average_of(args: StageConfig, accelerator: Accelerator, model: Callable[[], nn.Module]) -> WeightAverage | None:
    """Make the average that the settings ask for, if any; see [`WeightAverage`].

    Raises:
        ValueError: The model is divided over processes.
    """
    if args.ema_half_life is None:
        return None
    if is_sharded(accelerator):
        refuse(args, ["ema_half_life"], "FSDP and DeepSpeed give no process the whole weights, as DDP does")
    return WeightAverage(model, args.ema_half_life, args.resume_anyway)
