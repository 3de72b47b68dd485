"""Rows whose images are stored as features of a frozen tower."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.command_line.processes import process_state
from llm2clip.data import CaptionImageDataset, ImageBackend, OnError, SampleIndex, SkippedSample
from llm2clip.data.rows import NO_EMBEDDING, RowCaptions, caption_id, stable_seed, unusable_batch_error
from llm2clip.data.sampling import EpochDataset
from llm2clip.data.stage2_collator import DEFAULT_CROP
from llm2clip.encoders.image_features import FeatureDtype, ImageFeatures, open_features
from llm2clip.encoders.images import ImageSet, TableImages
from llm2clip.store import EmbeddingCache, MissingCaptionError
from modeling_llm2clip import LLM2CLIPModel

logger = logging.getLogger(__name__)

# With more captions missing than this share, a cache is of other data, which nobody means to skip.
SKIPPED_SHARE = 0.1
# The finaliser of splitmix64.
STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


class StoredPairsDataset(EpochDataset):
    """Captioned images as numbers of rows in an [`ImageFeatures`] and in an [`EmbeddingCache`], with 30 bytes a pair.

    `dataset.__getitems__(indices)` is a batch as [`Stage2Collator`] makes it, with `vision_features` in place of
    `pixel_values`. The caption of a sample is drawn by the weights of the source, and its view evenly, as functions of
    seed, epoch and index.

    Args:
        captions: The data, of which no image is read; its seed is that of the draws.
        features, image_rows: The stored features, and for each sample its row there.
        cache: The embeddings of all captions.
        on_error: `raise` the error of a row without caption, or with one that the cache lacks, or `skip` the row.

    Raises:
        MissingCaptionError: The cache lacks a caption, and `on_error` is `raise`.
        CaptionError: A row has no caption, and `on_error` is `raise`.
    """

    def __init__(
        self,
        captions: CaptionImageDataset,
        features: ImageFeatures,
        image_rows: np.ndarray,
        cache: EmbeddingCache,
        on_error: OnError = "raise",
    ) -> None:
        self.seed = captions.seed
        self.features, self.image_rows, self.cache = features, image_rows, cache
        self.starts = captions.starts
        self.skipped = {
            row: features.skipped[stored]
            for row, stored in enumerate(image_rows.tolist())
            if stored in features.skipped
        }
        texts: list[str] = []
        ends, shares = [0], []
        rows_captions: Iterable[RowCaptions | SkippedSample] = captions.captions(on_error)
        if on_error == "skip":
            rows_captions = _with_embeddings(list(rows_captions), cache)
        for row, sample in enumerate(rows_captions):
            if isinstance(sample, SkippedSample):
                self.skipped.setdefault(row, sample)
            else:
                texts += sample.texts
                shares.append(np.cumsum(sample.weights) / sum(sample.weights))
            ends.append(len(texts))
        self._ends = np.array(ends)
        self._caption_rows = cache.rows(texts)
        self._caption_ids = np.fromiter(map(caption_id, texts), np.int64, len(texts))
        # All rows in one ascending sequence, row + share, so that one search draws for a whole batch.
        rows = np.repeat(np.arange(len(self)), np.diff(self._ends))
        self._bounds = rows + (np.concatenate(shares) if shares else np.empty(0))

    def __len__(self) -> int:
        return len(self.image_rows)

    def content_digest(self) -> str:
        digest = hashlib.sha256(self.features.manifest.fingerprint.encode())
        for values in (self.image_rows, self._ends, self._caption_ids, self._bounds):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()[:16]

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return all pairs that training draws from: numbers of samples, rows of their captions, and weights.

        The weights of the captions of a sample have the sum 1.
        """
        used = np.ones(len(self), dtype=bool)
        used[list(self.skipped)] = False
        of_caption = np.repeat(np.arange(len(self)), np.diff(self._ends))
        shares = np.diff(self._bounds - of_caption, prepend=0.0)
        first = self._ends[:-1][np.diff(self._ends) > 0]
        shares[first] = (self._bounds - of_caption)[first]
        kept = used[of_caption] & (shares > 0)
        return of_caption[kept], self._caption_rows[kept], shares[kept]

    def __getitem__(self, index: SampleIndex | int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[SampleIndex | int]) -> dict[str, Any]:
        epoch = next((index.epoch for index in indices if isinstance(index, SampleIndex)), 0)
        rows = np.array([index.index if isinstance(index, SampleIndex) else index for index in indices])
        skipped = [self.skipped[row] for row in rows.tolist() if row in self.skipped] if self.skipped else []
        if skipped:
            rows = np.array([row for row in rows.tolist() if row not in self.skipped], dtype=np.int64)
            if not len(rows):
                raise unusable_batch_error(skipped)
        drawn = np.searchsorted(self._bounds, rows + self._uniform("caption", epoch, rows), side="right")
        drawn = np.clip(drawn, self._ends[rows], self._ends[rows + 1] - 1)
        views = (self._uniform("view", epoch, rows) * self.features.views).astype(np.int64)
        return {
            "vision_features": self.features.read_views(self.image_rows[rows], views),
            "llm_embeds": self.cache.read(self._caption_rows[drawn]),
            "caption_ids": torch.from_numpy(self._caption_ids[drawn]),
            "image_caption_ids": self._all_ids(rows),
            "skipped": [tuple(sample) for sample in skipped],
            "keys": [f"row {row}" for row in rows.tolist()],
        }

    def _all_ids(self, rows: np.ndarray) -> Tensor:
        counts = self._ends[rows + 1] - self._ends[rows]
        columns = np.arange(counts.max())
        caption_numbers = np.minimum(self._ends[rows][:, None] + columns, len(self._caption_ids) - 1)
        return torch.from_numpy(np.where(columns < counts[:, None], self._caption_ids[caption_numbers], -1))

    def _uniform(self, purpose: str, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Numbers in [0, 1) that are functions of seed, purpose, epoch and row."""
        number = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
            stable_seed(self.seed, purpose, epoch)
        )
        for shift, factor in STEPS:
            number = (number ^ (number >> np.uint64(shift))) * np.uint64(factor)
        return (number >> np.uint64(11)) * 2.0**-53


def _with_embeddings(
    samples: Sequence[RowCaptions | SkippedSample], cache: EmbeddingCache
) -> Iterator[RowCaptions | SkippedSample]:
    """Yield the captions of each row that a cache has; a row of which none can be drawn is skipped."""
    stored = cache.contains([text for sample in samples for text in _texts(sample)])
    require_captions(int((~stored).sum()), len(stored), cache, "skip", "the training set")
    has_embedding = iter(stored.tolist())
    for sample in samples:
        known = [next(has_embedding) for _ in _texts(sample)]
        if isinstance(sample, SkippedSample) or all(known):
            yield sample
            continue
        weights = list(itertools.compress(sample.weights, known))
        if sum(weights):
            yield RowCaptions(list(itertools.compress(sample.texts, known)), weights, sample.key)
        else:
            yield SkippedSample(sample.key, NO_EMBEDDING)


def require_captions(missing: int, total: int, cache: EmbeddingCache, on_error: OnError, what: str) -> None:
    """Raise an error, or with `skip` a warning, if a cache lacks some of all captions of `what`.

    With more than `SKIPPED_SHARE` missing it is an error in any case.

    Raises:
        MissingCaptionError: The cache lacks captions that are not skipped.
    """
    if not missing:
        return
    message = f"the cache {cache.path} lacks {missing} of the {total} captions of {what}"
    if on_error == "raise" or missing > SKIPPED_SHARE * total:
        raise MissingCaptionError(f"{message}; run `llm2clip embed` on it.")
    if process_state().is_main_process:
        logger.warning("%s; skipping these.", message)


def _texts(sample: RowCaptions | SkippedSample) -> list[str]:
    return [] if isinstance(sample, SkippedSample) else sample.texts


def store_pairs(
    model: LLM2CLIPModel,
    image_processor: Any,
    dataset: CaptionImageDataset,
    cache: EmbeddingCache,
    folder: str | Path,
    *,
    also: Iterable[ImageSet] = (),
    dtype: FeatureDtype = "float32",
    views: int = 1,
    crop_scale: Sequence[float] = DEFAULT_CROP,
    image_backend: ImageBackend = "exact",
    on_error: OnError = "raise",
    batch_size: int = 64,
    num_workers: int = 0,
) -> StoredPairsDataset:
    """Store what a frozen vision tower makes of the images of a data set, and make a data set that reads it.

    The tower computes each image once; a killed call goes on where it stopped. Train on the result with
    `freeze_vision="all"`:

    ```python
    pairs = store_pairs(model, processor.image_processor, dataset, cache, "features")
    Stage2Trainer(model, Stage2Config(output_dir="stage2", freeze_vision="all"), train_dataset=pairs, ...).train()
    ```

    Args:
        dataset: The captioned images. Captions and crops are drawn by its seed.
        cache: The LLM's embeddings of the captions.
        folder: Where the features are stored; several data sets can share it.
        also: Further images to store, such as those of retrieval sets, which a Trainer then reads there.
        dtype: Precision in which the tower computes.
        views: Views of each image: that of evaluation, and random crops.
        crop_scale: Smallest and largest area of these crops, as a share of the image.
        image_backend: Decoder of the images; see [`Stage2Collator`].
        on_error: `raise` the error of an image or caption that cannot be used, or `skip` the row.

    Raises:
        DamagedImageError: An image cannot be read, and `on_error` is `raise`.
        MissingCaptionError: The cache lacks captions; see [`require_captions`].
    """
    tables = [TableImages(table, columns) for table, columns in zip(dataset.tables, dataset.columns, strict=True)]
    features = open_features(
        model,
        image_processor,
        [*tables, *also],
        folder,
        dtype=dtype,
        views=views,
        crop_scale=crop_scale,
        seed=dataset.seed,
        image_backend=image_backend,
        on_error=on_error,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    rows = features.find(np.concatenate([images.content_keys() for images in tables]))
    pairs = StoredPairsDataset(dataset, features, rows, cache, on_error)
    pairs.mixing = dataset.mixing
    return pairs
