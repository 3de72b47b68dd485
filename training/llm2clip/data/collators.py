"""Batches for stage 2, and the list of rows that were left out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from llm2clip.data.records import SkippedSample

logger = logging.getLogger(__name__)


class PixelBatch(NamedTuple):
    """Prepared images, and those that could not be prepared.

    Attributes:
        pixels: (good, 3, H, W) float32 of the images that are not skipped, in order; None if all are.
        skipped: For each of the n images what is wrong with it, or None.
    """

    pixels: Tensor | None
    skipped: list[SkippedSample | None]

    @property
    def good(self) -> list[int]:
        """Which of the n images `pixels` holds."""
        return [index for index, sample in enumerate(self.skipped) if sample is None]


def stack_pixels(samples: Sequence[Tensor | SkippedSample]) -> PixelBatch:
    """Put images into one tensor: a worker process sends each tensor through a file descriptor, and those are few.

    Args:
        samples: n prepared images (3, H, W), or what is wrong with them.
    """
    good = [sample for sample in samples if isinstance(sample, Tensor)]
    skipped = [sample if isinstance(sample, SkippedSample) else None for sample in samples]
    return PixelBatch(torch.stack(good) if good else None, skipped)


class EmbeddingLookup(Protocol):
    """Stored caption embeddings, such as [`EmbeddingCache`]."""

    def lookup(self, captions: Sequence[str], dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Embeddings of captions, `(captions, hidden_size)`; `dtype=None` keeps the stored dtype."""
        ...


class Stage2Collator:
    """Puts samples of `CaptionImageDataset` into a batch.

    The batch holds, for the n samples that are not skipped:

    - `pixel_values`: (n, 3, H, W) float32, or `vision_states`: (n, tokens, width), what frozen layers made of them;
    - `caption_ids`: (n,) int64, and `image_caption_ids`: (n, K) int64 padded with -1: caption j is a correct answer
      for image i if `caption_ids[j]` is in `image_caption_ids[i]`;
    - `llm_embeds`: (n, hidden) in the 16 bits of the cache, which the model converts on its device, or `input_ids`,
      `attention_mask` (and what else the processor makes) for an LLM that runs during training;
    - `skipped`: a list of (key, reason).

    A batch is smaller than the batch size when samples were skipped, so ranks can hold different numbers.

    Args:
        cache: Embedding cache that holds every caption.
        processor: The text half of an `LLM2CLIPProcessor` or its tokenizer, called as
            `processor(text=captions, padding=True, truncation=True, return_tensors="pt")`.

    Raises:
        ValueError: If both or neither of cache and processor are given.
    """

    def __init__(self, cache: EmbeddingLookup | None = None, processor: Callable[..., Any] | None = None) -> None:
        if (cache is None) == (processor is None):
            raise ValueError("Stage2Collator needs either an embedding cache or a processor.")
        self.cache = cache
        self.processor = processor

    def __call__(self, samples: Sequence[dict[str, Any] | SkippedSample]) -> dict[str, Any]:
        """Collate samples.

        Raises:
            ValueError: If every sample was skipped.
            MissingCaptionError: If the cache lacks a caption.
        """
        skipped = [sample for sample in samples if isinstance(sample, SkippedSample)]
        kept = [sample for sample in samples if not isinstance(sample, SkippedSample)]
        if not kept:
            shown = "; ".join(f"{key}: {reason}" for key, reason in skipped[:3])
            raise ValueError(
                f"All {len(skipped)} samples of a batch were skipped, so something is wrong with the whole source. "
                f"The first: {shown}."
            )
        captions = [sample["caption"] for sample in kept]
        batch: dict[str, Any] = {}
        for name in ("pixel_values", "vision_states"):
            if name in kept[0]:
                batch[name] = torch.stack([sample[name] for sample in kept])
        batch["caption_ids"] = torch.tensor([sample["caption_id"] for sample in kept], dtype=torch.int64)
        batch["image_caption_ids"] = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(sample["image_caption_ids"], dtype=torch.int64) for sample in kept],
            batch_first=True,
            padding_value=-1,
        )
        if self.cache is not None:
            batch["llm_embeds"] = self.cache.lookup(captions, dtype=None)
        elif self.processor is not None:
            batch.update(self.processor(text=captions, padding=True, truncation=True, return_tensors="pt"))
        batch["skipped"] = [tuple(sample) for sample in skipped]
        return batch


class SkipLog:
    """A file of the rows that were left out: one JSON line with key and reason, each key once.

    An existing file is continued, so that a resumed run does not list a row twice. Every process needs a file of
    its own.

    Args:
        path: The file; it appears with the first entry.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._keys: set[str] = set()
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):  # the run was killed while it wrote the last line
                self.path.write_bytes(whole)
            self._keys.update(json.loads(line)["key"] for line in whole.splitlines())

    @property
    def count(self) -> int:
        """Number of different rows listed."""
        return len(self._keys)

    def add(self, skipped: Iterable[tuple[str, str]]) -> int:
        """Append the (key, reason) pairs whose key is new; returns how many were."""
        new: dict[str, str] = {}
        for key, reason in skipped:
            if key not in self._keys:
                new.setdefault(key, reason)
        if new:
            if not self._keys:
                logger.warning("Rows that cannot be used are skipped and listed in %s.", self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                for key, reason in new.items():
                    file.write(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")
            self._keys.update(new)
        return len(new)
