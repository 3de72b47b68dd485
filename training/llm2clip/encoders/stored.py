"""An LLM2CLIP model whose LLM, and perhaps vision tower, has been run before: their outputs are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.encoders.cache_of_model import open_cache_of_model
from llm2clip.encoders.image_features import ImageFeatures
from llm2clip.encoders.loop import EncodedRows, run_model
from llm2clip.encoders.ours import OurEncoder
from llm2clip.files.atomic import digest_json
from llm2clip.models.embeddings import require_finite_rows
from llm2clip.models.identity import tokenizer_fingerprint, weights_checksum
from modeling_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError
from modeling_llm2clip.modeling_llm2clip_utils import unit_features

# Rows that pass through the adapter or the projection at once.
BATCH = 4096


class StoredEncoder(OurEncoder):
    """A model that embeds texts from the LLM's embeddings of them, and images from the features of its tower.

    Args:
        model, processor, options: See [`OurEncoder`]; the model's LLM is not used.
        lookup: Maps texts to the LLM's embeddings, `(texts, hidden_size)`: the `lookup` of a cache, or an LLM.
        features: Stored features of all images; None runs the vision tower.
        made_by: Identity of what `lookup` reads, for stored rows.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        lookup: Callable[[list[str]], Tensor],
        features: ImageFeatures | None = None,
        made_by: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, processor, **options)
        self.lookup, self.features, self.made_by = lookup, features, made_by

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "lookup": None, "features": None}

    def settings(self) -> dict[str, Any]:
        return super().settings() | self._text_settings()

    def _text_settings(self) -> dict[str, Any]:
        adapter = [weights_checksum(self.model.text_adapter), self.model.config.adapter_normalize]
        tokenizer = None if self.tokenizer is None else tokenizer_fingerprint(self.tokenizer)
        return {"text": self.made_by, "tokenizer": tokenizer, "adapter": adapter}

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        if self.tokenizer is not None:
            return super().text_lengths(texts)
        # Such as of two text encoders, which have read other tokens each.
        return torch.full((len(texts),), -1), torch.zeros(len(texts), dtype=torch.bool)

    def encode_text(
        self, texts: Sequence[str] | str, batch_size: int | None = None, show_progress_bar: bool = False
    ) -> Tensor:
        """Embed texts from the LLM's embeddings of them; see [`Encoder.encode_text`]."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        llm_embeds = self.lookup(texts)
        require_finite_rows(llm_embeds, lambda row: f"{texts[row]:.80}", "captions (by the LLM)")
        parts = self._run(
            range(len(texts)),
            lambda rows: llm_embeds[rows],
            lambda part: self.model.get_text_features(llm_embeds=part),
        )
        embeds = self.compact(torch.cat([torch.empty(0, self.full_width), *parts]))
        require_finite_rows(embeds, lambda row: f"{texts[row]:.80}", "captions (by the adapter)")
        return embeds

    def _run(
        self, rows: Sequence[int], read: Callable[[Any], Tensor], forward: Callable[[Tensor], Any]
    ) -> Iterator[Tensor]:
        """Yield what a part of the model makes of stored rows, of unit length."""
        batches = np.split(np.asarray(rows, dtype=np.int64), range(BATCH, len(rows), BATCH))
        for *_, output in run_model(self.model, batches, read, lambda part: unit_features(forward(part))):
            yield output

    def encode_image_parts(
        self, images: Any, rows: Sequence[int], *args: Any, **options: Any
    ) -> Iterator[EncodedRows]:
        if self.features is None:
            yield from super().encode_image_parts(images, rows, *args, **options)
            return
        stored_rows = self.features.find(images.content_keys()[np.asarray(rows, dtype=np.int64)])
        reasons = [
            self.features.skipped[stored_row].reason if stored_row in self.features.skipped else None
            for stored_row in stored_rows.tolist()
        ]
        if any(reasons) and options.get("on_error", "raise") == "raise":
            raise DamagedImageError(
                *next((images.key(row), why) for row, why in zip(rows, reasons, strict=True) if why)
            )
        parts = self._run(
            stored_rows.tolist(),
            self.features.read_views,
            lambda part: self.model.get_image_features(vision_features=part),
        )
        embeds = self.compact(torch.cat(list(parts)))
        read = [row for row, reason in enumerate(reasons) if reason is None]
        require_finite_rows(embeds[read], lambda row: images.key(rows[read[row]]), "images")
        yield EncodedRows(list(rows), embeds, reasons)


def open_stored_encoder(
    name: str,
    cache: str | Sequence[str],
    revision: str | None = None,
    dtype: str = "float32",
    device: torch.device | None = None,
) -> StoredEncoder:
    """Open an LLM2CLIP model without its LLM, whose embeddings of texts are read from a cache.

    Args:
        name, revision, dtype, device: See [`load_encoder`](llm2clip.encoders.load.load_encoder).
        cache: Folder of an embedding cache, from `llm2clip embed`, or those of the two whose rows a model takes side
            by side.

    Raises:
        OSError: There is no such model.
        StoreError: There is no complete cache, or another encoder made it.
        ValueError: It is another kind of model.
    """
    opened = OurEncoder.load(name, revision, ["image", "text"], device=device, dtype=dtype, text_model=False)
    assert opened.transform is not None
    stored = open_cache_of_model(cache, opened.model.config, opened.tokenizer)
    processor: Any = opened.transform.image_processor
    if opened.tokenizer is not None:
        processor = LLM2CLIPProcessor(processor, opened.tokenizer)
    made_by = digest_json({"rows": stored.manifest.dtype, **stored.manifest.identity})
    return StoredEncoder(opened.model, processor, stored.lookup, made_by=made_by, name=name, revision=revision)
