"""The images of the demo: a search index, zero-shot classification and heat maps with one model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from llm2clip.demo.heat_map import draw_heat_map, seen_part
from llm2clip.encoders import Encoder, load_encoder
from llm2clip.encoders.patches import patch_similarity
from llm2clip.encoders.query_encoder import TextEncoder
from llm2clip.models.embeddings import NonFiniteError
from llm2clip.search.folder_items import Items
from llm2clip.search.results import ResultImages
from llm2clip.search.search_index import SearchIndex

logger = logging.getLogger(__name__)

MAP_WIDTH = 448
# What the texts of a request may have, labels in their captions together. Each label is a pass through the LLM.
MAX_CHARACTERS, MAX_LABELS = 20_000, 1_000
# Name of an uploaded picture in error messages.
QUERY = "query"
SIDES = ("image", "text")
# The largest that CLIP learns, for models that have none of their own.
LOGIT_SCALE = 100.0


class ShownImage(NamedTuple):
    """An RGB image, its caption or file (empty if it has neither), and its cosine similarity with the query."""

    image: Image.Image
    name: str
    score: float


class Gallery:
    """Images that one model has embedded, in a search index.

    Args:
        encoder: A model of images and texts.
        index: An index of images that it made.
        images: The images of the index. Captions are displayed as names; they do not influence the scores.
    """

    def __init__(self, encoder: Encoder, index: SearchIndex, images: ResultImages) -> None:
        self.encoder, self.index, self.images = encoder, index, images
        self._processor = None if encoder.transform is None else encoder.transform.image_processor

    @classmethod
    def open(
        cls, name: str, images: Items, cache_dir: Path, text_encoder: TextEncoder = "auto", dtype: str = "auto"
    ) -> Gallery:
        """Load a model, and update its index of the images; see [`load_encoder`] and [`Gallery.embed`]."""
        encoder = load_encoder(name, dtype=dtype, needs=SIDES, text_encoder=text_encoder)
        return cls.embed(encoder, images, cache_dir)

    @classmethod
    def embed(cls, encoder: Encoder, images: Items, cache_dir: Path) -> Gallery:
        """Embed the images that are new or changed since the last start.

        The index has a folder of its own below `cache_dir` for each combination of weights, data type, preprocessing
        and images, so that models do not replace each other's index.

        Raises:
            ValueError: No image can be read.
        """
        parts = [images.source, encoder.image_fingerprint(), encoder.dtype]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
        index = _updated_index(cache_dir / f"index-{key}", images, encoder)
        return cls(encoder, index, ResultImages(index.manifest, images))

    @classmethod
    def of_index(
        cls, location: str, model: str | None = None, text_encoder: TextEncoder = "auto", dtype: str = "auto"
    ) -> Gallery:
        """Open an index that `llm2clip index` wrote, with the model that made it, or a copy of it.

        Raises:
            FileNotFoundError: Its images are no longer there.
            ValueError: It is an index of captions.
        """
        index = SearchIndex.open(location, encoder=model, text_encoder=text_encoder, dtype=dtype)
        source = index.manifest.source
        if source["kind"] == "folder" and not Path(source["path"]).is_dir():
            raise FileNotFoundError(
                f"the images of the index {location} were in {source['path']}, which does not exist."
            )
        if index.manifest.embed != "image":
            raise ValueError(f"the index {location} is of captions; the demo shows images.")
        return cls(index.encoder(SIDES), index, ResultImages(index.manifest))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def has_captions(self) -> bool:
        """Whether images have captions, and not only the names of their files."""
        return self.index.manifest.source["kind"] != "folder"

    def search(self, query: str | Image.Image, top: int = 12) -> list[ShownImage]:
        """Find the images most similar to a caption or to another image, best first.

        Images that have been removed since the start are left out.

        Raises:
            ValueError: The caption is empty, or the image is too narrow to be resized.
        """
        shown = []
        for result in self.index.search(self._embed(query)[None].numpy(), top)[0]:
            image = self.images.load(result)
            if image is not None:
                name = result.caption if result.path is None else result.key
                shown.append(ShownImage(image, name or "", result.score))
        return shown

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
        places = template.count("{}")
        _check_length(len(names) * (len(template) - 2 * places) + places * sum(map(len, names)))
        if places == 0:
            raise ValueError(f"The template {template!r} needs {{}} in place of the label.")
        captions = [template.replace("{}", name) for name in names]
        cosines = self.encoder.encode_text(captions) @ self._embed(image)
        learned = getattr(self.encoder.model, "logit_scale", None)
        scale = LOGIT_SCALE if learned is None else learned.detach().float().exp().item()
        return dict(zip(names, (scale * cosines).softmax(dim=0).tolist(), strict=True))

    @torch.no_grad()
    def heat_map(self, image: Image.Image, caption: str) -> tuple[Image.Image, Image.Image, Tensor]:
        """Compare the patches of an image with a caption.

        Returns:
            The part of the image that the tower sees, the same with the heat map over it, and the cosine similarity of
            each patch `(rows, columns)`.

        Raises:
            ValueError: The model has no fixed grid of patches that can be compared.
        """
        pixels = None if self._processor is None else self.encoder.prepare(image, QUERY)["pixel_values"]
        if self._processor is None or pixels is None or pixels.ndim != 3:
            raise ValueError(f"The patches of {self.encoder.name} are not known.")
        similarity = patch_similarity(self.encoder.model, pixels[None], self._embed(caption)[None])[0]
        seen = seen_part(image, self._processor)
        drawn = draw_heat_map(seen, similarity, MAP_WIDTH)
        return seen.resize(drawn.size, Image.Resampling.LANCZOS), drawn, similarity

    def map_clarity(self, image: Image.Image, caption: str) -> float:
        """Tell how well a heat map follows the picture: the correlation of similarity and detail over the patches."""
        seen, _, similarity = self.heat_map(image, caption)
        rows, columns = similarity.shape
        pixels = torch.tensor(list(seen.convert("L").resize((8 * columns, 8 * rows)).tobytes()), dtype=torch.float32)
        detail = pixels.view(rows, 8, columns, 8).std(dim=(1, 3))
        return torch.stack([similarity.flatten(), detail.flatten()]).corrcoef()[0, 1].nan_to_num().item()

    @cached_property
    def has_heat_maps(self) -> bool:
        """Whether `heat_map` knows the patches of the model; found by trying."""
        try:
            self.heat_map(Image.new("RGB", (64, 64)), "a")
        except ValueError:
            return False
        return True

    def _embed(self, query: str | Image.Image) -> Tensor:
        if isinstance(query, Image.Image):
            return self.encoder.encode_image(query, names=[QUERY])[0]
        if not query.strip():
            raise ValueError("There is no caption yet: describe what the picture should show.")
        _check_length(len(query))
        return self.encoder.encode_text(query)[0]


def _updated_index(folder: Path, images: Items, encoder: Encoder) -> SearchIndex:
    """Bring an index up to date; one that cannot be read is built again, because all of it can be."""
    settings: dict[str, Any] = {"stored_dtype": "float32", "allow_removals": True}
    try:
        return SearchIndex.build(encoder, images, folder, **settings)
    except NonFiniteError:
        raise
    except (OSError, ValueError) as error:
        if not folder.exists():
            raise
        logger.warning("the index %s cannot be used and is built again: %s", folder, error)
    return SearchIndex.build(encoder, images, folder, **settings, overwrite=True)


def _check_length(characters: int) -> None:
    """Raise ValueError if embedding texts would keep other visitors waiting."""
    if characters > MAX_CHARACTERS:
        raise ValueError(f"The texts have {characters:,} characters together; send at most {MAX_CHARACTERS:,}.")
