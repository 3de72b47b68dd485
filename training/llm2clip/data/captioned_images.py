"""Captioned images: the captions of a row and their ids, its sample, and the data set of samples for stage 2."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np

from llm2clip.command_line.settings import check_choices
from llm2clip.data.formats import SourceError
from llm2clip.data.sampling import ConcatenatedTables, SampleIndex, stable_seed
from llm2clip.data.sources import (
    CaptionSource,
    Columns,
    Table,
    column_value,
    keep_encoded,
    load_source,
    row_batches,
    source_columns,
    top_level,
    used_columns,
)
from llm2clip.data.table_identity import rows_digest, sampled_keys
from llm2clip.data.transforms import EvalTransform, TrainTransform
from llm2clip.files.atomic import digest_json
from llm2clip.files.library_errors import wrap_read_errors
from llm2clip.store import EmbeddingCache, MissingCaptionError
from modeling_llm2clip.image_decoding_llm2clip import DEFAULT_MAX_PIXELS, SampleError
from modeling_llm2clip.tokenization_llm2clip import SURROGATE

# What to do with a damaged image or a row without caption.
OnError = Literal["raise", "skip"]
NO_EMBEDDING = "its caption has no stored embedding"
# Rows that a message names.
SHOWN = 20


class CaptionError(SampleError):
    """A row without caption, or with a caption that is not text."""


class SkippedSample(NamedTuple):
    """Placeholder for a row that cannot be used; the collator removes and reports it."""

    key: str
    reason: str


def unusable_batch_error(skipped: Sequence[SkippedSample]) -> ValueError:
    """Make the error of a batch of which every row is skipped."""
    shown = "; ".join(f"{key}: {reason}" for key, reason in skipped[:SHOWN])
    more = f"; and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
    return ValueError(
        f"none of the {len(skipped)} rows of a batch can be used ({shown}{more}); mend or remove these rows, or raise "
        "the batch size."
    )


def clean_caption(text: Any) -> str | None:
    """Strip surrounding white space; returns None for an empty or missing text.

    Raises:
        TypeError: If `text` is something else than text, or has a lone surrogate, which no encoding has.
    """
    if isinstance(text, str):
        if not text.isascii() and (half := SURROGATE.search(text)) is not None:
            raise TypeError(f"a caption must be text, but {text!r:.80} has half a character (U+{ord(half[0]):04X})")
        return text.strip() or None
    if text is None or (isinstance(text, float) and np.isnan(text)):
        return None
    raise TypeError(f"a caption must be text, not {type(text).__name__} ({text!r:.80})")


def caption_id(text: str) -> int:
    """Compute an id that captions share if they differ only in case and white space.

    Captions with equal ids are positives of each other's images, never negatives. The id is 63 bits of the BLAKE2b
    hash of the case-folded text with collapsed white space: non-negative and the same on every machine.
    """
    normal = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "big") >> 1


def column_texts(row: Mapping[str, Any], column: str) -> list[str]:
    """Return the non-empty texts of a column, which has a text or a list of texts.

    Raises:
        TypeError: If the column contains something else than text; the message names it.
    """
    value = column_value(row, column)
    try:
        # Texts first: they are most values, and the test for sequences is slow.
        values = value if not isinstance(value, str) and isinstance(value, Sequence) else [value]
        return [text for text in map(clean_caption, values) if text is not None]
    except TypeError as error:
        raise TypeError(f"column {column!r}: {error}") from None


class RowCaptions(NamedTuple):
    """All captions of a row, in column order, the sampling weight of each, and the key of the row."""

    texts: list[str]
    weights: list[float]
    key: str

    @classmethod
    def of(
        cls, row: Mapping[str, Any], key: str, columns: Sequence[str], weights: Sequence[float] | None
    ) -> RowCaptions:
        """Read the captions of the row `key`; the entries of a list share the weight of its column, by default 1.

        Raises:
            CaptionError: If no caption can be drawn or one is not text.
        """
        texts: list[str] = []
        shares: list[float] = []
        for column, weight in zip(columns, weights or [1.0] * len(columns), strict=True):
            try:
                entries = column_texts(row, column)
            except TypeError as error:
                raise CaptionError(key, str(error)) from None
            texts += entries
            shares += [weight / max(1, len(entries))] * len(entries)
        if not sum(shares):
            raise CaptionError(key, f"it has no text in {', '.join(columns)}")
        return cls(texts, shares, key)

    def draw(self, seed: int) -> str:
        """Draw a caption by weight, as a function of `seed`."""
        drawable = [text for text, weight in zip(self.texts, self.weights, strict=True) if weight]
        if len(drawable) == 1:
            return drawable[0]
        bounds = np.cumsum(self.weights)
        point = np.random.default_rng(seed).random()
        return self.texts[int(np.searchsorted(bounds / bounds[-1], point, side="right"))]


@dataclass
class SampleMaker:
    """Makes samples of rows; see [`CaptionImageDataset`] for the fields and the samples."""

    eval_transform: EvalTransform | None
    train_transform: TrainTransform | None
    seed: int
    on_error: OnError
    max_pixels: int
    cache: EmbeddingCache | None = None

    def __post_init__(self) -> None:
        check_choices(self)

    def __call__(
        self,
        row: Mapping[str, Any],
        key: str,
        columns: Columns,
        seed_parts: tuple[int | str, ...] | None,
    ) -> dict[str, Any] | SkippedSample:
        """Make the sample of a row, or a `SkippedSample` if it cannot be used and `on_error` is `skip`.

        Seed and `seed_parts` determine caption and crop; None takes the first caption and the evaluation transform.
        """
        try:
            captions = RowCaptions.of(row, key, columns.captions, columns.weights)
            caption = captions.texts[0]
            if seed_parts is not None:
                caption = captions.draw(stable_seed(self.seed, "caption", *seed_parts))
            ids = list(map(caption_id, captions.texts))
            sample: dict[str, Any] = {
                "key": key,
                "caption": caption,
                "caption_id": ids[captions.texts.index(caption)],
                "image_caption_ids": list(dict.fromkeys(ids)),
            }
            if self.cache is not None:
                sample["llm_embeds"] = self.cache.lookup([caption], dtype=None)[0]
            if columns.image is not None and self.eval_transform is not None:
                image = self.eval_transform.decode(row[columns.image], key, self.max_pixels)
                if seed_parts is None or self.train_transform is None:
                    sample["pixel_values"] = self.eval_transform(image, key)
                else:
                    sample["pixel_values"] = self.train_transform(image, stable_seed(self.seed, "crop", *seed_parts))
        except (SampleError, MissingCaptionError) as error:
            if self.on_error == "skip":
                return SkippedSample(key, str(error.reason) if isinstance(error, SampleError) else NO_EMBEDDING)
            if isinstance(error, SampleError):
                raise
            raise MissingCaptionError(f"{key}: {NO_EMBEDDING}. {error}") from None
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
        cache: The embeddings of the captions; samples then have `llm_embeds`. A caption without one is an error or a
            `SkippedSample`, by `on_error`.
        tables: The tables of the sources, if they are open.

    Raises:
        FileNotFoundError, SourceError: If a source cannot be read.
        ValueError: If there is no source, one is set to streaming, or `on_error` is invalid.
    """

    def __init__(
        self,
        sources: CaptionSource | Sequence[CaptionSource],
        eval_transform: EvalTransform | None,
        train_transform: TrainTransform | None = None,
        seed: int = 0,
        on_error: OnError = "raise",
        max_pixels: int = DEFAULT_MAX_PIXELS,
        cache: EmbeddingCache | None = None,
        tables: Sequence[Table] | None = None,
    ) -> None:
        self.sources = [sources] if isinstance(sources, CaptionSource) else list(sources)
        if not self.sources:
            raise ValueError("CaptionImageDataset needs at least one source.")
        for source in self.sources:
            if source.streaming:
                raise ValueError(f"{source.path} is set to streaming; use StreamingCaptionImageDataset.")
        self.make_sample = SampleMaker(eval_transform, train_transform, seed, on_error, max_pixels, cache)
        # Whether row numbers name the rows of several data sets.
        self.is_one_of_several = False
        with_images = eval_transform is not None
        super().__init__(tables or [load_source(source, with_images) for source in self.sources])
        self.columns = [source_columns(*pair, with_images) for pair in zip(self.sources, self.tables, strict=True)]

    @classmethod
    def of_table(
        cls,
        table: datasets.Dataset,
        image_column: str,
        caption_column: str,
        eval_transform: EvalTransform | None,
        train_transform: TrainTransform | None = None,
        **options: Any,
    ) -> CaptionImageDataset:
        """Make a data set of a table of yours.

        Args:
            image_column: Its column of images: encoded bytes, or paths.
            caption_column: Its column of captions, texts or lists of texts.
            eval_transform, train_transform, options: As of the class.

        Raises:
            SourceError: The table does not have these columns, or no images in the first one.
        """
        source = CaptionSource("train_dataset", image_column=image_column, caption_columns=[caption_column])
        used = used_columns(source_columns(source, table), table)
        encoded = keep_encoded(table.select_columns(used), image_column, [os.getcwd()], source.path)
        return cls(source, eval_transform, train_transform, tables=[encoded], **options)

    def content_digest(self) -> str:
        """See [`EpochDataset.content_digest`]. Of images, some are hashed."""
        digests: list[Any] = []
        for table, columns in zip(self.tables, self.columns, strict=True):
            texts = table.select_columns(list(dict.fromkeys(top_level(table, name) for name in columns.captions)))
            images = [] if columns.image is None else sampled_keys(table, columns.image)
            digests.append([rows_digest(texts), images])
        return digest_json(digests)

    def _key(self, number: int, position: int, row: Mapping[str, Any]) -> str:
        alone = len(self.sources) == 1 and not self.is_one_of_several
        default = str(position) if alone else f"{self.sources[number].path}:{position}"
        return self.columns[number].row_key(row, default)

    def __getitem__(self, index: SampleIndex | int) -> dict[str, Any] | SkippedSample:
        epoch, position, number, offset = self.locate(index)
        with wrap_read_errors(self.sources[number].path, SourceError):
            row = self.tables[number][offset]
        seed_parts = None if epoch is None else (epoch, position)
        return self.make_sample(row, self._key(number, offset, row), self.columns[number], seed_parts)

    def without_images(self) -> CaptionImageDataset:
        """Return a data set of the same rows that reads no images."""
        bare = copy.copy(self)
        bare.make_sample = dataclasses.replace(self.make_sample, eval_transform=None, train_transform=None)
        images = [columns.image for columns in self.columns]
        bare.tables = [
            table if image is None else table.remove_columns(top_level(table, image))
            for table, image in zip(self.tables, images, strict=True)
        ]
        bare.columns = [columns._replace(image=None) for columns in self.columns]
        return bare

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
