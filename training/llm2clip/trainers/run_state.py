"""What a run has counted and read so far, stored in every checkpoint: a resumed run goes on with it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from llm2clip.command_line.processes import sum_over_processes
from llm2clip.command_line.tables import BEFORE, RECALL
from llm2clip.data.stream_order import Lanes
from llm2clip.data.streams import SampleStream
from llm2clip.files.atomic import read_json, write_json
from llm2clip.files.library_errors import wrap_read_errors
from llm2clip.trainers.base_config import StageConfig

logger = logging.getLogger(__name__)

RUN_STATE = "run_state.json"
CUT_CAPTIONS, STREAM, INPUTS = "cut_captions", "stream", "inputs"


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """Read what a checkpoint contains; nothing of one that another Trainer wrote."""
    path = checkpoint / RUN_STATE
    return read_json(path) if path.is_file() else {}


class RunState(TrainerCallback):
    """Counts captions that were cut, samples that were skipped, and rows of a stream that were consumed.

    Args:
        skip_log: The list of the samples that this process skips, which a resumed run continues.
        stream: The place in a stream; None for data sets with random access.
        measure_before: Measures the model before the first step.

    Attributes:
        cut_captions: Captions that were cut in all processes, up to the last [`counts`].
    """

    def __init__(self, skip_log: SkipLog, stream: StreamPosition | None, measure_before: Callable[[], None]) -> None:
        self.skip_log, self.stream, self.measure_before = skip_log, stream, measure_before
        self.cut_captions = self._newly_cut = 0
        self._skipped: set[str] = set()

    @contextmanager
    def resumed(self, checkpoint: Path | None) -> Iterator[None]:
        """Within this context, train from a checkpoint, or from the beginning."""
        stored = {} if checkpoint is None else read_run_state(checkpoint)
        self.cut_captions, self._newly_cut = stored.get(CUT_CAPTIONS, 0), 0
        self._skipped.clear()
        self.skip_log.open(continued=checkpoint is not None)
        with contextlib.nullcontext() if self.stream is None else self.stream.resumed(checkpoint, stored.get(STREAM)):
            yield

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # The Trainer would go on with the logging_steps, eval_steps, save_steps of the checkpoint.
        state.compute_steps(args, state.max_steps)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.global_step:
            self.measure_before()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.stream is not None:
            # The Trainer counts the batches since the resume, of an epoch of max_steps.
            state.epoch = self.stream.rows(state.global_step) / self.stream.stream.num_rows

    def count_batch(self, skipped: Sequence[tuple[str, str]], cut_captions: int) -> None:
        """Count what is missing in a batch of this process: the keys and reasons of samples, and captions."""
        self._newly_cut += cut_captions
        if skipped:
            self.skip_log.add(skipped)

    def counts(self) -> dict[str, int]:
        """Count what all processes have cut, and the distinct samples that they skipped; called in all of them."""
        self.cut_captions += int(sum_over_processes(torch.tensor(self._newly_cut)))
        self._newly_cut = 0
        self._skipped.update(gather_object(self.skip_log.take_new()))
        counts = {"cut_captions": self.cut_captions, "skipped_samples": len(self._skipped)}
        return {name: count for name, count in counts.items() if count}

    def save(self, checkpoint: Path, step: int, inputs: Mapping[str, Any]) -> None:
        """Write it into a checkpoint, after [`counts`], with [`RunContext.inputs`]; called in the main process."""
        values: dict[str, Any] = {CUT_CAPTIONS: self.cut_captions, INPUTS: inputs}
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
        self._validate_order(checkpoint, stored)
        self.stream.lanes = lanes = Lanes(**stored["lanes"])
        batch = self.args.world_size * self.args.per_device_train_batch_size
        if batch != lanes.batch and len(self.stream.sources) > 1 and self.stream.mixing == "one_source_per_step":
            raise ValueError(
                f"{checkpoint} is of batches of {lanes.batch} rows on all processes, now there are {batch}: with "
                "mixing: one_source_per_step a run continues with the same batches."
            )
        return int(stored["rows"])

    def _validate_order(self, checkpoint: Path, stored: Mapping[str, Any]) -> None:
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


class SkipLog:
    """Log of skipped rows: a file with one JSON line of key and reason per row.

    An existing file is continued, so that a resumed run does not list a row twice. Each process needs its own file,
    which the first entry creates.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._known: set[str] | None = None
        self._unreported: list[str] = []

    @property
    def _keys(self) -> set[str]:
        # On first use, since a run that starts anew does not read the file of another one.
        if self._known is None:
            content = self.path.read_bytes() if self.path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):  # the last line is incomplete: the run was killed
                os.truncate(self.path, len(whole))
            with wrap_read_errors(self.path, ValueError):
                self._unreported = [str(json.loads(line)["key"]) for line in whole.splitlines()]
            self._known = set(self._unreported)
        return self._known

    def open(self, continued: bool) -> None:
        """Begin a run: continue the file, or delete that of another run."""
        if not continued:
            self.path.unlink(missing_ok=True)
        self._known, self._unreported = None, []

    def add(self, skipped: Iterable[tuple[str, str]]) -> None:
        """Append the (key, reason) pairs with a new key."""
        new = dict[str, str]()
        for key, reason in skipped:
            if key not in self._keys:
                new.setdefault(key, reason)
        if not new:
            return
        if not self._keys:
            logger.warning("Skipping rows that cannot be used; they are listed in %s.", self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for key, reason in new.items():
                file.write(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")
        self._keys.update(new)
        self._unreported += new

    def take_new(self) -> list[str]:
        """Return the keys that were added since the last call; at first, those of the existing file too.

        Another process reads a row in another epoch, and lists it in its own file: only the keys of all processes
        together say how many rows there are.
        """
        _ = self._keys
        taken, self._unreported = self._unreported, []
        return taken
