"""LLM2CLIP models and their parts under evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, BatchFeature

from llm2clip.data import EvalTransform
from llm2clip.encoders.caption_embedder import CaptionEmbedder
from llm2clip.encoders.encoder import TowerEncoder, compared_lengths, processor_statistics
from llm2clip.encoders.image_embedder import ImageEmbedder
from llm2clip.utils.files import digest_json
from llm2clip.utils.model_identity import hub_commit
from llm2clip.utils.non_finite import require_finite_rows
from llm2clip.utils.repos import Repo, RepoKind
from modeling_llm2clip import __version__
from modeling_llm2clip.identity_llm2clip import RULE
from modeling_llm2clip.modeling_llm2clip_utils import execution_device


class LLM2CLIPTowers(TowerEncoder):
    """An LLM2CLIP model; or its vision half, which embeds images only; or a text tower, which embeds texts only.

    Args:
        name: How the user named it.
        images, captions: The embedders of its parts; at least one.
        device, dtype, commit, batch_size: See [`TowerEncoder`].
    """

    library = f"llm2clip {__version__}"

    def __init__(
        self, name: str, images: ImageEmbedder | None, captions: CaptionEmbedder | None, *options: Any, **more: Any
    ) -> None:
        embedder: Any = images or captions
        super().__init__(name, embedder.model, embedder.width, *options, **more)
        self._images, self._captions = images, captions
        self._transform = None if images is None else images.transform

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_images": None, "_captions": None}

    @classmethod
    def load(cls, repo: Repo, dtype: str, device: torch.device, batch_size: int | None = None) -> LLM2CLIPTowers:
        """Load the parts of a model that a repository has."""
        name, where = repo.name, dict[str, Any](revision=repo.revision)
        images = captions = None
        if repo.kind in (RepoKind.JOINT, RepoKind.VISION_HALF):
            with_llm = repo.kind is RepoKind.JOINT
            images = ImageEmbedder.load(name, **where, with_llm=with_llm, device=device, dtype=dtype)
            if with_llm:
                captions = CaptionEmbedder(images.model, AutoTokenizer.from_pretrained(name, **where))
        else:
            captions = CaptionEmbedder.load(name, **where, device=device, dtype=dtype)
        return cls(name, images, captions, device, dtype, hub_commit(name, repo.revision), batch_size)

    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._images is not None:
            found["vision"] = self._images.fingerprint()
        if self._captions is not None:
            found |= self._captions.identity()
        return found

    def fingerprint(self) -> str:
        """Hash the fingerprints of vision half, LLM and tokenizer, and the weights of the adapter.

        Raises:
            ValueError: A weight is offloaded or quantised, and the fingerprint of the LLM is not recorded.
        """
        if self._fingerprint is None:
            self._fingerprint = RULE + digest_json(self.settings())
        return self._fingerprint

    @property
    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        return processor_statistics(self._vision().image_processor)

    def _vision(self) -> EvalTransform:
        if self._transform is None:
            raise ValueError(f"{self.name} is a text tower, which does not embed images.")
        return self._transform

    def prepare(self, image: Any, key: str) -> dict[str, Tensor]:
        return self._vision().inputs(image, key)

    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model.get_image_features(**self._on_device(inputs)).pooler_output

    def pooled_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model.get_vision_features(**self._on_device(inputs))

    def _on_device(self, inputs: dict[str, Tensor]) -> BatchFeature:
        vision = self.model.vision_model
        return BatchFeature(inputs).to(execution_device(vision), self.model.dtype)

    def _texts(self) -> CaptionEmbedder:
        if self._captions is None:
            raise ValueError(f"{self.name} is the vision half of a model, which does not embed texts.")
        return self._captions

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: unit rows, float32 `(texts, width)` on the CPU.

        An empty text is the prompt alone, as in the original code; see [`CaptionEmbedder.embed_empty`].

        Raises:
            NonFiniteError: Embeddings are NaN or infinite; the message names the texts.
        """
        captions = self._texts()
        kept = [row for row, text in enumerate(texts) if text.strip()]
        embeds = torch.empty(len(texts), self.width)
        if kept:
            embeds[kept] = captions.embed([texts[row] for row in kept], self.batch_size, show_progress_bar=False)
        if len(kept) < len(texts):
            embeds[[row for row, text in enumerate(texts) if not text.strip()]] = captions.embed_empty()
        require_finite_rows(embeds, lambda row: f"{texts[row]:.80}", "texts")
        return F.normalize(embeds, dim=-1)

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of each text before truncation, the prompt included, and whether it is cut."""
        tokenizer = self._texts().tokenizer
        ids = (
            tokenizer([text.strip() for text in texts], truncation=False, verbose=False)["input_ids"] if texts else []
        )
        return compared_lengths([len(row) for row in ids], tokenizer.model_max_length)
