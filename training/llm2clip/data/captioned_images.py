"""Captioned images for stage 2, as a map-style data set and as a stream."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from rich.console import Console
from rich.progress import track
from torch.utils.data import IterableDataset, get_worker_info

from llm2clip.data.records import RowCaptions, SampleError, SkippedSample, caption_id, column_texts
from llm2clip.data.sampling import EpochDataset, SampleIndex, stable_seed
from llm2clip.data.sources import CaptionSource, Columns, Table, load_source, source_columns, top_level
from llm2clip.data.transforms import DEFAULT_MAX_PIXELS, EvalTransform, TrainTransform

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
ROW_NUMBER = "__row_number__"
READ_ROWS = 1000


@dataclass
class SampleMaker:
    """Turns a row into a sample (see `CaptionImageDataset` for the fields and the result)."""

    eval_transform: EvalTransform | None
    train_transform: TrainTransform | None
    seed: int
    on_error: OnError
    max_pixels: int

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', not {self.on_error!r}.")

    def __call__(
        self,
        row: Mapping[str, Any],
        key: str,
        columns: Columns,
        weights: Sequence[float] | None,
        salt: tuple[int | str, ...] | None,
    ) -> dict[str, Any] | SkippedSample:
        """Make the sample of a row.

        Args:
            row: The row.
            key: Its key.
            columns: The columns to read.
            weights: Sampling weight of each caption column.
            salt: With the seed decides caption and crop; None takes the first caption and the evaluation transform.
        """
        try:
            captions = RowCaptions.of(row, key, columns.captions, weights)
            caption = captions.texts[0]
            if salt is not None:
                caption = captions.draw(stable_seed(self.seed, "caption", *salt))
            sample: dict[str, Any] = {
                "key": key,
                "caption": caption,
                "caption_id": caption_id(caption),
                "image_caption_ids": list(dict.fromkeys(map(caption_id, captions.texts))),
            }
            if columns.image is not None and self.eval_transform is not None:
                image = self.eval_transform.decode(row[columns.image], key, self.max_pixels)
                if salt is None or self.train_transform is None:
                    sample["pixel_values"] = self.eval_transform(image, key)
                else:
                    sample["pixel_values"] = self.train_transform(image, stable_seed(self.seed, "crop", *salt))
        except SampleError as error:
            if self.on_error == "raise":
                raise
            return SkippedSample(key, str(error.reason))
        return sample


class CaptionImageDataset(EpochDataset):
    """Images with captions, in random access.

    `dataset[SampleIndex(epoch, index)]` is a training sample: one caption drawn by the sources' weights and a
    random crop, both functions of the seed and the index alone. `dataset[index]` is an evaluation sample: the row's
    first caption and the evaluation transform. A sample is a dict with `key`, `caption`, `caption_id` (see
    `caption_id`), `image_caption_ids` (the distinct ids of all captions of the image) and `pixel_values`, (3, H, W)
    float32.

    Args:
        sources: One or several descriptions of the data; several are concatenated.
        eval_transform: The evaluation transform. None leaves `pixel_values` out and the images unread.
        train_transform: The training transform; without one, training uses the evaluation transform too.
        seed: Seed of caption choice and crops.
        on_error: What a damaged image or a row without caption gives: its error, or a `SkippedSample`, which the
            collator takes out and reports.
        max_pixels: Largest image, width x height.

    Raises:
        FileNotFoundError, SourceError: If a source cannot be read.
        ValueError: If a source is a stream, or `on_error` is neither of the two.
    """

    def __init__(
        self,
        sources: CaptionSource | Sequence[CaptionSource],
        eval_transform: EvalTransform | None,
        train_transform: TrainTransform | None = None,
        seed: int = 0,
        on_error: OnError = "raise",
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        self.sources = [sources] if isinstance(sources, CaptionSource) else list(sources)
        if not self.sources:
            raise ValueError("A data set of captioned images needs at least one source.")
        for source in self.sources:
            if source.streaming:
                raise ValueError(f"{source.path} is set to streaming; use StreamingCaptionImageDataset.")
        self.make_sample = SampleMaker(eval_transform, train_transform, seed, on_error, max_pixels)
        with_images = eval_transform is not None
        self.tables = [load_source(source, with_images) for source in self.sources]
        self.columns = [
            source_columns(source, table, with_images=with_images)
            for source, table in zip(self.sources, self.tables, strict=True)
        ]
        self._starts = np.cumsum([0, *map(len, self.tables)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no sample {index} among {len(self)}.")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, index - int(self._starts[number])

    def _key(self, number: int, position: int, row: Mapping[str, Any]) -> str:
        column = self.columns[number].key
        if column is not None and row[column] is not None:
            return str(row[column])
        return str(position) if len(self.sources) == 1 else f"{self.sources[number].path}:{position}"

    def __getitem__(self, index: SampleIndex | int) -> dict[str, Any] | SkippedSample:
        position = index.index if isinstance(index, SampleIndex) else int(index)
        number, offset = self._locate(position)
        row = self.tables[number][offset]
        return self.make_sample(
            row,
            self._key(number, offset, row),
            self.columns[number],
            self.sources[number].caption_weights,
            (index.epoch, position) if isinstance(index, SampleIndex) else None,
        )


class StreamingCaptionImageDataset(IterableDataset):
    """Images with captions, read once per epoch in a shuffled stream.

    Samples are those of `CaptionImageDataset`; caption and crop are functions of seed, epoch and key. Files are
    shared out over ranks and DataLoader workers; where there are fewer files than ranks, every rank reads all and
    keeps its share. This rank's part is already taken here: do not let accelerate shard the loader again.
    Rows without a key column are named by their number in the stream, after `rank-worker-` if there are several.

    Args:
        source: The description of the data.
        eval_transform: The evaluation transform. None leaves `pixel_values` out.
        train_transform: The training transform; without one, training uses the evaluation transform too.
        training: Draw captions and crops; if False, take first captions and the evaluation transform, in order.
        seed: Seed of order, caption choice and crops.
        shuffle_buffer: Number of rows held for shuffling (the order of the files is shuffled too); 0 keeps the order.
        rank: This process.
        world_size: Number of processes.
        repeat: Begin anew at the end, with the order of the next epoch, so that no rank runs out before another;
            for training by number of steps.
        on_error: As in `CaptionImageDataset`.
        max_pixels: Largest image, width x height.
    """

    def __init__(
        self,
        source: CaptionSource,
        eval_transform: EvalTransform | None,
        train_transform: TrainTransform | None = None,
        training: bool = True,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = False,
        on_error: OnError = "raise",
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be within 0 and world_size - 1, but is {rank} of {world_size}.")
        if not source.streaming:
            raise ValueError(f"{source.path} is not set to streaming; use CaptionImageDataset or streaming: true.")
        self.source = source
        self.make_sample = SampleMaker(eval_transform, train_transform, seed, on_error, max_pixels)
        with_images = eval_transform is not None
        self.table = load_source(source, with_images)
        self.columns = source_columns(source, self.table, with_images=with_images)
        self.training = training
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer if training else 0
        self.rank = rank
        self.world_size = world_size
        self.repeat = repeat
        # Shared memory, so that workers which persist over epochs see the new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch of the next pass."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self._epoch.fill_(epoch)

    def _stream(self, epoch: int) -> datasets.IterableDataset:
        stream = self.table
        if self.columns.key is None:
            stream = stream.map(_add_row_number, with_indices=True)
        if self.shuffle_buffer:
            stream = stream.shuffle(seed=stable_seed(self.seed, "order", epoch), buffer_size=self.shuffle_buffer)
        if self.world_size > 1:
            stream = split_dataset_by_node(stream, self.rank, self.world_size)
        return stream

    def _key(self, row: Mapping[str, Any]) -> str:
        if self.columns.key is not None:
            return str(row[self.columns.key])
        worker = get_worker_info()
        if self.world_size == 1 and (worker is None or worker.num_workers == 1):
            return str(row[ROW_NUMBER])
        return f"{self.rank}-{0 if worker is None else worker.id}-{row[ROW_NUMBER]}"

    def __iter__(self) -> Iterator[dict[str, Any] | SkippedSample]:
        for epoch in itertools.count(self.epoch):
            empty = True
            for row in self._stream(epoch):
                empty = False
                key = self._key(row)
                salt = (epoch, key) if self.training else None
                yield self.make_sample(row, key, self.columns, self.source.caption_weights, salt)
            if empty or not self.repeat:
                return


def _add_row_number(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {**row, ROW_NUMBER: number}


def _load_captions(source: CaptionSource) -> Table:
    table = load_source(source, with_images=False)
    return table.select_columns(list(dict.fromkeys(top_level(table, name) for name in source.caption_columns)))


def caption_batches(
    source: CaptionSource, rank: int = 0, world_size: int = 1, show_progress: bool = True
) -> Iterator[list[str]]:
    """All caption texts of a source, those of a thousand rows at a time, in order: by row, column and list entry.

    Args:
        source: The source, a stream too.
        rank: This process, of several that take a part of the rows each.
        world_size: Number of such processes.
        show_progress: Show a progress bar where standard error is a terminal.
    """
    table = _load_captions(source)
    if world_size > 1:
        table = split_dataset_by_node(table, rank, world_size)
    console = Console(stderr=True)
    batches = track(
        table.iter(READ_ROWS),
        description=f"Captions of {source.path}",
        total=-(-len(table) // READ_ROWS) if isinstance(table, datasets.Dataset) else None,
        console=console,
        disable=not (show_progress and rank == 0 and console.is_terminal),
    )
    num_empty = 0
    for batch in batches:
        found: list[str] = []
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            texts = [text for column in source.caption_columns for text in column_texts(row, column)]
            found += texts
            num_empty += not texts
        yield found
    if num_empty:
        logger.warning("%d rows of %s have no caption.", num_empty, source.path)


def distinct_captions(sources: CaptionSource | Sequence[CaptionSource], show_progress: bool = True) -> list[str]:
    """Every different caption text of some sources: what an embedding cache for them must hold.

    Texts are compared as they are, but for surrounding white space: another spelling is another embedding.

    Args:
        sources: One or several sources, streams too.
        show_progress: Show a progress bar where standard error is a terminal.

    Returns:
        The texts in order of first appearance: by source, row, caption column and list entry.
    """
    captions: dict[str, None] = {}
    for source in [sources] if isinstance(sources, CaptionSource) else sources:
        for texts in caption_batches(source, show_progress=show_progress):
            captions.update(dict.fromkeys(texts))
    return list(captions)
