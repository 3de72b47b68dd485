"""The place of a run in its streams: kept in every checkpoint, and restored without reading what was trained on."""

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

from llm2clip.data.sample_stream import SampleStream
from llm2clip.data.stream_place import Layout, Place
from llm2clip.trainers.base_config import StageConfig
from llm2clip.trainers.checkpoints import unlist_result
from llm2clip.trainers.run_folder import run_folder
from llm2clip.trainers.stop_on_sigterm import stopped_by_sigterm
from llm2clip.utils.files import read_json, write_json

if TYPE_CHECKING:
    from llm2clip.trainers.base_trainer import StageTrainer

logger = logging.getLogger(__name__)

PLACE_FILE = "stream.json"
FORMAT_VERSION = 1


class StreamResume(TrainerCallback):
    """Starts a stream at the place of a checkpoint, stores its place in checkpoints, and counts its epochs.

    Args:
        stream: The training set.
        args: The settings of the run.
    """

    def __init__(self, stream: SampleStream, args: StageConfig) -> None:
        self.stream, self.args = stream, args

    def _layout(self) -> Layout:
        return Layout(
            world_size=self.args.world_size,
            workers=max(1, self.args.dataloader_num_workers),
            batch_size=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            buffers=tuple(self.stream.buffers),
        )

    @contextmanager
    def resumed(self, checkpoint: str | None) -> Iterator[None]:
        """Start the stream where a checkpoint was saved, or at its beginning; the Trainer then skips nothing itself.

        Raises:
            ValueError: The shards have changed, or other readers cannot go on; see [`Place`].
        """
        place, skipped = Place(), self.args.ignore_data_skip
        if checkpoint is not None:
            place = self._stored(Path(checkpoint))
            self.args.ignore_data_skip = True
        try:
            self.stream.place = place.with_layout(self._layout())
            yield
        finally:
            self.args.ignore_data_skip = skipped
            self.stream.place = None

    def _stored(self, checkpoint: Path) -> Place:
        step = int(read_json(checkpoint / TRAINER_STATE_NAME)["global_step"])
        path = checkpoint / PLACE_FILE
        if self.args.ignore_data_skip or not path.is_file():
            if not self.args.ignore_data_skip:
                logger.warning("%s is missing: training goes on from the first row of the stream.", path)
            return Place(step=step)
        values = read_json(path)
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path} has version {values.get('format_version')}, but {FORMAT_VERSION} is expected.")
        self._refuse_changes(path, values)
        place = Place.from_json(values).at(step)
        continued = place.with_layout(self._layout())
        if continued is not place:
            self._report(place.layouts[-1], continued.layouts[-1])
        return place

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
        if values["seed"] != self.stream.seed:
            raise ValueError(f"{path} is of data_seed {values['seed']}, not {self.stream.seed}; resume with that.")

    def _report(self, old: Layout, new: Layout) -> None:
        if self.stream.num_rows is None:
            raise ValueError(
                f"the stream was read by {_readers(old)}, and cannot be continued by {_readers(new)}, because the "
                "numbers of its rows are unknown. Resume with as many, or embed it, which counts its rows."
            )
        message = "%s read the stream until step %d, and %s do from there: the rows left are shared anew."
        logger.info(message, _readers(old), new.step, _readers(new))

    def save(self, checkpoint: Path, step: int) -> None:
        """Store the place after a step in a checkpoint."""
        assert self.stream.place is not None
        values = {"format_version": FORMAT_VERSION, "seed": self.stream.seed, "sources": self.stream.fingerprints()}
        write_json(checkpoint / PLACE_FILE, {**values, **self.stream.place.at(step).to_json()})

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # The Trainer counts the batches since the resume, of an epoch of max_steps.
        if self.stream.place is not None:
            state.epoch = epochs(self.stream.place.at(state.global_step), self.stream.num_rows, state.max_steps)


def epochs(place: Place, num_rows: int | None, max_steps: int) -> float:
    """Return the passes over the data until a place, or, if its number of rows is unknown, the share of all steps."""
    if num_rows is None:
        return place.step / max_steps
    pairs = zip(place.layouts, place.steps(), strict=True)
    return sum(_rows_of_step(layout) * steps for layout, steps in pairs) / num_rows


def _rows_of_step(layout: Layout) -> int:
    return layout.world_size * layout.batch_size * layout.accumulation


def _readers(layout: Layout) -> str:
    return f"{layout.world_size} processes with {layout.workers} DataLoader workers each"


@contextmanager
def begun(trainer: StageTrainer, choose: Callable[[], str | None]) -> Iterator[str | None]:
    """Enter the folder of a trainer's run (see [`run_folder`]); yield the checkpoint, at whose place its stream is.

    SIGTERM ends it with a checkpoint; see [`StopOnSigterm`].

    Args:
        choose: Returns the checkpoint; called with the folder locked.
    """
    data = trainer.train_dataset
    is_stream = isinstance(data, IterableDataset)
    with run_folder(trainer.args, choose, is_stream, not is_stream or isinstance(data, SampleStream)) as checkpoint:
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
        SourceError: There is nothing to read for some of the workers.
    """
    stream.require_files(options["num_workers"])
    # A resumed run draws as many random numbers of torch's own generator as an unbroken one: none here.
    return DataLoader(stream, batch_size, drop_last=True, generator=torch.Generator(), **options)
