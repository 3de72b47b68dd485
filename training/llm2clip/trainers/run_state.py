"""What a run has counted and read so far, stored in every checkpoint: a resumed run goes on with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from llm2clip.data import SkipLog
from llm2clip.data.stream_order import Lanes
from llm2clip.data.streams import SampleStream
from llm2clip.trainers.base_config import StageConfig
from llm2clip.utils.files import read_json, write_json
from llm2clip.utils.processes import sum_over_processes
from llm2clip.utils.tables import BEFORE, RECALL

logger = logging.getLogger(__name__)

RUN_STATE = "run_state.json"
TOTALS, SKIPPED, STREAM, INPUTS = "totals", "skipped", "stream", "inputs"
LOSS = "loss"


class NoStepsLeft(Exception):  # noqa: N818
    """All steps of a run are done before the first one of this process."""


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """Read what a checkpoint contains; nothing of one that another Trainer wrote."""
    path = checkpoint / RUN_STATE
    return read_json(path) if path.is_file() else {}


def open_skip_log(args: StageConfig) -> SkipLog | None:
    """Open the list of the samples that this process skips, if `on_error` says so."""
    if getattr(args, "on_error", "raise") == "raise":
        return None
    return SkipLog(Path(str(args.output_dir)) / f"skipped-{args.process_index}.jsonl")


class RunState(TrainerCallback):
    """Counts the losses, the cut captions and the skipped samples of a run, and the rows of its stream.

    Attributes:
        totals, skipped, stream: What is counted; `stream` is None for data sets with random access.
        inputs: What the run reads, by name in words; see [`RunContext.compare_inputs`].
        initial: What was computed before the first step, with which the log begins.
        measure_before: Measures the model before the first step.
    """

    def __init__(
        self, skip_log: SkipLog | None, stream: StreamPosition | None, measure_before: Callable[[], None]
    ) -> None:
        self.totals, self.skipped, self.stream = Totals(), SkippedSamples(skip_log), stream
        self.measure_before = measure_before
        self.inputs: Mapping[str, Any] = {}
        self.initial: Mapping[str, Any] = {}
        self._stored: dict[str, Any] = {}

    @contextmanager
    def resumed(self, checkpoint: Path | None) -> Iterator[None]:
        """Within this context, train from a checkpoint, or from the beginning."""
        self._stored = {} if checkpoint is None else read_run_state(checkpoint)
        if self.stream is None:
            yield
        else:
            with self.stream.resumed(checkpoint, self._stored.get(STREAM)):
                yield

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # The Trainer would go on with the logging_steps, eval_steps, save_steps of the checkpoint.
        state.compute_steps(args, state.max_steps)
        self.totals.begin(self._stored.get(TOTALS, {}), args.device)
        self.skipped.begin(self._stored.get(SKIPPED, []), args.process_index)
        if self.initial and not state.global_step:
            state.log_history.append({**self.initial, "step": 0})

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps > 0:
            raise NoStepsLeft  # the Trainer would make one more
        if not state.global_step:
            self.measure_before()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.totals.end_step()
        if self.stream is not None:
            # The Trainer counts the batches since the resume, of an epoch of max_steps.
            state.epoch = self.stream.rows(state.global_step) / self.stream.stream.num_rows

    def gather(self) -> None:
        """Gather what all processes count, before [`save`]; called in all of them."""
        self.totals.gather()
        self.skipped.gather()

    def save(self, checkpoint: Path, step: int) -> None:
        """Write it into a checkpoint; called in the main process."""
        values = {TOTALS: self.totals.state(), SKIPPED: self.skipped.sizes, INPUTS: dict(self.inputs)}
        if self.stream is not None:
            values[STREAM] = self.stream.state(step)
        write_json(checkpoint / RUN_STATE, values)


def recalls_before(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Find the recalls before the first step in the log of a run, also of a resumed one.

    Returns:
        `before_training_<set>_<recall>`, beside the `eval_<set>_<recall>` of the trained model.
    """
    first = {name: value for entry in history if entry["step"] == 0 for name, value in entry.items()}
    recalls = {name: value for name, value in first.items() if name.startswith("eval_") and RECALL.fullmatch(name)}
    return {name.replace("eval_", BEFORE, 1): value for name, value in recalls.items()}


