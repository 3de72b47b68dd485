"""The rows of its stream that a run has consumed: kept in every checkpoint, from which it goes on without a replay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from llm2clip.data.opened_table import SourceError
from llm2clip.data.stream_order import Lanes
from llm2clip.data.streams import SampleStream
from llm2clip.trainers.base_config import StageConfig
from llm2clip.trainers.checkpoints import unlist_result
from llm2clip.trainers.run_folder import run_folder
from llm2clip.trainers.stop_on_sigterm import stopped_by_sigterm
from llm2clip.utils.files import read_json, write_json

if TYPE_CHECKING:
    from llm2clip.trainers.base_trainer import StageTrainer

logger = logging.getLogger(__name__)

STATE_FILE = "stream.json"
FORMAT_VERSION = 1


class StreamResume(TrainerCallback):
    """Starts a stream at the row that a checkpoint had reached, stores that in checkpoints, and counts epochs.

    Args:
        stream: The training set.
        args: The settings of the run.
    """

    def __init__(self, stream: SampleStream, args: StageConfig) -> None:
        self.stream, self.args = stream, args
        # The step at which the process started, and the rows consumed before it.
        self._start = 0, 0

    @property
    def _rows_of_step(self) -> int:
        args = self.args
        return args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps

    def rows(self, step: int) -> int:
        """Return how many rows of the stream the run has consumed after a step."""
        return self._start[1] + (step - self._start[0]) * self._rows_of_step

    @contextmanager
    def resumed(self, checkpoint: str | None) -> Iterator[None]:
        """Start the stream where a checkpoint was saved, or at its beginning; the Trainer then skips nothing itself.

        Raises:
            ValueError: The shards have changed, or other batches cannot be mixed as before.
        """
        stream, skipped = self.stream, self.args.ignore_data_skip
        stream.batch_size = self.args.per_device_train_batch_size
        stream.lanes = stream.choose_lanes(self.args.dataloader_num_workers)
        self._start = 0, 0
        if checkpoint is not None:
            self._start = self._stored(Path(checkpoint))
            self.args.ignore_data_skip = True
        try:
            stream.start = self._start[1]
            yield
        finally:
            self.args.ignore_data_skip = skipped
            stream.start = stream.lanes = None

    def _stored(self, checkpoint: Path) -> tuple[int, int]:
        """Return the step of a checkpoint and the rows before it, and cut the stream as it was."""
        step = int(read_json(checkpoint / TRAINER_STATE_NAME)["global_step"])
        path = checkpoint / STATE_FILE
        if self.args.ignore_data_skip or not path.is_file():
            if not self.args.ignore_data_skip:
                logger.warning("%s is missing: training continues from the first row of the stream.", path)
            return step, 0
        values = read_json(path)
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path} has version {values.get('format_version')}, but {FORMAT_VERSION} is expected.")
        self._refuse_changes(path, values)
        self.stream.lanes = lanes = Lanes(**values["lanes"])
        batch = self.args.world_size * self.args.per_device_train_batch_size
        if batch != lanes.batch and len(self.stream.sources) > 1 and self.stream.mixing == "one_source_per_step":
            raise ValueError(
                f"{path} is of batches of {lanes.batch} rows on all processes, now there are {batch}: with mixing: "
                "one_source_per_step a run continues with the same batches."
            )
        if self.stream.num_rows is None:
            logger.warning(
                "the rows of the stream are not counted: a new epoch begins, so that rows of the last one come again."
            )
        return step, int(values["rows"])

    def _refuse_changes(self, path: Path, values: dict[str, Any]) -> None:
        """Refuse to go on in shards that are not those of the checkpoint, or in another order."""
        old, new = values["sources"], self.stream.fingerprints()
        if len(old) != len(new):
            raise ValueError(f"{path} is of {len(old)} sources, but there are {len(new)}; resume with the same ones.")
        for (_, before), (name, now) in zip(old, new, strict=True):
            if before != now:
                raise ValueError(
                    f"the files of {name}, or their numbers of rows, are not those of the run that {path} is of, so "
                    "that its place in them is lost. Restore them, or add --ignore-data-skip --resume-anyway "
                    "to start over with the rows as they are now, with the trained weights."
                )
        for name, value in self.stream.order_settings().items():
            if value != values["order"][name]:
                raise ValueError(
                    f"{path} is of a stream with {name} {values['order'][name]}, now it is {value}, so that rows "
                    "would come again or never. Resume with the same order, or add --ignore-data-skip --resume-anyway "
                    "to begin a new epoch."
                )
        if values["seed"] != self.stream.seed:
            raise ValueError(f"{path} is of data_seed {values['seed']}, not {self.stream.seed}; resume with that.")

    def save(self, checkpoint: Path, step: int) -> None:
        """Store the number of rows after a step in a checkpoint."""
        assert self.stream.lanes is not None
        values = {"format_version": FORMAT_VERSION, "rows": self.rows(step), "lanes": self.stream.lanes._asdict()}
        values |= {
            "order": self.stream.order_settings(),
            "seed": self.stream.seed,
            "sources": self.stream.fingerprints(),
        }
        write_json(checkpoint / STATE_FILE, values)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # The Trainer counts the batches since the resume, of an epoch of max_steps.
        rows = self.stream.num_rows
        state.epoch = state.global_step / state.max_steps if rows is None else self.rows(state.global_step) / rows


@contextmanager
def resumed_run(trainer: StageTrainer, choose: Callable[[], str | None]) -> Iterator[str | None]:
    """Enter the folder of a trainer's run (see [`run_folder`]); yield the checkpoint, at whose place its stream is.

    SIGTERM ends it with a checkpoint; see [`StopOnSigterm`].

    Args:
        choose: Returns the checkpoint; called with the folder locked.
    """
    data = trainer.train_dataset
    elastic = not isinstance(data, IterableDataset) or isinstance(data, SampleStream)
    with run_folder(trainer.args, choose, elastic) as checkpoint:
        # Another number of processes may have changed it.
        trainer._train_batch_size = trainer.args.train_batch_size
        unlist_result(trainer.args)
        place = nullcontext() if trainer.stream is None else trainer.stream.resumed(checkpoint)
        with place, stopped_by_sigterm(trainer):
            trainer.inputs.compare(checkpoint)
            yield checkpoint


def stream_loader(stream: SampleStream, batch_size: int, options: dict[str, Any]) -> DataLoader:
    """Make the loader of a stream, which is split by process already: accelerate must not split it again.

    Args:
        batch_size: Rows in a batch of a process.
        options: Further arguments of the loader.

    Raises:
        SourceError: There is nothing to read for some of the workers, or the stream has fewer rows than one batch of
            all processes, in which rows would be each other's negatives.
    """
    stream.batch_size, rows = batch_size, stream.num_rows
    if rows is not None and rows < batch_size * stream.world_size:
        names = " + ".join(source.name for source in stream.sources)
        raise SourceError(
            f"the stream {names} has {rows} rows, fewer than one batch of {batch_size * stream.world_size} "
            f"({batch_size} on each of {stream.world_size} processes). Lower per_device_train_batch_size, or add data."
        )
    stream.require_files(options["num_workers"])
    # A resumed run draws as many random numbers of torch's own generator as an unbroken one: none here.
    return DataLoader(stream, batch_size, drop_last=True, generator=torch.Generator(), **options)
