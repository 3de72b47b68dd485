"""The images of the demo: a search index, zero-shot classification and heat maps with one model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from llm2clip.encoders.ours import OurEncoder
from llm2clip.evaluation.heat_map import draw_heat_map, patch_similarity, seen_part
from llm2clip.search.image_index import ImageIndex
from llm2clip.search.image_sets import IndexedImages
from llm2clip.search.index_update import UpdateSettings, update_index
from llm2clip.search.lance_store import LanceStore
from llm2clip.search.results import ResultImages, SearchResult
from llm2clip.search.table_images import TableImages
from llm2clip.utils.attention_probe import verify_text_tower
from llm2clip.utils.embeddings import NonFiniteError
from llm2clip.utils.processes import process_state
from modeling_llm2clip import LLM2CLIPModel

logger = logging.getLogger(__name__)

MAP_WIDTH = 448
# Of what a visitor may send: each label is a pass through the LLM.
MAX_CHARACTERS, MAX_LABELS = 10_000, 1_000
# Name of an uploaded picture in error messages.
QUERY = "query"


class ShownImage(NamedTuple):
    """An RGB image, its caption or file (empty if it has neither), and its cosine similarity with the query."""

    image: Image.Image
    name: str
    score: float


class Gallery:
    """Images that one model has embedded, in a search index.

    The index is updated when the gallery is created. It has a folder of its own for each combination of weights, image
    processor and images, so that models do not replace each other's index.

    Args:
        model: The model, with its LLM.
        images: The images. Captions are displayed as names; they do not influence the scores.
        cache_dir: Folder of the indexes.

    Raises:
        ValueError: No image can be read.
    """

    def __init__(self, model: LLM2CLIPModel, processor: Any, images: IndexedImages, cache_dir: Path) -> None:
        self.model = model
        self.processor = processor
        self._encoder = OurEncoder(model, processor, model.name_or_path or "")
        folder = cache_dir / f"index-{self._key(images)}"
        self.index = self._updated_index(folder, images)
        self._images = ResultImages(self.index.manifest, images if isinstance(images, TableImages) else None)

    def _updated_index(self, folder: Path, images: IndexedImages) -> ImageIndex:
        """Bring an index up to date; one that cannot be read is built again, because all of it can be."""
        settings = UpdateSettings(dtype="float32", allow_removals=True)
        try:
            update_index(LanceStore(folder), images, self._encoder, settings)
            return ImageIndex.open(folder)
        except NonFiniteError:
            raise
        except (OSError, ValueError) as error:
            if not folder.exists():
                raise
            logger.warning("the index %s cannot be used and is built again: %s", folder, error)
        update_index(LanceStore(folder), images, self._encoder, replace(settings, overwrite=True))
        return ImageIndex.open(folder)

    @classmethod
    def open(cls, name: str, images: IndexedImages, cache_dir: Path) -> Gallery:
        """Load a model from the Hub or a folder, and update its index of the images."""
        model = LLM2CLIPModel.from_pretrained(name).to(process_state().device).eval()
        verify_text_tower(model.text_model)
        return cls(model, AutoProcessor.from_pretrained(name), images, cache_dir)

    def __len__(self) -> int:
        return len(self.index)

    def find(self, name: str) -> Image.Image | None:
        """Return the first image with this caption."""
        if "caption" not in self.index.rows.columns:
            return None
        quoted = name.replace("'", "''")
        row = self.index.first(f"caption = '{quoted}'")
        return None if row is None else self._images.load(SearchResult.from_row(row, 1.0, self.index.manifest))

    def search(self, query: str | Image.Image, top: int = 12) -> list[ShownImage]:
        """Find the images most similar to a caption or to another image, best first.

        Images that have been removed since the start are left out.

        Raises:
            ValueError: The caption is empty, or the image is too narrow to be resized.
        """
        found = []
        for score, row in self.index.search(self._embed(query)[None].numpy(), top)[0]:
            result = SearchResult.from_row(row, score, self.index.manifest)
            image = self._images.load(result)
            if image is not None:
                name = result.caption if result.path is None else result.key
                found.append(ShownImage(image, name or "", score))
        return found

    def classify(self, image: Image.Image, labels: Sequence[str], template: str = "{}") -> dict[str, float]:
        """Classify an image without training (zero-shot): probabilities of the labels, which sum to one.

        Args:
            image: An RGB image.
            labels: The possible labels; duplicates are ignored.
            template: A caption with `{}` in place of the label.

        Raises:
            ValueError: There are fewer than two labels or too many, or the template lacks `{}`.
        """
        names = list(dict.fromkeys(label.strip() for label in labels if label.strip()))
        if len(names) < 2:
            raise ValueError("Give at least two different labels: their probabilities are relative to each other.")
        if len(names) > MAX_LABELS:
            raise ValueError(f"These are {len(names):,} labels; give at most {MAX_LABELS:,}.")
        if "{}" not in template:
            raise ValueError(f"The template {template!r} needs {{}} in place of the label.")
        captions = [_short(template.replace("{}", name)) for name in names]
        cosines = self._encoder.encode_text(captions) @ self._embed(image)
        scale = self.model.logit_scale.detach().float().cpu().exp()
        return dict(zip(names, (scale * cosines).softmax(dim=0).tolist(), strict=True))

    def heat_map(self, image: Image.Image, caption: str) -> tuple[Image.Image, Image.Image, Tensor]:
        """Compare the patches of an image with a caption.

        Returns:
            The part of the image that the tower sees, the same with the heat map over it, and the cosine similarity of
            each patch `(rows, columns)`.
        """
        pixels = self._encoder.prepare(image, QUERY)["pixel_values"][None]
        similarity = patch_similarity(self.model, pixels, self._embed(caption)[None])[0]
        seen = seen_part(image, self.processor.image_processor)
        drawn = draw_heat_map(seen, similarity, MAP_WIDTH)
        return seen.resize(drawn.size, Image.Resampling.LANCZOS), drawn, similarity

    def _embed(self, query: str | Image.Image) -> Tensor:
        if isinstance(query, str):
            if not query.strip():
                raise ValueError("There is no caption yet: describe what the picture should show.")
            return self._encoder.encode_text(_short(query))[0]
        return self._encoder.encode_image(query, names=[QUERY])[0]

    def _key(self, images: IndexedImages) -> str:
        """Identify the images and the model with its preprocessing."""
        parts = [images.source, self._encoder.image_fingerprint()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _short(caption: str) -> str:
    """Return a caption; raise ValueError if tokenizing it would keep other visitors waiting."""
    if len(caption) > MAX_CHARACTERS:
        raise ValueError(f"The caption has {len(caption):,} characters; write at most {MAX_CHARACTERS:,}.")
    return caption