class Totals:
    """Sums with which a resumed run logs the numbers of an uninterrupted one.

    The Trainer's own sums start at the resume: its next logged loss leaves out the steps between the last entry of the
    log and the checkpoint, and its mean loss is that of the last part of the run.
    """

    def __init__(self) -> None:
        self.begin({}, torch.device("cpu"))

    def begin(self, stored: Mapping[str, Any], device: torch.device) -> None:
        """Begin a run, or continue with what [`state`] returned."""
        # Sums over the steps that are logged, and the number of all steps.
        self.loss, self.steps = stored.get("loss", 0.0), stored.get("steps", 0)
        # Those since the last entry of the log: of the loss, and of its terms by their names in the log.
        unlogged = {LOSS: 0.0, **stored.get("unlogged", {})}
        self.unlogged = {name: torch.tensor(value, device=device) for name, value in unlogged.items()}
        self.unlogged_steps = stored.get("unlogged_steps", 0)
        self.cut_captions, self._new_cut_captions = stored.get("cut_captions", 0), 0

    def end_step(self) -> None:
        """Count an optimizer step."""
        self.steps += 1
        self.unlogged_steps += 1

    def add(self, loss: Tensor, terms: Mapping[str, Tensor], cut_captions: int = 0, filtered: bool = True) -> None:
        """Count a batch of this process: its share of the loss of a step, and its captions that were cut.

        Args:
            terms: The same share of each term of the loss.
            filtered: A loss that is not finite counts as the mean of those since the last entry of the log, as with
                `logging_nan_inf_filter` in the Trainer; so do its terms.
        """
        for name, value in {LOSS: loss, **terms}.items():
            before = self.unlogged.get(name, torch.zeros_like(value))
            instead = before / (1 + self.unlogged_steps)
            self.unlogged[name] = before + (torch.where(loss.isfinite(), value, instead) if filtered else value)
        self._new_cut_captions += cut_captions

    def gather(self) -> None:
        """Replace the sums of this process by those of all processes, which all have to call this."""
        self.unlogged = {name: gather(value[None]).mean() for name, value in self.unlogged.items()}
        self.cut_captions += int(sum_over_processes(torch.tensor(self._new_cut_captions)))
        self._new_cut_captions = 0

    def take(self) -> dict[str, float]:
        """Return the mean loss of the steps since the last entry of the log, and its terms, after [`gather`]."""
        sums = {name: value.item() for name, value in self.unlogged.items()}
        means = {name: value / max(1, self.unlogged_steps) for name, value in sums.items()}
        self.loss += sums[LOSS]
        self.unlogged, self.unlogged_steps = {LOSS: torch.zeros_like(self.unlogged[LOSS])}, 0
        return means

    def mean_loss(self) -> float:
        """Return the mean loss of all steps, after [`gather`]."""
        return (self.loss + self.unlogged[LOSS].item()) / max(1, self.steps)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint contains, after [`gather`]."""
        values = {name: getattr(self, name) for name in ("loss", "steps", "unlogged_steps", "cut_captions")}
        return {**values, "unlogged": {name: value.item() for name, value in self.unlogged.items()}}


class SkippedSamples:
    """Counts the distinct samples in the skip logs of all processes, from the first step of a run to the present one.

    Checkpoints contain the sizes of the logs. A resumed run cuts off what was added after its checkpoint, and one that
    starts anew what another run has left.
    """

    def __init__(self, log: SkipLog | None) -> None:
        self.log = log
        self.sizes: list[int] = []
        self._keys: set[str] = set()

    def begin(self, sizes: list[int], rank: int) -> None:
        """Begin a run, or continue one whose logs had these sizes."""
        if self.log is not None:
            self._keys.clear()
            self.log.rewind(sizes[rank] if rank < len(sizes) else 0)

    def add(self, skipped: list[tuple[str, str]]) -> None:
        """List samples (key and reason) that this process has skipped."""
        if skipped and self.log is not None:
            self.log.add(skipped)

    def count(self) -> int:
        """Count those of all processes, which all have to call this."""
        if self.log is None:
            return 0
        self._keys.update(gather_object(self.log.take_new()))
        return len(self._keys)

    def gather(self) -> None:
        """Gather the sizes of the logs of all processes, which all have to call this."""
        self.sizes = [] if self.log is None else gather_object([self.log.size])


class StreamPosition:
    """Starts a stream at the row that a checkpoint had reached, and knows how many rows were consumed since.

    Args:
        stream: The training set.
        args: The settings of the run.
    """

    def __init__(self, stream: SampleStream, args: StageConfig) -> None:
        self.stream, self.args = stream, args
        # The step at which the process started, and the rows consumed before it.
        self._start = 0, 0

    def rows(self, step: int) -> int:
        """Return how many rows of the stream the run has consumed after a step."""
        args = self.args
        batch = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
        return self._start[1] + (step - self._start[0]) * batch

    @contextmanager
    def resumed(self, checkpoint: Path | None, stored: Mapping[str, Any] | None) -> Iterator[None]:
        """Start the stream where a checkpoint was saved, or at its beginning; the Trainer then skips nothing itself.

        Args:
            stored: What [`state`] returned for the checkpoint.

        Raises:
            ValueError: The shards have changed, or other batches cannot be mixed as before.
        """
        stream, skipped = self.stream, self.args.ignore_data_skip
        stream.batch_size = self.args.per_device_train_batch_size
        stream.lanes = stream.choose_lanes()
        self._start = 0, 0
        if checkpoint is not None:
            step = int(read_json(checkpoint / TRAINER_STATE_NAME)["global_step"])
            self._start = step, self._position(checkpoint, stored)
            self.args.ignore_data_skip = True
        try:
            stream.start = self._start[1]
            yield
        finally:
            self.args.ignore_data_skip = skipped
            stream.start = stream.lanes = None

    def _position(self, checkpoint: Path, stored: Mapping[str, Any] | None) -> int:
        """Return the rows that were consumed before a checkpoint, and cut the stream as it was."""
        if self.args.ignore_data_skip:
            return 0
        if stored is None:
            logger.warning("%s has no position in a stream: training continues from its first row.", checkpoint)
            return 0
        self._refuse_changes(checkpoint, stored)
        self.stream.lanes = lanes = Lanes(**stored["lanes"])
        batch = self.args.world_size * self.args.per_device_train_batch_size
        if batch != lanes.batch and len(self.stream.sources) > 1 and self.stream.mixing == "one_source_per_step":
            raise ValueError(
                f"{checkpoint} is of batches of {lanes.batch} rows on all processes, now there are {batch}: with "
                "mixing: one_source_per_step a run continues with the same batches."
            )
        return int(stored["rows"])

    def _refuse_changes(self, checkpoint: Path, stored: Mapping[str, Any]) -> None:
        """Refuse to go on in shards that are not those of the checkpoint, or in another order."""
        old, new = stored["sources"], self.stream.fingerprints()
        if len(old) != len(new):
            raise ValueError(
                f"{checkpoint} is of {len(old)} sources, but there are {len(new)}; resume with the same ones."
            )
        for (_, before), (name, now) in zip(old, new, strict=True):
            if before != now:
                raise ValueError(
                    f"the files of {name}, or their numbers of rows, are not those of the run of {checkpoint}, so "
                    "that its place in them is lost. Restore them, or add --ignore-data-skip --resume-anyway "
                    "to start over with the rows as they are now, with the trained weights."
                )
        for name, value in self.stream.order_settings().items():
            if value != stored["order"][name]:
                raise ValueError(
                    f"{checkpoint} is of a stream with {name} {stored['order'][name]}, now it is {value}, so that "
                    "rows would come again or never. Resume with the same order, or add --ignore-data-skip "
                    "--resume-anyway to begin a new epoch."
                )
        if stored["seed"] != self.stream.seed:
            raise ValueError(
                f"{checkpoint} is of data_seed {stored['seed']}, not {self.stream.seed}; resume with that."
            )

    def state(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint contains after a step."""
        assert self.stream.lanes is not None
        return {
            "rows": self.rows(step),
            "lanes": self.stream.lanes._asdict(),
            "order": self.stream.order_settings(),
            "seed": self.stream.seed,
            "sources": self.stream.fingerprints(),
        }
