"""Data sets of captioned images for stage 2: map-style and streaming."""

from __future__ import annotations

import itertools
import logging
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from torch import Tensor

from llm2clip.data.opened_table import OpenedTable, SourceError, Table
from llm2clip.data.records import NO_EMBEDDING, OnError, RowCaptions, SkippedSample, caption_id, column_texts
from llm2clip.data.rows import CaptionRows, StreamedRows
from llm2clip.data.sampling import stable_seed
from llm2clip.data.sources import CaptionSource, Columns, open_source, row_batches, select_source, top_level
from llm2clip.data.stream_order import BLOCK
from llm2clip.data.streams import Attach, StreamRow
from llm2clip.data.tar_rows import refuse_damaged_tars
from llm2clip.data.transforms import EvalTransform, TrainTransform
from llm2clip.store import EmbeddingCache, MissingCaptionError
from llm2clip.store.captions import caption_keys
from llm2clip.utils.library_errors import wrap_read_errors
from llm2clip.utils.progress import ProgressBar
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
        self,
        row: Mapping[str, Any],
        key: str,
        columns: Columns,
        salt: tuple[int | str, ...] | None,
        drawn: tuple[RowCaptions, str] | None = None,
    ) -> dict[str, Any] | SkippedSample:
        """Make the sample of a row, or a `SkippedSample` if it cannot be used and `on_error` is `skip`.

        Seed and `salt` determine caption and crop; None takes the first caption and the evaluation transform.

        Args:
            drawn: What [`SampleMaker.draw`] returns, if it was called before.
        """
        try:
            captions, caption = drawn or self.draw(row, key, columns, salt)
            ids = list(map(caption_id, captions.texts))
            sample: dict[str, Any] = {
                "key": key,
                "caption": caption,
                "caption_id": ids[captions.texts.index(caption)],
                "image_caption_ids": list(dict.fromkeys(ids)),
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

    def draw(
        self, row: Mapping[str, Any], key: str, columns: Columns, salt: tuple[int | str, ...] | None
    ) -> tuple[RowCaptions, str]:
        """Return the captions of a row, and the one of its sample.

        Raises:
            CaptionError: No caption can be drawn, or one is not text.
        """
        captions = RowCaptions.of(row, key, columns.captions, columns.weights)
        if salt is None:
            return captions, captions.texts[0]
        return captions, captions.draw(stable_seed(self.seed, "caption", *salt))


class CaptionImageDataset(CaptionRows):
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

    make_sample: SampleMaker

    def __init__(
        self,
        sources: CaptionSource | Sequence[CaptionSource],
        eval_transform: EvalTransform | None,
        train_transform: TrainTransform | None = None,
        seed: int = 0,
        on_error: OnError = "raise",
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        maker = SampleMaker(eval_transform, train_transform, seed, on_error, max_pixels)
        super().__init__(sources, maker, with_images=eval_transform is not None)

    def captions(self) -> Iterator[RowCaptions | SkippedSample]:
        """Yield the captions of each sample in order, or why it cannot be used if `on_error` is `skip`.

        Raises:
            CaptionError: A row has no caption, and `on_error` is `raise`.
        """
        for number, table in enumerate(self.tables):
            columns = self.columns[number]
            for offset, row in enumerate(itertools.chain.from_iterable(row_batches(table))):
                key = self._key(number, offset, row)
                try:
                    yield RowCaptions.of(row, key, columns.captions, columns.weights)
                except SampleError as error:
                    if self.make_sample.on_error == "raise":
                        raise
                    yield SkippedSample(key, str(error.reason))


class StreamingCaptionImageDataset(StreamedRows):
    """Iterable data set of captioned images, read as a shuffled stream.

    Samples are those of [`CaptionImageDataset`]; caption and crop are functions of seed, epoch and key. If the rows of
    the files are counted, by `row_counts` or the manifests of `embeddings`, their order is the same for any number of
    ranks and DataLoader workers; see [`SampleStream`]. Otherwise the files are distributed over them, and with
    `max_samples` everyone reads the first rows and keeps its share. Since the data set shards itself, accelerate must
    not shard or dispatch its loader. Without a key column, the key of a row is its number in its file, preceded by the
    number of the file and `-` if there are several. See [`CaptionImageDataset`] for the other arguments.

    Args:
        training: Draw captions and crops; False takes first captions and the evaluation transform, in order.
        seed: Seed of order, drawn captions and crops.
        shuffle_block: Rows that are shuffled together; 0 keeps rows and files in order.
        repeat: Start the next epoch at the end of the data, so that no rank runs out before another; for training by
            number of steps.
        embeddings: Opens the stored embeddings of the captions of a file by its number, as
            [`SourceSidecars.open`](llm2clip.data.sidecars.SourceSidecars.open) does; samples then have `llm_embeds`.
            A caption without one is an error or a `SkippedSample`, by `on_error`.
        row_counts: Rows of each file, if they are known, those beyond `max_samples` not among them.
        opened: The table of the source, if it is open.

    Raises:
        FileNotFoundError, SourceError: If the source cannot be read, or (when iterating) its rows are not counted and
            it has fewer files than readers.
        ValueError: If the source is not set to streaming, or `rank` or `on_error` is invalid.
    """

    make_sample: SampleMaker

    def __init__(
        self,
        source: CaptionSource,
        eval_transform: EvalTransform | None,
        train_transform: TrainTransform | None = None,
        training: bool = True,
        seed: int = 0,
        shuffle_block: int = BLOCK,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = False,
        on_error: OnError = "raise",
        max_pixels: int = DEFAULT_MAX_PIXELS,
        embeddings: Callable[[int], EmbeddingCache] | None = None,
        row_counts: Sequence[int] | None = None,
        opened: OpenedTable | None = None,
    ) -> None:
        maker = SampleMaker(eval_transform, train_transform, seed, on_error, max_pixels)
        with_images, order = eval_transform is not None, (training, seed, shuffle_block)
        super().__init__(source, maker, with_images, *order, rank, world_size, repeat, row_counts, opened)
        if embeddings is not None and source.max_samples is not None:
            raise ValueError(f"max_samples of {source.path} cannot be combined with embeddings beside its files.")
        self.embeddings = embeddings

    def _attach(self, epoch: int) -> Attach | None:
        return None if self.embeddings is None else partial(self._reader_of_embeddings, self.embeddings, epoch)

    def _reader_of_embeddings(
        self, embeddings: Callable[[int], EmbeddingCache], epoch: int, file: int
    ) -> Callable[[StreamRow], tuple[tuple[RowCaptions, str], Tensor | None] | None]:
        opened = embeddings(file)

        def embedding(row: StreamRow) -> tuple[tuple[RowCaptions, str], Tensor | None] | None:
            key = self._key(row)
            try:
                drawn = self.make_sample.draw(row.values, key, self.columns, self._sample_seed(epoch, key))
            except SampleError:
                return None  # reported when the sample is made
            try:
                return drawn, opened.lookup([drawn[1]], dtype=None)[0]
            except KeyError:
                return drawn, None

        return embedding

    def _make(self, row: StreamRow, epoch: int) -> Any:
        if row.attached is None:
            return super()._make(row, epoch)
        (drawn, embedding), key = row.attached, self._key(row)
        sample = self.make_sample(row.values, key, self.columns, self._sample_seed(epoch, key), drawn)
        if isinstance(sample, SkippedSample):
            return sample
        if embedding is None:
            if self.make_sample.on_error == "raise":
                raise MissingCaptionError(f"{key}: {NO_EMBEDDING}; run `llm2clip embed` on {self.source.path} again.")
            return SkippedSample(key, NO_EMBEDDING)
        return {**sample, "llm_embeds": embedding}


def caption_batches(
    source: CaptionSource, rank: int = 0, world_size: int = 1, show_progress: bool = True
) -> Iterator[list[str]]:
    """Yield the captions of this rank's share of a source by row, column and list entry, a thousand rows at a time."""
    opened = open_source(source)
    if source.streaming and opened.is_webdataset and rank == 0:
        refuse_damaged_tars(opened.files)
    table = select_source(source, opened, with_images=False)
    table = table.select_columns(list(dict.fromkeys(top_level(table, name) for name in source.caption_columns)))
    if world_size > 1:
        if isinstance(table, datasets.Dataset) and rank >= len(table):
            return  # an empty part is an error of datasets
        table = split_dataset_by_node(table, rank, world_size)
    total = len(table) if isinstance(table, datasets.Dataset) else None
    num_empty = 0
    with ProgressBar(f"Captions of {source.path}", total, "row", show_progress and rank == 0) as bar:
        for found in _with_place(captions_by_row(table, source.caption_columns), source.path):
            num_empty += found.count([])
            yield [text for texts in found for text in texts]
            bar.update(len(found))
    if num_empty:
        logger.warning("%d rows of %s have no caption.", num_empty, source.path)


def captions_by_row(table: Table, columns: Sequence[str]) -> Iterator[list[list[str]]]:
    """Yield the captions of each row of a table, by column and list entry, a thousand rows at a time."""
    for rows in row_batches(table):
        yield [[text for column in columns for text in column_texts(row, column)] for row in rows]


def _with_place(found: Iterator[list[list[str]]], path: str) -> Iterator[list[list[str]]]:
    """Name the source where a caption is not text, or a file is damaged."""
    with wrap_read_errors(path, SourceError):
        try:
            yield from found
        except TypeError as error:
            raise SourceError(f"{path}: {error}") from error


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


def caption_hashes(sources: Sequence[CaptionSource]) -> np.ndarray:
    """Hash all captions of sources, (captions,) int64, in the order of [`caption_batches`]."""
    hashes = array("q")
    for source in sources:
        for texts in caption_batches(source):
            hashes.frombytes(caption_keys(texts)[:, 0].tobytes())
    return np.frombuffer(hashes, dtype=np.int64)


def distinct_caption_batches(
    sources: Sequence[CaptionSource], hashes: np.ndarray | None = None
) -> Iterator[list[str]]:
    """Yield the captions of [`distinct_captions`] in batches, with 8 bytes per caption in memory instead of the texts.

    The sources are read twice: for the hashes of all captions, and for those that appear for the first time.

    Args:
        hashes: The [`caption_hashes`] of the sources, if these are known.
    """
    if hashes is None:
        hashes = caption_hashes(sources)
    is_first = np.zeros(len(hashes), dtype=bool)
    is_first[np.unique(hashes, return_index=True)[1]] = True
    start = 0
    for source in sources:
        for texts in caption_batches(source, show_progress=False):
            yield list(itertools.compress(texts, is_first[start : start + len(texts)]))
            start += len(texts)
