"""Batches for stage 2: images, caption embeddings or tokens, and caption ids."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BaseImageProcessor

from llm2clip.data.captioned_images import NO_EMBEDDING, OnError, RowCaptions, SkippedSample, unusable_batch_error
from llm2clip.data.transforms import EvalTransform, ImageBackend, TrainTransform
from llm2clip.store.store import EmbeddingCache, caption_keys
from modeling_llm2clip.image_decoding_llm2clip import DEFAULT_MAX_PIXELS, SampleError

# Areas of the crops of stage 2, as shares of the image.
DEFAULT_CROP = (0.9, 1.0)
TOKEN_FIELDS = ("input_ids", "attention_mask", "pooling_mask")


class Stage2Collator:
    """Builds stage-2 batches from rows of images and captions.

    A row is a dict from any map-style or iterable data set, [`CaptionImageDataset`] being one. All rows of a batch
    need the same keys:

    - the image as `pixel_values` (3, H, W), or as `image`: a PIL image, encoded bytes or a path, prepared by the
      processor as in evaluation, or cropped at random;
    - its caption as `llm_embeds` (hidden_size,), as `input_ids` (L,) with optional `attention_mask` and
      `pooling_mask`, where L may differ between rows, or as `caption`: a text for the cache or else the processor, or
      a list of texts, one of which is drawn by torch's random numbers, as crops are;
    - optionally `caption_id`, an int64 >= 0 that equal captions share, and `image_caption_ids`, the ids of all
      captions of the image (by default `caption_id` alone). Without ids, a caption matches the image of its own row
      only; [`caption_id`] makes them from texts.

    The batch contains, for n rows:

    - `pixel_values` (n, 3, H, W);
    - `llm_embeds` (n, hidden_size) in the dtype of the cache or the rows, or `input_ids` (n, L) and `attention_mask`,
      padded on the left, with `pooling_mask` if the rows have one;
    - `caption_ids` (n,) and `image_caption_ids` (n, K), padded with -1, if the rows have ids: caption j is a correct
      answer for image i if `caption_ids[j]` is in `image_caption_ids[i]`;
    - `keys`: the keys of the rows, if they have a `key`, for messages;
    - `skipped`: (key, reason) of each [`SkippedSample`] among the samples. These are left out, so that the batches of
      two ranks can differ in size.

    Args:
        cache: Embedding cache with every caption, for rows with a `caption`.
        processor: `LLM2CLIPProcessor`, for rows with an `image`, or with a `caption` if there is no cache; an image
            processor or a tokenizer is enough for one of them.
        on_error: `raise` the error of a row with an image or caption that cannot be used, or with a caption that the
            cache lacks, or `skip` the row.
        max_pixels: Largest `image` that is decoded, width x height.
        image_column, caption_column: Names of `image` and `caption` in the rows.
        crop_scale: Smallest and largest area of a random crop of an `image`, as a share of it; None prepares it as in
            evaluation. Crops depend on torch's random numbers.
        image_backend: Decoder of an `image`: `exact` is Pillow, as in inference; `fast` is torchvision for JPEGs.
    """

    def __init__(
        self,
        cache: EmbeddingCache | None = None,
        processor: Callable[..., Any] | None = None,
        on_error: OnError = "raise",
        max_pixels: int = DEFAULT_MAX_PIXELS,
        image_column: str = "image",
        caption_column: str = "caption",
        crop_scale: Sequence[float] | None = None,
        image_backend: ImageBackend = "exact",
    ) -> None:
        self.cache, self.on_error, self.max_pixels = cache, on_error, max_pixels
        self.image_column, self.caption_column = image_column, caption_column
        self.crop_scale, self.image_backend = crop_scale, image_backend
        self.draws_captions = True
        is_image_processor = isinstance(processor, BaseImageProcessor)
        self.image_processor: Any = processor if is_image_processor else getattr(processor, "image_processor", None)
        self.tokenize = None if is_image_processor else processor

    def for_evaluation(self) -> Stage2Collator:
        """Return a collator that does not crop, and takes the first caption of a list."""
        other = copy.copy(self)
        other.crop_scale, other.draws_captions = None, False
        other.__dict__.pop("_transforms", None)
        return other

    def with_cache(self, cache: EmbeddingCache | None) -> Stage2Collator:
        """Return a collator with this cache."""
        other = copy.copy(self)
        other.cache = cache
        return other

    @cached_property
    def _transforms(self) -> tuple[EvalTransform, TrainTransform | None]:
        evaluation = EvalTransform(self.image_processor, self.image_backend)
        if self.crop_scale is None:
            return evaluation, None
        return evaluation, TrainTransform(self.image_processor, (self.crop_scale[0], self.crop_scale[1]))

    def __call__(self, samples: Sequence[dict[str, Any] | SkippedSample] | Mapping[str, Any]) -> dict[str, Any]:
        """Collate rows; a batch that is whole already, as stored rows come, is returned as it is.

        Raises:
            ValueError: If every sample is skipped, or rows lack a key or differ in their keys.
            MissingCaptionError: If the cache lacks a caption, and `on_error` is `raise`.
            SampleError: If an `image` or `caption` cannot be used, and `on_error` is `raise`.
        """
        if isinstance(samples, Mapping):
            return dict(samples)
        rows, skipped = list[dict[str, Any]](), list[SkippedSample]()
        for number, sample in enumerate(samples):
            checked = sample if isinstance(sample, SkippedSample) else self._checked(sample, number)
            if isinstance(checked, SkippedSample):
                skipped.append(checked)
            else:
                rows.append(checked)
        stored: np.ndarray | None = None
        if self.cache is not None and self.on_error == "skip" and _any_has(rows, "caption"):
            stored = self.cache.find(caption_keys(_column(rows, "caption")))
            lacking = [rows[index] for index in np.flatnonzero(stored < 0)]
            skipped += [SkippedSample(str(row.get("key", row["caption"])), NO_EMBEDDING) for row in lacking]
            rows, stored = [rows[index] for index in np.flatnonzero(stored >= 0)], stored[stored >= 0]
        if not rows:
            raise unusable_batch_error(skipped)
        batch: dict[str, Any] = {**self._images(rows), **self._captions(rows, stored)}
        if _any_has(rows, "caption_id"):
            ids = _column(rows, "caption_id")
            known = _any_has(rows, "image_caption_ids")
            ids_of_images = _column(rows, "image_caption_ids") if known else [[number] for number in ids]
            batch["caption_ids"] = torch.tensor(ids, dtype=torch.int64)
            batch["image_caption_ids"] = _pad([torch.as_tensor(own, dtype=torch.int64) for own in ids_of_images], -1)
        elif _any_has(rows, "image_caption_ids"):
            raise ValueError("Rows with image_caption_ids need a caption_id as well.")
        if _any_has(rows, "key"):
            batch["keys"] = list(map(str, _column(rows, "key")))
        batch["skipped"] = [tuple(sample) for sample in skipped]
        return batch

    def _checked(self, row: dict[str, Any], number: int) -> dict[str, Any] | SkippedSample:
        """Decode the image of a row and choose its caption, as far as it has none that is prepared."""
        names = {self.image_column: "image", self.caption_column: "caption"}
        hidden = {*names.values()} - {*names}
        row = {names.get(name, name): value for name, value in row.items() if name not in hidden}
        key = str(row.get("key") or _name(row, number))
        try:
            if self.image_processor is not None and "image" in row and "pixel_values" not in row:
                row["pixel_values"], row["_prepared"] = self._prepared(row.pop("image"), key), True
            if "caption" in row and not {"llm_embeds", "input_ids"} & set(row):
                captions = RowCaptions.of(row, key, ["caption"], None)
                is_drawn = self.draws_captions and len(captions.texts) > 1
                row["caption"] = captions.draw(_random_seed()) if is_drawn else captions.texts[0]
        except SampleError as error:
            if self.on_error == "raise":
                raise
            return SkippedSample(error.key, error.reason or str(error))
        return row

    def _prepared(self, image: Any, key: str) -> Tensor:
        evaluation, training = self._transforms
        decoded = evaluation.decode(image, key, self.max_pixels)
        if training is None:
            return evaluation(decoded, key)
        return training(decoded, _random_seed())

    def _lacks(self, row: dict[str, Any]) -> str:
        columns = f"image_column is {self.image_column!r}, and caption_column {self.caption_column!r}"
        return f", but has {', '.join(name for name in row if name != '_prepared')} ({columns})"

    def _images(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if "pixel_values" in rows[0]:
            # Without a crop_scale, the data set may have prepared the image by the other settings.
            given = {"crop_scale": self.crop_scale and list(self.crop_scale), "image_backend": self.image_backend}
            for setting, default in (("crop_scale", list(DEFAULT_CROP)), ("image_backend", "exact")):
                if self.crop_scale and given[setting] != default and not rows[0].get("_prepared"):
                    raise ValueError(
                        f"{setting} is {given[setting]}, but the rows have pixel_values, which are prepared already; "
                        "leave it unset, or give rows with an image."
                    )
            return {"pixel_values": torch.stack([torch.as_tensor(x) for x in _column(rows, "pixel_values")])}
        if "image" not in rows[0]:
            raise ValueError(f"A row needs pixel_values or image{self._lacks(rows[0])}.")
        raise ValueError("Rows with an image need Stage2Collator(processor=...) with an image processor.")

    def _captions(self, rows: Sequence[dict[str, Any]], stored: np.ndarray | None) -> dict[str, Tensor]:
        """Return the text inputs of a batch; `stored` are the rows of the cache, if they have been looked up."""
        if "llm_embeds" in rows[0]:
            return {"llm_embeds": torch.stack([torch.as_tensor(embeds) for embeds in _column(rows, "llm_embeds")])}
        if "input_ids" in rows[0]:
            tokens = {name: _column(rows, name) for name in TOKEN_FIELDS if _any_has(rows, name)}
            tokens.setdefault("attention_mask", [[1] * len(ids) for ids in tokens["input_ids"]])
            return {name: _pad(values, 0, "left") for name, values in tokens.items()}
        if "caption" not in rows[0]:
            raise ValueError(f"A row needs llm_embeds, input_ids or caption{self._lacks(rows[0])}.")
        captions = _column(rows, "caption")
        if self.cache is not None:
            embeds = self.cache.lookup(captions, dtype=None) if stored is None else self.cache.read(stored)
            return {"llm_embeds": embeds}
        if self.tokenize is None:
            raise ValueError(
                "Rows with a caption need Stage2Collator(cache=...) or Stage2Collator(processor=...) with the "
                "tokenizer of the LLM."
            )
        tokens = self.tokenize(text=captions, padding=True, truncation=True, return_tensors="pt")
        # Some tokenizers return more, such as token_type_ids.
        return {name: tokens[name] for name in TOKEN_FIELDS if name in tokens}


def _random_seed() -> int:
    return int(torch.randint(2**62, ()))


def _name(row: dict[str, Any], number: int) -> str:
    """Name a row without a key, by what it is and not by where it is in its batch, as far as possible."""
    image = row.get("image")
    if isinstance(image, bytes):
        return f"image {hashlib.sha256(image).hexdigest()[:12]}"
    name = image if isinstance(image, str | os.PathLike) else row.get("caption")
    return str(name) if isinstance(name, str | os.PathLike) else f"row {number} of its batch"


def _any_has(rows: Sequence[dict[str, Any]], name: str) -> bool:
    return any(name in row for row in rows)


def _column(rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
    for number, row in enumerate(rows):
        if name not in row:
            raise ValueError(
                f"All rows of a batch need the same keys, but row {number} lacks {name!r}, which others have."
            )
    return [row[name] for row in rows]


def _pad(rows: list[Any], value: int, side: str = "right") -> Tensor:
    tensors = [torch.as_tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
