"""Batches for stage 2: images, caption embeddings or tokens, and caption ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm2clip.data.captioned_images import NO_EMBEDDING, OnError, RowCaptions, SkippedSample
from llm2clip.store.store import EmbeddingCache, caption_keys
from modeling_llm2clip.image_decoding_llm2clip import DEFAULT_MAX_PIXELS, SampleError, decode_image

TOKEN_FIELDS = ("input_ids", "attention_mask", "pooling_mask")


class Stage2Collator:
    """Builds stage-2 batches from rows of images and captions.

    A row is a dict from any map-style or iterable data set, [`CaptionImageDataset`] being one. All rows of a batch
    need the same keys:

    - the image as `pixel_values` (3, H, W), as `vision_states` (tokens, width) that frozen layers made of it, or as
      `image`: a PIL image, encoded bytes or a path, prepared by the processor as in evaluation;
    - its caption as `llm_embeds` (hidden_size,), as `input_ids` (L,) with optional `attention_mask` and
      `pooling_mask`, where L may differ between rows, or as `caption`: a text for the cache or else the processor;
    - optionally `caption_id`, an int64 >= 0 that equal captions share, and `image_caption_ids`, the ids of all
      captions of the image (by default `caption_id` alone). Without ids, a caption matches the image of its own row
      only; [`caption_id`] makes them from texts.

    The batch contains, for n rows:

    - `pixel_values` (n, 3, H, W) or `vision_states` (n, tokens, width);
    - `llm_embeds` (n, hidden_size) in the dtype of the cache or the rows, or `input_ids` (n, L) and `attention_mask`,
      padded on the left, with `pooling_mask` if the rows have one;
    - `caption_ids` (n,) and `image_caption_ids` (n, K), padded with -1, if the rows have ids: caption j is a correct
      answer for image i if `caption_ids[j]` is in `image_caption_ids[i]`;
    - `keys`: the keys of the rows, if they have a `key`, for messages;
    - `is_empty`: with `on_error="skip"`, of a batch whose samples are all skipped, which has no tensors;
    - `skipped`: (key, reason) of each [`SkippedSample`] among the samples. These are left out, so that the batches of
      two ranks can differ in size.

    Args:
        cache: Embedding cache with every caption, for rows with a `caption`.
        processor: `LLM2CLIPProcessor`, for rows with an `image`, or with a `caption` if there is no cache; for
            captions its tokenizer is enough.
        on_error: `raise` the error of a row with an image or caption that cannot be used, or with a caption that the
            cache lacks, or `skip` the row.
        max_pixels: Largest `image` that is decoded, width x height.
    """

    def __init__(
        self,
        cache: EmbeddingCache | None = None,
        processor: Callable[..., Any] | None = None,
        on_error: OnError = "raise",
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        self.cache, self.processor, self.on_error, self.max_pixels = cache, processor, on_error, max_pixels

    def __call__(self, samples: Sequence[dict[str, Any] | SkippedSample]) -> dict[str, Any]:
        """Collate rows.

        Raises:
            ValueError: If every sample was skipped and `on_error` is `raise`, or rows lack a key or differ in
                their keys.
            MissingCaptionError: If the cache lacks a caption, and `on_error` is `raise`.
            SampleError: If an `image` or `caption` cannot be used, and `on_error` is `raise`.
        """
        rows, skipped = list[dict[str, Any]](), list[SkippedSample]()
        for number, sample in enumerate(samples):
            found = sample if isinstance(sample, SkippedSample) else self._checked(sample, number)
            if isinstance(found, SkippedSample):
                skipped.append(found)
            else:
                rows.append(found)
        stored: np.ndarray | None = None
        if self.cache is not None and self.on_error == "skip" and _any_has(rows, "caption"):
            stored = self.cache.find(caption_keys(_column(rows, "caption")))
            lacking = [rows[place] for place in np.flatnonzero(stored < 0)]
            skipped += [SkippedSample(str(row.get("key", row["caption"])), NO_EMBEDDING) for row in lacking]
            rows, stored = [rows[place] for place in np.flatnonzero(stored >= 0)], stored[stored >= 0]
        if not rows and self.on_error == "skip":
            return {"is_empty": True, "skipped": [tuple(sample) for sample in skipped]}
        if not rows:
            shown = "; ".join(f"{key}: {reason}" for key, reason in skipped[:3])
            raise ValueError(
                f"All {len(skipped)} samples of a batch were skipped, and on_error is 'raise'; the first: {shown}."
            )
        batch: dict[str, Any] = {**self._images(rows), **self._captions(rows, stored)}
        if _any_has(rows, "caption_id"):
            ids = _column(rows, "caption_id")
            known = _any_has(rows, "image_caption_ids")
            all_ids = _column(rows, "image_caption_ids") if known else [[one] for one in ids]
            batch["caption_ids"] = torch.tensor(ids, dtype=torch.int64)
            batch["image_caption_ids"] = _pad([torch.as_tensor(some, dtype=torch.int64) for some in all_ids], -1)
        elif _any_has(rows, "image_caption_ids"):
            raise ValueError("Rows with image_caption_ids need a caption_id as well.")
        if _any_has(rows, "key"):
            batch["keys"] = list(map(str, _column(rows, "key")))
        batch["skipped"] = [tuple(sample) for sample in skipped]
        return batch

    def _checked(self, row: dict[str, Any], number: int) -> dict[str, Any] | SkippedSample:
        """Decode the image of a row and choose its caption, as far as it has none that is prepared."""
        key, row = str(row.get("key", number)), dict(row)
        try:
            has_processor = getattr(self.processor, "image_processor", None) is not None
            if has_processor and "image" in row and not {"pixel_values", "vision_states"} & set(row):
                row["image"] = decode_image(row["image"], key, self.max_pixels)
            if "caption" in row and not {"llm_embeds", "input_ids"} & set(row):
                row["caption"] = RowCaptions.of(row, key, ["caption"], None).texts[0]
        except SampleError as error:
            if self.on_error == "raise":
                raise
            return SkippedSample(error.key, error.reason or str(error))
        return row

    def _images(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        for name in ("pixel_values", "vision_states"):
            if name in rows[0]:
                return {name: torch.stack([torch.as_tensor(values) for values in _column(rows, name)])}
        if "image" not in rows[0]:
            raise ValueError(f"A row needs pixel_values, vision_states or image, but has {', '.join(rows[0])}.")
        image_processor = getattr(self.processor, "image_processor", None)
        if image_processor is None:
            raise ValueError("Rows with an image need Stage2Collator(processor=...) with an image processor.")
        return {"pixel_values": image_processor(images=_column(rows, "image"), return_tensors="pt")["pixel_values"]}

    def _captions(self, rows: Sequence[dict[str, Any]], stored: np.ndarray | None) -> dict[str, Tensor]:
        """Return the text inputs of a batch; `stored` are the rows of the cache, if they have been looked up."""
        if "llm_embeds" in rows[0]:
            return {"llm_embeds": torch.stack([torch.as_tensor(embeds) for embeds in _column(rows, "llm_embeds")])}
        if "input_ids" in rows[0]:
            tokens = {name: _column(rows, name) for name in TOKEN_FIELDS if _any_has(rows, name)}
            tokens.setdefault("attention_mask", [[1] * len(ids) for ids in tokens["input_ids"]])
            return {name: _pad(values, 0, "left") for name, values in tokens.items()}
        if "caption" not in rows[0]:
            raise ValueError(f"A row needs llm_embeds, input_ids or caption, but has {', '.join(rows[0])}.")
        captions = _column(rows, "caption")
        if self.cache is not None:
            found = self.cache.lookup(captions, dtype=None) if stored is None else self.cache.read(stored)
            return {"llm_embeds": found}
        if self.processor is None:
            raise ValueError("Rows with a caption need Stage2Collator(cache=...) or Stage2Collator(processor=...).")
        return dict(self.processor(text=captions, padding=True, truncation=True, return_tensors="pt"))


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
