"""An LLM2CLIP model whose LLM, and perhaps vision tower, has been run before: their outputs are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llm2clip.data import OnError
from llm2clip.encoders.cache_of_model import open_cache_of_model
from llm2clip.encoders.image_features import ImageFeatures
from llm2clip.encoders.images import ImageSet
from llm2clip.encoders.loop import PreparedImages, TokenizedTexts, encode_images
from llm2clip.encoders.ours import OurEncoder
from llm2clip.files.atomic import digest_json
from llm2clip.models.identity import tokenizer_fingerprint, weights_checksum
from llm2clip.store.shards import ComputedRows
from modeling_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError
from modeling_llm2clip.modeling_llm2clip_utils import unit_features


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

    def tokenized(self, texts: list[str]) -> TokenizedTexts:
        """See [`Encoder.tokenized`]; instead of the tokens of texts, the LLM's embeddings of them."""
        llm_embeds = self.lookup(texts)

        def forward(part: Tensor) -> Tensor:
            return unit_features(self.model.get_text_features(llm_embeds=part))

        return TokenizedTexts(self.model, self.device, [1] * len(texts), lambda rows: llm_embeds[rows], forward)

    def encode_image_parts(
        self,
        images: ImageSet,
        rows: Sequence[int],
        batch_size: int = 64,
        num_workers: int = 0,
        on_error: OnError = "raise",
        forward: Callable[[dict[str, Tensor]], Tensor] | None = None,
    ) -> Iterator[ComputedRows]:
        """See [`Encoder.encode_image_parts`]; to read stored features takes no workers."""
        if self.features is None:
            return super().encode_image_parts(images, rows, batch_size, num_workers, on_error, forward)
        stored = _StoredImages(images, self.features, on_error)
        return encode_images(self.model, stored, rows, forward or self.forward_images, self.width, batch_size)

    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        if self.features is None:
            return super().image_features(inputs)
        return self.model.get_image_features(**inputs).pooler_output

    def pooled_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return super().pooled_features(inputs) if self.features is None else inputs["vision_features"]


class _StoredImages(PreparedImages):
    """The stored features of images."""

    def __init__(self, images: ImageSet, features: ImageFeatures, on_error: OnError) -> None:
        super().__init__(images, lambda row, key: {"vision_features": features.read_views(row)[0].float()}, on_error)
        self.features, self.stored_rows = features, features.find(images.content_keys())

    def inputs(self, row: int) -> dict[str, Tensor]:
        stored, key = self.stored_rows[row : row + 1], self.images.key(row)
        if int(stored[0]) in self.features.skipped:
            raise DamagedImageError(key, self.features.skipped[int(stored[0])].reason)
        return self.prepare(stored, key)


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
