"""What the demo shows: a set of images, searched, labelled and looked into with one model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor

from llm2clip.data import CaptionSource
from llm2clip.embedding.image_embedder import ImageEmbedder
from llm2clip.evaluation import ImageTextRetrieval
from llm2clip.evaluation.heat_map import draw_heat_map, patch_similarity, seen_part
from llm2clip.search.top_k import top_k
from llm2clip.utils.processes import process_state
from modeling_llm2clip import LLM2CLIPModel

logger = logging.getLogger(__name__)

MAP_WIDTH = 448
# What errors call an uploaded picture.
QUERY = "query"


@dataclass(frozen=True)
class Found:
    """An image that was found.

    Attributes:
        image: The image.
        name: Its first caption, or an empty string.
        score: Cosine similarity with the query.
    """

    image: Image.Image
    name: str
    score: float


class Gallery:
    """Images, embedded by a model.

    Args:
        model: The model, with its LLM.
        processor: Its processor.
        source: The images; their captions are names to show and take no part in any score.
        cache_dir: Folder that keeps the embeddings, for the next start with the same model and images.

    Raises:
        ValueError: There is no image that can be read.
    """

    def __init__(self, model: LLM2CLIPModel, processor: Any, source: CaptionSource, cache_dir: Path) -> None:
        self.model = model
        self.processor = processor
        self._images = ImageTextRetrieval(source, processor.image_processor, on_error="skip")
        self._embedder = ImageEmbedder(model, processor.image_processor, model.name_or_path or "")
        key = self._key()
        path = cache_dir / f"{key}.safetensors"
        if path.is_file():
            stored = load_file(path)
            self.embeds, self.rows = stored["embeds"], stored["rows"].tolist()
            logger.info("%d image embeddings are read from %s", len(self.rows), path)
        else:
            self.embeds, self.rows = self._images.embed_images(model, show_progress_bar=True)
            if not self.rows:
                raise ValueError(f"{source.path} has no image that can be read in split {source.split}.")
            cache_dir.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            save_file({"embeds": self.embeds, "rows": torch.tensor(self.rows)}, temporary)
            temporary.replace(path)

    @classmethod
    def open(cls, name: str, source: CaptionSource, cache_dir: Path) -> Gallery:
        """Load a model and embed the images, or read their embeddings.

        Args:
            name: Folder or Hub id.
            source: The images.
            cache_dir: Folder that keeps the embeddings.
        """
        model = LLM2CLIPModel.from_pretrained(name).to(process_state().device).eval()
        return cls(model, AutoProcessor.from_pretrained(name), source, cache_dir)

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, name: str) -> Image.Image | None:
        """The first image with this caption."""
        for row in self.rows:
            if name in self._images.image_captions[row]:
                return self._images.image(row)
        return None

    def first(self, count: int) -> list[Image.Image]:
        """The first images."""
        return [self._images.image(row) for row in self.rows[:count]]

    def search(self, query: str | Image.Image, top: int = 12) -> list[Found]:
        """The images most similar to a caption or to another image, the best one first.

        Args:
            query: A caption, or an RGB image.
            top: How many.

        Raises:
            ValueError: The caption is empty, or the image too narrow to be resized.
        """
        scores, indices = top_k(self._embed(query)[None], self.embeds, top)
        found = []
        for score, index in zip(scores[0].tolist(), indices[0].tolist(), strict=True):
            row = self.rows[index]
            name = next(iter(self._images.image_captions[row]), "")
            found.append(Found(self._images.image(row), name, score))
        return found

    def classify(self, image: Image.Image, labels: Sequence[str], template: str = "{}") -> dict[str, float]:
        """Zero-shot classification.

        Args:
            image: An RGB image.
            labels: What it may be; each stands once in the result.
            template: A caption with `{}` where the label goes.

        Returns:
            The probability of each label, in their order; they sum to one.

        Raises:
            ValueError: Fewer than two labels, or a template without `{}`.
        """
        names = list(dict.fromkeys(label.strip() for label in labels if label.strip()))
        if len(names) < 2:
            raise ValueError("Give at least two different labels: their probabilities are relative to each other.")
        if "{}" not in template:
            raise ValueError(f"The template {template!r} needs {{}} where the label goes.")
        captions = [template.replace("{}", name) for name in names]
        cosines = self.model.encode_text(captions, self.processor) @ self._embed(image)
        scale = self.model.logit_scale.detach().float().cpu().exp()
        return dict(zip(names, (scale * cosines).softmax(dim=0).tolist(), strict=True))

    def heat_map(self, image: Image.Image, caption: str) -> tuple[Image.Image, Image.Image, Tensor]:
        """Which patches of an image match a caption.

        Args:
            image: An RGB image.
            caption: The caption.

        Returns:
            What the tower sees of the image, the same with the heat map over it, and the cosine similarity of every
            patch `(rows, columns)`.
        """
        pixels = self._embedder.transform(image, QUERY)[None]
        similarity = patch_similarity(self.model, pixels, self._embed(caption)[None])[0]
        seen = seen_part(image, self.processor.image_processor)
        drawn = draw_heat_map(seen, similarity, MAP_WIDTH)
        return seen.resize(drawn.size, Image.Resampling.LANCZOS), drawn, similarity

    def _embed(self, query: str | Image.Image) -> Tensor:
        if isinstance(query, str):
            if not query.strip():
                raise ValueError("There is no caption yet: type what the picture should show.")
            return self.model.encode_text([query], self.processor)[0]
        return torch.from_numpy(self._embedder.embed(query, QUERY))

    def _key(self) -> str:
        """Identifies the images and everything that makes embeddings of them."""
        table = self._images.images.table
        settings = [self.processor.image_processor.to_dict(), self.model.config.vision_config.to_dict()]
        digest = hashlib.sha256(json.dumps([table._fingerprint, *settings], sort_keys=True, default=str).encode())
        for part in (self.model.vision_model, self.model.visual_projection):
            for name, tensor in part.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]
