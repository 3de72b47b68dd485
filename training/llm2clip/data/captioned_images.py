"""Data sets of captioned images for stage 2: map-style and streaming."""

from __future__ import annotations

import itertools
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import fsspec.asyn
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from llm2clip.data.records import OnError, RowCaptions, SkippedSample, caption_id, caption_keys, column_texts
from llm2clip.data.sampling import ConcatenatedTables, SampleIndex, stable_seed
from llm2clip.data.sources import (
    CaptionSource,
    Columns,
    SourceError,
    load_source,
    row_batches,
    source_columns,
    top_level,
)
from llm2clip.data.streams import StreamReader, StreamRow
from llm2clip.data.transforms import EvalTransform, TrainTransform
from llm2clip.utils.progress import progress_bar
from llm2clip.utils.settings import check_choices
from modeling_llm2clip.image_decoding_llm2clip import DEFAULT_MAX_PIXELS, SampleError

logger = logging.getLogger(__name__)


@dataclass
class SampleMaker:
    """Makes samples of rows; see [`CaptionImageDataset`] for the fields and the samples."""

    eval_transform: EvalTransform | None
    train_transform: TrainTransform | None
    seed: int
    on_error: OnError
    max_pixels: int

    def __post_init__(self) -> None:
        check_choices(self)

    def __call__(
        self, row: Mapping[str, Any], key: str, columns: Columns, salt: tuple[int | str, ...] | None
    ) -> dict[str, Any] | SkippedSample:
        """Make the sample of a row, or a `SkippedSample` if it cannot be used and `on_error` is `skip`.

        Seed and `salt` determine caption and crop; None takes the first caption and the evaluation transform.
        """
        try:
            captions = RowCaptions.of(row, key, columns.captions, columns.weights)
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


class CaptionImageDataset(ConcatenatedTables):
    """Map-style data set of captioned images.

    `dataset[SampleIndex(epoch, index)]` is a training sample: a caption, drawn by the weights of the source, and a
    random crop, both functions of seed, epoch and index. `dataset[index]` is an evaluation sample: the first caption
    of the row and the evaluation transform. A sample is a dict with `key`, `caption`, `caption_id` (see
    [`caption_id`]), `image_caption_ids` (the distinct ids of all captions of the image) and `pixel_values`, (3, H, W)
    float32.

    Args:
        eval_transform: The evaluation transform. With None, images are not read and samples have no `pixel_values`.
        train_transform: The training transform; by default the evaluation transform.
        on_error: `raise` the error of a damaged image or a row without caption, or return a `SkippedSample` (`skip`),
            which the collator removes and reports.
        max_pixels: Largest width x height of an image to decode.

    Raises:
        FileNotFoundError, SourceError: If a source cannot be read.
        ValueError: If a source is set to streaming or `on_error` is invalid.
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
            raise ValueError("CaptionImageDataset needs at least one source.")
        for source in self.sources:
            if source.streaming:
                raise ValueError(f"{source.path} is set to streaming; use StreamingCaptionImageDataset.")
        self.make_sample = SampleMaker(eval_transform, train_transform, seed, on_error, max_pixels)
        with_images = eval_transform is not None
        super().__init__([load_source(source, with_images) for source in self.sources])
        self.columns = [source_columns(*pair, with_images) for pair in zip(self.sources, self.tables, strict=True)]

    def _key(self, number: int, position: int, row: Mapping[str, Any]) -> str:
        column = self.columns[number].key
        if column is not None and row[column] is not None:
            return str(row[column])
        return str(position) if len(self.sources) == 1 else f"{self.sources[number].path}:{position}"

    def __getitem__(self, index: SampleIndex | int) -> dict[str, Any] | SkippedSample:
        epoch, position, number, offset = self.locate(index)
        row = self.tables[number][offset]
        salt = None if epoch is None else (epoch, position)
        return self.make_sample(row, self._key(number, offset, row), self.columns[number], salt)


class StreamingCaptionImageDataset(IterableDataset):
    """Iterable data set of captioned images, read as a shuffled stream.

    Samples are those of [`CaptionImageDataset`]; caption and crop are functions of seed, epoch and key. Files are
    distributed over ranks and DataLoader workers: each is read once per epoch, whatever their numbers. Only with
    `max_samples`, everyone reads all rows and keeps its share. Since the data set shards itself, accelerate must not
    shard or dispatch its loader. Without a key column, the key of a row is its number in its file, preceded by the
    number of the file and `-` if there are several. See [`CaptionImageDataset`] for the other arguments.

    Args:
        training: Draw captions and crops; False takes first captions and the evaluation transform, in order.
        seed: Seed of order, drawn captions and crops.
        shuffle_buffer: Number of rows in the shuffle buffer; 0 keeps rows and files in order.
        repeat: Start the next epoch at the end of the data, so that no rank runs out before another; for training by
            number of steps.

    Raises:
        FileNotFoundError, SourceError: If the source cannot be read, or (when iterating) has fewer files than readers.
        ValueError: If the source is not set to streaming, or `rank` or `on_error` is invalid.
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
            raise ValueError(f"rank must be between 0 and world_size - 1, but is {rank} of {world_size}.")
        if not source.streaming:
            raise ValueError(f"{source.path} is not set to streaming; use CaptionImageDataset or streaming: true.")
        self.source = source
        self.make_sample = SampleMaker(eval_transform, train_transform, seed, on_error, max_pixels)
        with_images = eval_transform is not None
        self.table = load_source(source, with_images)
        self.columns = source_columns(source, self.table, with_images)
        self.reader = StreamReader(self.table, whole=source.max_samples is not None)
        self.training, self.seed, self.repeat = training, seed, repeat
        self.shuffle_buffer = shuffle_buffer if training else 0
        self.rank, self.world_size = rank, world_size
        # In shared memory, so that persistent workers see a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch of the next pass."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self._epoch.fill_(epoch)

    def require_files(self, num_workers: int) -> None:
        """Check before training that every DataLoader worker of every process has a file to read.

        Raises:
            SourceError: If there are fewer files than workers.
        """
        workers = max(1, num_workers)
        if not self.reader.whole and self.reader.num_files < self.world_size * workers:
            each = f" with {workers} DataLoader workers each" if workers > 1 else ""
            raise SourceError(
                f"the stream {self.source.path} has {self.reader.num_files} files, which is fewer than "
                f"{self.world_size * workers} readers ({self.world_size} processes{each}). Split the data into more "
                "files, lower dataloader_num_workers, or set streaming: false."
            )

    def _key(self, row: StreamRow) -> str:
        key = None if self.columns.key is None else row.values[self.columns.key]
        if key is not None:
            return str(key)
        return str(row.number) if self.reader.num_files == 1 else f"{row.file}-{row.number}"

    def __iter__(self) -> Iterator[dict[str, Any] | SkippedSample]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self.require_files(workers)
        if worker is not None:
            fsspec.asyn.reset_lock()  # a forked process inherits a lock that nobody releases
        # Ranks first, so that the readers with a file more are on different ranks.
        reader, num_readers = number * self.world_size + self.rank, workers * self.world_size
        for epoch in itertools.count(self.epoch):
            empty = True
            for row in self.reader.rows(num_readers, reader, epoch, self.seed, self.shuffle_buffer):
                empty = False
                key = self._key(row)
                salt = (epoch, key) if self.training else None
                yield self.make_sample(row.values, key, self.columns, salt)
            if empty or not self.repeat:
                return


