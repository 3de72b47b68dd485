"""The text side of a model, which embeds the captions of an index."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import AutoTokenizer

from llm2clip.encoders.caption_embedder import CaptionEmbedder
from llm2clip.encoders.image_embedder import EmbeddedRows, ImageEmbedder
from llm2clip.search.table_captions import ChosenCaptions
from llm2clip.utils.non_finite import require_finite_rows
from llm2clip.utils.repos import RepoKind, inspect_repo

logger = logging.getLogger(__name__)

WHOLE_MODEL = "Captions are embedded by the whole model with its LLM."


class CaptionVectors:
    """Embeds captions in the space that they share with images.

    Args:
        images: The embedder of images of the whole model, which searches by image use.
        tokenizer: The model's processor or tokenizer.
    """

    def __init__(self, images: ImageEmbedder, tokenizer: Any) -> None:
        self.images = images
        self.captions = CaptionEmbedder(images.model, tokenizer)
        self.name, self.revision, self.width = images.name, images.revision, images.width
        self._embedded = self._cut = 0

    @classmethod
    def load(cls, name: str, revision: str | None = None) -> CaptionVectors:
        """Load an LLM2CLIP model by Hub id or folder.

        Raises:
            OSError: There is no such model.
            ValueError: It is another kind of model, or lacks the LLM.
        """
        inspect_repo(name, revision).require(RepoKind.JOINT, hint=WHOLE_MODEL)
        images = ImageEmbedder.load(name, revision, with_llm=True)
        return cls(images, AutoTokenizer.from_pretrained(name, revision=revision))

    def fingerprint(self) -> str:
        """Identify the weights and the preprocessing of images; see [`ImageEmbedder.fingerprint`]."""
        return self.images.fingerprint()

    def text_fingerprint(self) -> str:
        """Identify LLM, tokenizer and adapter; see [`CaptionEmbedder.fingerprint`]."""
        return self.captions.fingerprint()

    def embed_rows(
        self,
        captions: ChosenCaptions,
        rows: Sequence[int],
        batch_size: int | None = None,
        part_size: int | None = None,
    ) -> Iterator[EmbeddedRows]:
        """Embed captions a part at a time, in batches of similar length.

        Args:
            captions, rows: The captions, and the numbers of those to embed.
            batch_size: Largest number of captions per forward pass; by default as many as their tokens allow.
            part_size: Captions per part; the default is a single part.

        Raises:
            NonFiniteError: Embeddings are NaN or infinite.
        """
        step = part_size or max(1, len(rows))
        for start in range(0, len(rows), step):
            some = list(rows[start : start + step])
            texts = [captions.texts[row] for row in some]
            embeds, cut = self.captions.embed_and_count(texts, batch_size, show_progress_bar=False)
            require_finite_rows(embeds, [captions.keys[row] for row in some].__getitem__, "captions")
            self._embedded += len(some)
            self._cut += cut
            yield EmbeddedRows(some, embeds.numpy(), [None] * len(some))

    def report(self) -> None:
        """Log how many of the embedded captions were cut at the model's maximum length."""
        if self._cut:
            limit = self.captions.tokenizer.model_max_length
            logger.warning("%d of %d distinct captions were cut at %d tokens.", self._cut, self._embedded, limit)
