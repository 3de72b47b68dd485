"""Image-text retrieval of a model on a data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from llm2clip.data import DEFAULT_MAX_PIXELS, CaptionSource, OnError, caption_id, decode_image, load_source
from llm2clip.data.captioned_images import column_texts
from llm2clip.data.sources import source_columns
from llm2clip.encoders.batches import TableImages, encode_sharded
from llm2clip.encoders.encoder import NOT_FINITE
from llm2clip.encoders.image_features import ImageFeatures
from llm2clip.encoders.ours import OurEncoder
from llm2clip.evaluation.metrics import retrieval_metrics
from llm2clip.utils.embeddings import require_finite_rows
from llm2clip.utils.logs import shortened
from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.modeling_llm2clip_utils import unit_features

logger = logging.getLogger(__name__)

BATCH = 4096


Positives = Literal["distinct", "rows"]


class ImageTextRetrieval:
    """The images and the captions of a source, and which caption belongs to which image.

    An image may have several captions. An image whose caption columns are all empty is a candidate that is never
    correct.

    Args:
        source: The data; all its captions are queries.
        image_processor: Prepares the images.
        on_error: `raise` the error of an image that cannot be read, or `skip` the image and log it.
        max_pixels: Largest width x height of an image that is decoded.
        positives: `distinct`: equal captions are one query, which is right for all images that have it, in whatever
            case and white space. `rows`, the rule of published benchmarks: each caption of each row is a
            query, repeats included, and the image of its row alone is right.

    Attributes:
        captions: The captions that are queries.
        image_captions: The captions of each image.
        features: Stored features of all images, from which they are embedded if set; see [`ImageFeatures`].

    Raises:
        ValueError: No row has a caption.
    """

    def __init__(
        self,
        source: CaptionSource,
        image_processor: BaseImageProcessor,
        on_error: OnError = "raise",
        max_pixels: int = DEFAULT_MAX_PIXELS,
        positives: Positives = "distinct",
    ) -> None:
        self.positives = positives
        self.source = replace(source, streaming=False)
        self.image_processor = image_processor
        self.on_error = on_error
        self.features: ImageFeatures | None = None
        table = load_source(self.source)
        assert isinstance(table, datasets.Dataset)
        columns = source_columns(self.source, table)
        self.images = TableImages(table, columns, max_pixels)
        texts = table.remove_columns([name for name in (columns.image, columns.key) if name is not None])
        rows = [[text for column in columns.captions for text in column_texts(row, column)] for row in texts]
        self.image_captions = rows if positives == "rows" else [list(dict.fromkeys(captions)) for captions in rows]
        captions = [text for captions in self.image_captions for text in captions]
        self.captions = captions if positives == "rows" else list(dict.fromkeys(captions))
        if not self.captions:
            raise ValueError(f"no row of {source.path} has a caption in {', '.join(source.caption_columns)}.")

    def image(self, row: int) -> Image.Image:
        """Decode the image of a row."""
        return self.images.decode(row, decode_image)

    def matches(self, rows: Sequence[int]) -> Tensor:
        """Pair captions with the images of `rows` that they belong to.

        Returns:
            `(pairs, 2)` int64: index into `captions`, index into `rows`.
        """
        if self.positives == "rows":
            owners = torch.tensor([row for row, captions in enumerate(self.image_captions) for _ in captions])
            positions = torch.full((len(self.images),), -1).index_put_((torch.tensor(rows),), torch.arange(len(rows)))
            kept = (positions[owners] >= 0).nonzero()[:, 0]
            return torch.stack([kept, positions[owners[kept]]], dim=1)
        return self._matches_of_texts(rows)

    def _matches_of_texts(self, rows: Sequence[int]) -> Tensor:
        owners: dict[int, list[int]] = {}
        for position, row in enumerate(rows):
            for identity in {caption_id(text) for text in self.image_captions[row]}:
                owners.setdefault(identity, []).append(position)
        found = [(text, owners.get(caption_id(caption), [])) for text, caption in enumerate(self.captions)]
        pairs = [(text, image) for text, images in found for image in images]
        return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)

    def __call__(
        self,
        model: LLM2CLIPModel,
        embed: Callable[[list[str]], Tensor],
        batch_size: int = 64,
        num_workers: int = 0,
        show_progress_bar: bool = False,
    ) -> dict[str, float | int]:
        """Measure recall in both directions.

        Args:
            model: The model; its LLM is not used.
            embed: Maps captions to the LLM's embeddings, `(captions, hidden_size)`: the `lookup` of a cache, or the
                `embed` of an [`OurEncoder`].
            batch_size: Images per forward pass.
            num_workers: Worker processes that read images.

        Returns:
            See `retrieval_metrics`.
        """
        image_embeds, rows = self.embed_images(model, batch_size, num_workers, show_progress_bar)
        texts, images = self.matches(rows).unbind(1)
        # A caption all of whose images were skipped has no correct answer left.
        kept, texts = texts.unique(return_inverse=True)
        text_embeds = self.embed_captions(model, embed)[kept]
        return retrieval_metrics(image_embeds, text_embeds, torch.stack([texts, images], dim=1))

    def embed_images(
        self, model: LLM2CLIPModel, batch_size: int = 64, num_workers: int = 0, show_progress_bar: bool = False
    ) -> tuple[Tensor, list[int]]:
        """Embed the images; several processes share the work.

        Returns:
            Unit embeddings of the readable images `(images, projection_dim)`, and their row numbers.

        Raises:
            NonFiniteError: The model's embedding of an image that can be read is NaN or infinite.
        """
        if self.features is not None:
            return self._embed_stored(model, self.features)
        encoder = OurEncoder(model, self.image_processor)

        def encode(part: range) -> Tensor:
            options = {"on_error": self.on_error, "on_not_finite": "skip", "show_progress_bar": show_progress_bar}
            found = encoder.encode_image_rows(
                self.images, part, batch_size=batch_size, num_workers=num_workers, **options
            )
            embeds = found.embeds
            # Both keep their rows, so that every process learns of them: NaN for an image that cannot be read,
            # infinity for a broken embedding.
            embeds[[reason is not None for reason in found.reasons]] = float("nan")
            embeds[[reason == NOT_FINITE for reason in found.reasons]] = float("inf")
            return embeds

        embeds = encode_sharded(len(self.images), encode, model.vision_model.device)
        is_skipped = embeds.isnan().any(dim=1)
        return self._checked(embeds[~is_skipped], (~is_skipped).nonzero()[:, 0].tolist())

    def _embed_stored(self, model: LLM2CLIPModel, features: ImageFeatures) -> tuple[Tensor, list[int]]:
        stored = features.find(self.images.content_keys())
        rows = [row for row, place in enumerate(stored.tolist()) if place not in features.skipped]
        with torch.inference_mode():
            parts = [
                unit_features(model.get_image_features(vision_features=features.read_views(part))).float().cpu()
                for part in np.split(stored[rows], range(BATCH, len(rows), BATCH))
            ]
        return self._checked(torch.cat(parts), rows)

    def _checked(self, embeds: Tensor, rows: list[int]) -> tuple[Tensor, list[int]]:
        """Report the rows without an embedding, and check those with one."""
        if len(rows) < len(self.images):
            skipped = sorted(set(range(len(self.images))) - set(rows))
            keys = shortened(list(map(self.images.key, skipped)))
            logger.warning("images of %s that cannot be read are left out: %s", self.source.path, keys)
        require_finite_rows(embeds, lambda position: self.images.key(rows[position]), f"images of {self.source.path}")
        return embeds, rows

    def embed_captions(self, model: LLM2CLIPModel, embed: Callable[[list[str]], Tensor]) -> Tensor:
        """Map the LLM's embeddings of `captions` to the shared space: unit rows `(captions, projection_dim)`.

        Raises:
            NonFiniteError: An embedding of the LLM or of the adapter is NaN or infinite.
        """
        llm_embeds = embed(self.captions)
        require_finite_rows(llm_embeds, self._caption, f"captions of {self.source.path} (by the LLM)")
        with torch.inference_mode():
            parts = [model.get_text_features(llm_embeds=part) for part in llm_embeds.split(BATCH)]
            embeds = torch.cat([unit_features(part).cpu() for part in parts])
        require_finite_rows(embeds, self._caption, f"captions of {self.source.path} (by the adapter)")
        return embeds

    def _caption(self, number: int) -> str:
        return f"{self.captions[number]:.80}"
