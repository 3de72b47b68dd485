"""The data set of captioned images: rows of tables, as they are stored."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets

from llm2clip.data.formats import SourceError
from llm2clip.data.rows import OnError, RowCaptions, SkippedSample, captioned_row, captions_of
from llm2clip.data.sampling import ConcatenatedTables, SampleIndex
from llm2clip.data.sources import (
    CaptionSource,
    Table,
    keep_encoded,
    load_source,
    row_batches,
    source_columns,
    top_level,
    used_columns,
)
from llm2clip.data.table_identity import rows_digest, sampled_keys
from llm2clip.files.atomic import digest_json
from llm2clip.files.library_errors import wrap_read_errors
from modeling_llm2clip.image_decoding_llm2clip import SampleError


class CaptionImageDataset(ConcatenatedTables):
    """Map-style data set of captioned images.

    A row is a dict with `key`, `image` (encoded), and `caption`, the values of the caption columns by their names with
    their `caption_weights`. [`Stage2Collator`] draws a caption by weight and crops the image. In training, where
    `dataset[SampleIndex(epoch, index)]` is read, both are functions of seed, epoch and index, the row's
    `seed_parts`. Those of `dataset[index]` are None: its first caption is taken, and its whole image.

    Args:
        seed: Seed of the draws.
        with_images: Read the images. Without, rows have no `image`.
        tables: The tables of the sources, if they are open.

    Raises:
        FileNotFoundError, SourceError: If a source cannot be read.
        ValueError: If there is no source, or one is set to streaming.
    """

    def __init__(
        self,
        sources: CaptionSource | Sequence[CaptionSource],
        seed: int = 0,
        with_images: bool = True,
        tables: Sequence[Table] | None = None,
    ) -> None:
        self.sources = [sources] if isinstance(sources, CaptionSource) else list(sources)
        if not self.sources:
            raise ValueError("CaptionImageDataset needs at least one source.")
        for source in self.sources:
            if source.streaming:
                raise ValueError(f"{source.path} is set to streaming; use StreamingCaptionImageDataset.")
        self.seed = seed
        # Whether row numbers name the rows of several data sets.
        self.is_one_of_several = False
        super().__init__(tables or [load_source(source, with_images) for source in self.sources])
        self.columns = [source_columns(*pair, with_images) for pair in zip(self.sources, self.tables, strict=True)]

    @classmethod
    def of_table(
        cls, table: datasets.Dataset, image_column: str, caption_column: str, seed: int = 0
    ) -> CaptionImageDataset:
        """Make a data set of a table of yours.

        Args:
            image_column: Its column of images: encoded bytes, or paths.
            caption_column: Its column of captions, texts or lists of texts.
            seed: Seed of the draws.

        Raises:
            SourceError: The table does not have these columns, or no images in the first one.
        """
        source = CaptionSource("train_dataset", image_column=image_column, caption_columns=[caption_column])
        used = used_columns(source_columns(source, table), table)
        encoded = keep_encoded(table.select_columns(used), image_column, [os.getcwd()], source.path)
        return cls(source, seed, tables=[encoded])

    def content_digest(self) -> str:
        """See [`EpochDataset.content_digest`]. Of images, some are hashed."""
        digests: list[Any] = []
        for table, columns in zip(self.tables, self.columns, strict=True):
            texts = table.select_columns(list(dict.fromkeys(top_level(table, name) for name in columns.captions)))
            images = [] if columns.image is None else sampled_keys(table, columns.image)
            digests.append([rows_digest(texts), images])
        return digest_json(digests)

    def _row(
        self, number: int, offset: int, values: Mapping[str, Any], seed_parts: tuple[int, ...] | None = None
    ) -> dict[str, Any]:
        alone = len(self.sources) == 1 and not self.is_one_of_several
        name = str(offset) if alone else f"{self.sources[number].path}:{offset}"
        return captioned_row(values, self.columns[number], name, seed_parts)

    def __getitem__(self, index: SampleIndex | int) -> dict[str, Any]:
        epoch, position, number, offset = self.locate(index)
        with wrap_read_errors(self.sources[number].path, SourceError):
            values = self.tables[number][offset]
        return self._row(number, offset, values, None if epoch is None else (self.seed, epoch, position))

    def captions(self, on_error: OnError) -> Iterator[RowCaptions | SkippedSample]:
        """Yield the captions of each row in order, or why it cannot be used if `on_error` is `skip`; reads no image.

        Raises:
            CaptionError: A row has no caption, and `on_error` is `raise`.
        """
        for number, (table, columns) in enumerate(zip(self.tables, self.columns, strict=True)):
            texts = table if columns.image is None else table.remove_columns(columns.image)
            for offset, values in enumerate(itertools.chain.from_iterable(row_batches(texts))):
                row = self._row(number, offset, values)
                try:
                    yield captions_of(row["caption"], row["key"], row["caption"], row["caption_weights"])
                except SampleError as error:
                    if on_error == "raise":
                        raise
                    yield SkippedSample(row["key"], str(error.reason))
