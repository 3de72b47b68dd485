"""The collator of stage 2: rows become a batch of images, caption embeddings or tokens, and caption ids."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BaseImageProcessor

from llm2clip.command_line.settings import require_choice
from llm2clip.data.rows import (
    NO_EMBEDDING,
    OnError,
    RowCaptions,
    SkippedSample,
    caption_id,
    captions_of,
    draw_caption,
    stable_seed,
    unusable_batch_error,
)
from llm2clip.data.transforms import EvalTransform, ImageBackend, TrainTransform
from llm2clip.store.store import EmbeddingCache, caption_keys
from modeling_llm2clip.image_decoding_llm2clip import SampleError

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
      `pooling_mask`, where L may differ between rows, or as `caption`, for the cache or else the processor: a text, a
      list of texts, or a mapping from names of columns to these, one of which is drawn. `caption_weights` are the
      weights of the columns, equal by default, which the texts of a list share;
    - optionally `seed_parts`, a seed and what else the drawn caption and the crop depend on; with None, the first
      caption is taken, and the image not cropped. Without them, they depend on torch's random numbers;
    - optionally `embedding_cache`, which has the embedding of the caption, if that of the collator does not;
    - optionally `caption_id`, an int64 >= 0 that equal captions share, and `image_caption_ids`, the ids of all
      captions of the image (by default `caption_id` alone). By default they are made of the texts by [`caption_id`];
      without a `caption`, the caption matches the image of its own row only.

    The batch contains, for n rows:

    - `pixel_values` (n, 3, H, W);
    - `llm_embeds` (n, hidden_size) in the dtype of the cache or the rows, or `input_ids` (n, L) and `attention_mask`,
      padded on the left, with `pooling_mask` if the rows have one;
    - `caption_ids` (n,) and `image_caption_ids` (n, K), padded with -1, if the rows have ids or captions: caption j is
      a correct answer for image i if `caption_ids[j]` is in `image_caption_ids[i]`;
    - `keys`: the keys of the rows, if they have a `key`, for messages;
    - `skipped`: (key, reason) of each row that cannot be used. These are left out, so that the batches of two ranks
      can differ in size.

    Args:
        cache: Embedding cache with every caption, for rows with a `caption`.
        processor: `LLM2CLIPProcessor`, for rows with an `image`, or with a `caption` if there is no cache; an image
            processor or a tokenizer is enough for one of them.
        on_error: `raise` the error of a row with an image or caption that cannot be used, or with a caption that the
            cache lacks, or `skip` the row.
        image_column, caption_column: Names of `image` and `caption` in the rows.
        crop_scale: Smallest and largest area of a random crop of an `image`, as a share of it; None prepares it as in
            evaluation.
        image_backend: Decoder of an `image`: `exact` is Pillow, as in inference; `fast` is torchvision for JPEGs.

    Raises:
        ValueError: If `on_error` is neither.
    """

    def __init__(
        self,
        cache: EmbeddingCache | None = None,
        processor: Callable[..., Any] | None = None,
        on_error: OnError = "raise",
        image_column: str = "image",
        caption_column: str = "caption",
        crop_scale: Sequence[float] | None = None,
        image_backend: ImageBackend = "exact",
    ) -> None:
        require_choice("on_error", on_error, OnError)
        self.cache, self.on_error = cache, on_error
        self.image_column, self.caption_column = image_column, caption_column
        self.crop_scale, self.image_backend = crop_scale, image_backend
        self.is_training = self.with_ids = True
        is_image_processor = isinstance(processor, BaseImageProcessor)
        self.image_processor: Any = processor if is_image_processor else getattr(processor, "image_processor", None)
        self.tokenize = None if is_image_processor else processor

    def for_evaluation(self) -> Stage2Collator:
        """Return a collator that does not crop, and takes the first caption of a list."""
        other = copy.copy(self)
        other.crop_scale, other.is_training = None, False
        other.__dict__.pop("_transforms", None)
        return other

    def for_run(self, cache: EmbeddingCache | None, with_ids: bool) -> Stage2Collator:
        """Return the collator of a run.

        Args:
            cache: Its cache, for a collator without one.
            with_ids: Whether the loss tells by ids which rows share a caption; without, no text is hashed for them.
        """
        other = copy.copy(self)
        other.cache, other.with_ids = self.cache or cache, with_ids
        return other

    @cached_property
    def _transforms(self) -> tuple[EvalTransform, TrainTransform | None]:
        evaluation = EvalTransform(self.image_processor, self.image_backend)
        if self.crop_scale is None:
            return evaluation, None
        return evaluation, TrainTransform(self.image_processor, (self.crop_scale[0], self.crop_scale[1]))

    def __call__(self, samples: Sequence[dict[str, Any]] | Mapping[str, Any]) -> dict[str, Any]:
        """Collate rows; a batch that is whole already, as stored rows come, is returned as it is.

        Raises:
            ValueError: If every row is skipped, or rows lack a key or differ in their keys.
            MissingCaptionError: If a cache lacks a caption, and `on_error` is `raise`.
            SampleError: If an `image` or `caption` cannot be used, and `on_error` is `raise`.
        """
        if isinstance(samples, Mapping):
            return dict(samples)
        skipped = list[SkippedSample]()
        prepared = [self._prepared(sample, number, skipped) for number, sample in enumerate(samples)]
        rows, embeds = [row for row in prepared if row is not None], None
        if _any_has(rows, "_captions") and (self.cache is not None or _any_has(rows, "embedding_cache")):
            rows, embeds = self._embedded(rows, skipped)
        if not rows:
            raise unusable_batch_error(skipped)
        batch: dict[str, Any] = {**self._images(rows), **self._captions(rows, embeds)}
        if self.with_ids:
            batch |= _ids(rows)
        if _any_has(rows, "key"):
            batch["keys"] = list(map(str, _column(rows, "key")))
        batch["skipped"] = [tuple(sample) for sample in skipped]
        return batch

    def _prepared(self, row: dict[str, Any], number: int, skipped: list[SkippedSample]) -> dict[str, Any] | None:
        """Decode the image of a row and draw its caption, unless they are prepared; None if the row is skipped."""
        names = {self.image_column: "image", self.caption_column: "caption"}
        hidden = {*names.values()} - {*names}
        row = {names.get(name, name): value for name, value in row.items() if name not in hidden}
        key = str(row.get("key") or _name(row, number))
        try:
            if self.image_processor is not None and "image" in row and "pixel_values" not in row:
                row["pixel_values"], row["_prepared"] = self._pixels(row, key), True
            if "caption" in row and not {"llm_embeds", "input_ids"} & set(row):
                value = row["caption"] if isinstance(row["caption"], Mapping) else {"caption": row["caption"]}
                captions = captions_of(value, key, value, row.get("caption_weights"))
                row["caption"], row["_captions"] = self._drawn(row, captions), captions
        except SampleError as error:
            if self.on_error == "raise":
                raise
            skipped.append(SkippedSample(error.key, error.reason or str(error)))
            return None
        return row

    def _pixels(self, row: Mapping[str, Any], key: str) -> Tensor:
        evaluation, training = self._transforms
        image = evaluation.decode(row["image"], key)
        if training is None or (seed := self._seed(row, "crop")) is None:
            return evaluation(image, key)
        return training(image, seed)

    def _drawn(self, row: Mapping[str, Any], captions: RowCaptions) -> str:
        if len(captions.texts) == 1 or (seed := self._seed(row, "caption")) is None:
            return captions.texts[0]
        return draw_caption(captions, seed)

    def _seed(self, row: Mapping[str, Any], purpose: str) -> int | None:
        """Return the seed of a random part of a row, or None where nothing is drawn."""
        if not self.is_training:
            return None
        if "seed_parts" not in row:
            return int(torch.randint(2**62, ()))
        if row["seed_parts"] is None:
            return None
        seed, *parts = row["seed_parts"]
        return stable_seed(seed, purpose, *parts)

    def _embedded(
        self, rows: list[dict[str, Any]], skipped: list[SkippedSample]
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Look up the captions of a batch, once in each cache; returns the rows that have an embedding, and these."""
        of_cache: dict[int, list[int]] = {}
        captions = _column(rows, "caption")
        caches = [cast(EmbeddingCache, row.get("embedding_cache", self.cache)) for row in rows]
        for position, cache in enumerate(caches):
            of_cache.setdefault(id(cache), []).append(position)
        stored, kept, parts = np.empty(len(rows), dtype=np.int64), list[int](), list[Tensor]()
        for positions in of_cache.values():
            cache, texts = caches[positions[0]], [captions[position] for position in positions]
            stored[positions] = cache.rows(texts) if self.on_error == "raise" else cache.find(caption_keys(texts))
            if found := [position for position in positions if stored[position] >= 0]:
                kept += found
                parts.append(cache.read(stored[found]))
        lacking = [rows[position] for position in np.flatnonzero(stored < 0)]
        skipped += [SkippedSample(str(row.get("key", row["caption"])), NO_EMBEDDING) for row in lacking]
        if not kept:
            return [], None
        embeds = parts[0] if len(parts) == 1 else torch.cat(parts)[torch.tensor(kept).argsort()]
        return [rows[position] for position in sorted(kept)], embeds

    def _lacks(self, row: dict[str, Any]) -> str:
        columns = f"image_column is {self.image_column!r}, and caption_column {self.caption_column!r}"
        return f", but has {', '.join(name for name in row if name[:1] != '_')} ({columns})"

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

    def _captions(self, rows: Sequence[dict[str, Any]], embeds: Tensor | None) -> dict[str, Tensor]:
        """Return the text inputs of a batch; `embeds` are those that were looked up."""
        if embeds is not None:
            return {"llm_embeds": embeds}
        if "llm_embeds" in rows[0]:
            return {"llm_embeds": torch.stack([torch.as_tensor(embeds) for embeds in _column(rows, "llm_embeds")])}
        if "input_ids" in rows[0]:
            tokens = {name: _column(rows, name) for name in TOKEN_FIELDS if _any_has(rows, name)}
            tokens.setdefault("attention_mask", [[1] * len(ids) for ids in tokens["input_ids"]])
            return {name: _pad(values, 0, "left") for name, values in tokens.items()}
        if "caption" not in rows[0]:
            raise ValueError(f"A row needs llm_embeds, input_ids or caption{self._lacks(rows[0])}.")
        captions = _column(rows, "caption")
        if self.tokenize is None:
            raise ValueError(
                "Rows with a caption need Stage2Collator(cache=...) or Stage2Collator(processor=...) with the "
                "tokenizer of the LLM."
            )
        tokens = self.tokenize(text=captions, padding=True, truncation=True, return_tensors="pt")
        # Some tokenizers return more, such as token_type_ids.
        return {name: tokens[name] for name in TOKEN_FIELDS if name in tokens}


def _ids(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the ids of the captions of a batch: those that the rows have, or those of their texts."""
    if _any_has(rows, "caption_id"):
        ids = _column(rows, "caption_id")
        known = _any_has(rows, "image_caption_ids")
        ids_of_images = _column(rows, "image_caption_ids") if known else [[number] for number in ids]
    elif _any_has(rows, "image_caption_ids"):
        raise ValueError("Rows with image_caption_ids need a caption_id as well.")
    elif _any_has(rows, "_captions"):
        ids, ids_of_images = [], []
        for row, captions in zip(rows, _column(rows, "_captions"), strict=True):
            of_image = list(map(caption_id, captions.texts))
            ids.append(of_image[captions.texts.index(row["caption"])])
            ids_of_images.append(list(dict.fromkeys(of_image)))
    else:
        return {}
    padded = _pad([torch.as_tensor(own, dtype=torch.int64) for own in ids_of_images], -1)
    return {"caption_ids": torch.tensor(ids, dtype=torch.int64), "image_caption_ids": padded}


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
