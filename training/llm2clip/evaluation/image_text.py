"""Image-text retrieval of a model on a data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import BaseImageProcessor

from llm2clip.data import (
    CaptionSource,
    EvalTransform,
    SampleError,
    SkippedSample,
    caption_id,
    decode_image,
    load_source,
    stack_pixels,
)
from llm2clip.data.records import column_texts
from llm2clip.data.sources import source_columns
from llm2clip.embedding.sharding import encode_sharded
from llm2clip.evaluation.metrics import retrieval_metrics
from modeling_llm2clip import LLM2CLIPModel

logger = logging.getLogger(__name__)

TEXT_BATCH = 4096
MAX_NAMED = 20


class ImageTextRetrieval:
    """The images and the distinct captions of a source, and which belong together.

    A caption may belong to several images (equal texts, whatever their case), an image may have several captions, and
    an image whose caption columns are all empty is a candidate that is never right.

    Args:
        source: The data; all its captions are queries.
        image_processor: Prepares the images.
        on_error: `raise` the error of an image that cannot be read, or `skip` it: it is left out and logged.
        max_pixels: Largest image that is decoded.

    Raises:
        ValueError: No row has a caption.
    """

    def __init__(
        self,
        source: CaptionSource,
        image_processor: BaseImageProcessor,
        on_error: str = "raise",
        max_pixels: int | None = None,
    ) -> None:
        self.source = replace(source, streaming=False)
        table = load_source(self.source)
        assert isinstance(table, datasets.Dataset)
        columns = source_columns(self.source, table)
        self.images = _Images(table, columns.image, columns.key, EvalTransform(image_processor), on_error, max_pixels)
        texts = table.remove_columns([name for name in (columns.image, columns.key) if name is not None])
        self.image_captions = [
            list(dict.fromkeys(text for column in columns.captions for text in column_texts(row, column)))
            for row in texts
        ]
        self.captions = list(dict.fromkeys(text for captions in self.image_captions for text in captions))
        if not self.captions:
            raise ValueError(f"no row of {source.path} has a caption in {', '.join(source.caption_columns)}.")
        self._llm_embeds: dict[str, Tensor] = {}

    def image(self, row: int) -> Image.Image:
        """The image of a row, decoded."""
        return self.images.decode(row)

    def matches(self, images: Sequence[int]) -> Tensor:
        """Which captions belong to which of some images.

        Args:
            images: Row numbers.

        Returns:
            `(pairs, 2)` int64: index into `captions`, index into `images`.
        """
        owners: dict[int, list[int]] = {}
        for position, row in enumerate(images):
            for identity in dict.fromkeys(caption_id(text) for text in self.image_captions[row]):
                owners.setdefault(identity, []).append(position)
        pairs = [
            (text, image)
            for text, caption in enumerate(self.captions)
            for image in owners.get(caption_id(caption), [])
        ]
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
            embed: Maps captions to the LLM's embeddings, `(captions, hidden_size)`: a cache's `lookup`, or an encoder.
            batch_size: Images per batch.
            num_workers: Processes that read images.
            show_progress_bar: Show a bar over the images.

        Returns:
            See `retrieval_metrics`.
        """
        image_embeds, rows = self.embed_images(model, batch_size, num_workers, show_progress_bar)
        matches = self.matches(rows)
        # Captions whose every image was skipped have no right answer left.
        kept = matches[:, 0].unique()
        text_embeds = self.embed_captions(model, embed)[kept]
        matches = torch.stack([torch.searchsorted(kept, matches[:, 0].contiguous()), matches[:, 1]], dim=1)
        return retrieval_metrics(image_embeds, text_embeds, matches)

    def embed_images(
        self, model: LLM2CLIPModel, batch_size: int = 64, num_workers: int = 0, show_progress_bar: bool = False
    ) -> tuple[Tensor, list[int]]:
        """Unit embeddings of the readable images `(images, projection_dim)` and their row numbers."""
        device = model.vision_model.device
        skipped: list[int] = []

        def encode(part: range) -> Tensor:
            loader = DataLoader(
                torch.utils.data.Subset(self.images, part),
                batch_size=batch_size,
                num_workers=num_workers,
                collate_fn=stack_pixels,
            )
            embeds = [torch.zeros(0, model.config.projection_dim)]
            for batch in tqdm(loader, desc="Encoding images", disable=not show_progress_bar):
                # A skipped image keeps its row, as not-a-number, so that every process knows what is missing.
                rows = torch.full((len(batch.skipped), model.config.projection_dim), float("nan"))
                if batch.pixels is not None:
                    features = model.get_image_features(batch.pixels.to(device)).pooler_output
                    assert features is not None
                    rows[batch.good] = F.normalize(features.float(), dim=-1).cpu()
                embeds.append(rows)
            return torch.cat(embeds)

        with torch.inference_mode():
            embeds = encode_sharded(len(self.images), encode, device)
        skipped = embeds.isnan().any(dim=1).nonzero()[:, 0].tolist()
        if skipped:
            keys = ", ".join(self.images.key(row) for row in skipped[:MAX_NAMED])
            more = f" and {len(skipped) - MAX_NAMED} more" if len(skipped) > MAX_NAMED else ""
            logger.warning("images of %s that cannot be read are left out: %s%s", self.source.path, keys, more)
        left_out = set(skipped)
        rows = [row for row in range(len(embeds)) if row not in left_out]
        return embeds[rows], rows

    def embed_captions(self, model: LLM2CLIPModel, embed: Callable[[list[str]], Tensor]) -> Tensor:
        """Unit embeddings of `captions`: `(captions, projection_dim)`."""
        llm_embeds = embed(self.captions)
        parts = []
        with torch.inference_mode():
            for part in llm_embeds.split(TEXT_BATCH):
                features = model.get_text_features(llm_embeds=part).pooler_output
                assert features is not None
                parts.append(F.normalize(features.float(), dim=-1).cpu())
        return torch.cat(parts)


class _Images(Dataset):
    """The images of a table, prepared for the tower, or what is wrong with them."""

    def __init__(
        self,
        table: datasets.Dataset,
        image_column: str | None,
        key_column: str | None,
        transform: EvalTransform,
        on_error: str,
        max_pixels: int | None,
    ) -> None:
        self.table = table.select_columns([name for name in (image_column, key_column) if name is not None])
        self.image_column = image_column
        self.key_column = key_column
        self.transform = transform
        self.on_error = on_error
        self.options = {} if max_pixels is None else {"max_pixels": max_pixels}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Tensor | SkippedSample:
        try:
            return self.transform(self.decode(index), self.key(index))
        except SampleError as error:
            if self.on_error == "raise":
                raise
            return SkippedSample(error.key, str(error.reason))

    def decode(self, index: int) -> Image.Image:
        row: Mapping[str, Any] = self.table[index]
        key = self.key(index)
        return decode_image(row[self.image_column], key, **self.options)  # type: ignore[index]

    def key(self, index: int) -> str:
        return str(self.table[index][self.key_column]) if self.key_column else str(index)
