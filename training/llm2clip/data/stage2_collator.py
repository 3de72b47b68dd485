"""Batches for stage 2: images, caption embeddings or tokens, and caption ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm2clip.data.records import NO_EMBEDDING, OnError, RowCaptions, SkippedSample
from llm2clip.store.captions import EmbeddingCache
from modeling_llm2clip.image_decoding_llm2clip import decode_image

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
    - `is_empty`: with `on_error="skip"`, of a batch whose samples are all skipped; the tensors are those of a row of
      an earlier batch, since towers take no empty batch, and count for nothing;
    - `skipped`: (key, reason) of each [`SkippedSample`] among the samples. These are left out, so that the batches of
      two ranks can differ in size.

    Args:
        cache: Embedding cache with every caption, for rows with a `caption`.
        processor: `LLM2CLIPProcessor`, for rows with an `image`, or with a `caption` if there is no cache; for
            captions its tokenizer is enough.
        on_error: `raise` an error for a caption that the cache lacks, or `skip` its row.
    """

    def __init__(
        self,
        cache: EmbeddingCache | None = None,
        processor: Callable[..., Any] | None = None,
        on_error: OnError = "raise",
    ) -> None:
        self.cache, self.processor, self.on_error = cache, processor, on_error
        self._example: dict[str, Any] = {}

    def __call__(self, samples: Sequence[dict[str, Any] | SkippedSample]) -> dict[str, Any]:
        """Collate rows.

        Raises:
            ValueError: If every sample of the first batch was skipped, or rows lack a key or differ in their keys.
            MissingCaptionError: If the cache lacks a caption, and `on_error` is `raise`.
            SampleError: If an `image` or `caption` cannot be used.
        """
        skipped = [sample for sample in samples if isinstance(sample, SkippedSample)]
        rows = [sample for sample in samples if not isinstance(sample, SkippedSample)]
        if self.cache is not None and self.on_error == "skip" and _any_has(rows, "caption"):
            found = self.cache.contains([_caption(row, number) for number, row in enumerate(rows)])
            lacking = [row for row, is_there in zip(rows, found.tolist(), strict=True) if not is_there]
            skipped += [SkippedSample(str(row.get("key", row["caption"])), NO_EMBEDDING) for row in lacking]
            rows = [row for row, is_there in zip(rows, found.tolist(), strict=True) if is_there]
        if not rows and self._example:
            return {**self._example, "is_empty": True, "skipped": [tuple(sample) for sample in skipped]}
        if not rows:
            shown = "; ".join(f"{key}: {reason}" for key, reason in skipped[:3])
            raise ValueError(
                f"All {len(skipped)} samples of the first batch were skipped, which suggests a problem with the whole "
                f"source: {shown}."
            )
        batch: dict[str, Any] = {**self._images(rows), **self._captions(rows)}
        if _any_has(rows, "caption_id"):
            ids = _column(rows, "caption_id")
            known = _any_has(rows, "image_caption_ids")
            all_ids = _column(rows, "image_caption_ids") if known else [[one] for one in ids]
            batch["caption_ids"] = torch.tensor(ids, dtype=torch.int64)
            batch["image_caption_ids"] = _pad([torch.as_tensor(some, dtype=torch.int64) for some in all_ids], -1)
        elif _any_has(rows, "image_caption_ids"):
            raise ValueError("Rows with image_caption_ids need a caption_id as well.")
        if self.on_error == "skip":
            self._example = {name: values[:1].clone() for name, values in batch.items()}
        if _any_has(rows, "key"):
            batch["keys"] = list(map(str, _column(rows, "key")))
        batch["skipped"] = [tuple(sample) for sample in skipped]
        return batch

    def _images(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        for name in ("pixel_values", "vision_states"):
            if name in rows[0]:
                return {name: torch.stack([torch.as_tensor(values) for values in _column(rows, name)])}
        if "image" not in rows[0]:
            raise ValueError(f"A row needs pixel_values, vision_states or image, but has {', '.join(rows[0])}.")
        image_processor = getattr(self.processor, "image_processor", None)
        if image_processor is None:
            raise ValueError("Rows with an image need Stage2Collator(processor=...) with an image processor.")
        keys = [str(row.get("key", number)) for number, row in enumerate(rows)]
        images = list(map(decode_image, _column(rows, "image"), keys))
        return {"pixel_values": image_processor(images=images, return_tensors="pt")["pixel_values"]}

    def _captions(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if "llm_embeds" in rows[0]:
            return {"llm_embeds": torch.stack([torch.as_tensor(embeds) for embeds in _column(rows, "llm_embeds")])}
        if "input_ids" in rows[0]:
            tokens = {name: _column(rows, name) for name in TOKEN_FIELDS if _any_has(rows, name)}
            tokens.setdefault("attention_mask", [[1] * len(ids) for ids in tokens["input_ids"]])
            return {name: _pad(values, 0, "left") for name, values in tokens.items()}
        if "caption" not in rows[0]:
            raise ValueError(f"A row needs llm_embeds, input_ids or caption, but has {', '.join(rows[0])}.")
        captions = [_caption(row, number) for number, row in enumerate(rows)]
        if self.cache is not None:
            return {"llm_embeds": self.cache.lookup(captions, dtype=None)}
        if self.processor is None:
            raise ValueError("Rows with a caption need Stage2Collator(cache=...) or Stage2Collator(processor=...).")
        return dict(self.processor(text=captions, padding=True, truncation=True, return_tensors="pt"))


def _caption(row: dict[str, Any], number: int) -> str:
    return RowCaptions.of(row, str(row.get("key", number)), ["caption"], None).texts[0]


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