def caption_batches(
    source: CaptionSource, rank: int = 0, world_size: int = 1, show_progress: bool = True
) -> Iterator[list[str]]:
    """Yield the captions of this rank's share of a source by row, column and list entry, a thousand rows at a time."""
    table = load_source(source, with_images=False)
    table = table.select_columns(list(dict.fromkeys(top_level(table, name) for name in source.caption_columns)))
    if world_size > 1:
        table = split_dataset_by_node(table, rank, world_size)
    total = len(table) if isinstance(table, datasets.Dataset) else None
    num_empty = 0
    with progress_bar(f"Captions of {source.path}", total, "row", show_progress and rank == 0) as bar:
        for rows in row_batches(table):
            found = [[text for column in source.caption_columns for text in column_texts(row, column)] for row in rows]
            num_empty += found.count([])
            yield [text for texts in found for text in texts]
            bar.update(advance=len(rows))
    if num_empty:
        logger.warning("%d rows of %s have no caption.", num_empty, source.path)


def distinct_captions(sources: CaptionSource | Sequence[CaptionSource], show_progress: bool = True) -> list[str]:
    """Collect the distinct captions of sources, which an embedding cache for them must contain.

    Captions are distinct if they differ in more than surrounding white space, because their embeddings differ. They
    are in order of first appearance: by source, row, caption column and list entry. Sources may be streams.
    """
    captions: dict[str, None] = {}
    for source in [sources] if isinstance(sources, CaptionSource) else sources:
        for texts in caption_batches(source, show_progress=show_progress):
            captions.update(dict.fromkeys(texts))
    return list(captions)


def distinct_caption_batches(sources: Sequence[CaptionSource]) -> Iterator[list[str]]:
    """Yield the captions of [`distinct_captions`] in batches, with 8 bytes per caption in memory instead of the texts.

    The sources are read twice: for the hashes of all captions, and for those that appear for the first time.
    """
    hashes = array("q")
    for source in sources:
        for texts in caption_batches(source):
            hashes.frombytes(caption_keys(texts)[:, 0].tobytes())
    all_hashes = np.frombuffer(hashes, dtype=np.int64)
    is_first = np.zeros(len(all_hashes), dtype=bool)
    is_first[np.unique(all_hashes, return_index=True)[1]] = True
    start = 0
    for source in sources:
        for texts in caption_batches(source, show_progress=False):
            yield list(itertools.compress(texts, is_first[start : start + len(texts)]))
            start += len(texts)
