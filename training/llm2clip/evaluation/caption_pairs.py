"""Caption retrieval: how often a text encoder finds another caption of the same image (paper, appendix D)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm2clip.data import PairDataset, PairSource, caption_id
from llm2clip.encoders.batches import encode_sharded
from llm2clip.encoders.ours import OurEncoder
from llm2clip.evaluation.metrics import caption_retrieval_metrics
from llm2clip.utils.embeddings import require_finite_rows
from modeling_llm2clip import LLM2CLIPTextModel
from modeling_llm2clip.modeling_llm2clip_utils import execution_device


class CaptionRetrieval:
    """Distinct queries and targets, and which belong together: those of one pair, and those with equal texts."""

    def __init__(self, queries: Sequence[str], targets: Sequence[str]) -> None:
        self.queries, query_of = _distinct(queries)
        self.targets, target_of = _distinct(targets)
        pairs = sorted(set(zip(query_of, target_of, strict=True)))
        self.matches = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)

    @classmethod
    def from_source(cls, source: PairSource) -> CaptionRetrieval:
        """Take the anchors of a source as queries and its positives as targets, or its first two caption columns."""
        dataset = PairDataset(source)
        pairs = [dataset[index] for index in range(len(dataset))]
        return cls([pair["anchor"] for pair in pairs], [pair["positive"] for pair in pairs])

    def __call__(
        self,
        model: LLM2CLIPTextModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
    ) -> dict[str, float | int]:
        """Measure how often the correct target is among the first k.

        Args:
            model, tokenizer: The text tower and its tokenizer.
            batch_size: Largest number of captions per forward pass.

        Returns:
            See `caption_retrieval_metrics`.

        Raises:
            NonFiniteError: An embedding is NaN or infinite.
        """
        encoder = OurEncoder(model, tokenizer)
        device = execution_device(model)

        def embed(texts: list[str]) -> Tensor:
            def encode(part: range) -> Tensor:
                return encoder.embed(texts[part.start : part.stop], batch_size, show_progress_bar)

            return encode_sharded(len(texts), encode, device)

        return self.measure(embed)

    def measure(self, embed: Callable[[list[str]], Tensor]) -> dict[str, float | int]:
        """Measure it with embeddings from elsewhere, such as the `lookup` of a cache; see `caption_retrieval_metrics`.

        Args:
            embed: Maps texts to their embeddings, `(texts, hidden_size)`.

        Raises:
            NonFiniteError: An embedding is NaN or infinite.
        """

        def checked(texts: list[str]) -> Tensor:
            embeds = embed(texts)
            require_finite_rows(embeds, lambda row: f"{texts[row]:.80}", "captions")
            return embeds

        return caption_retrieval_metrics(checked(self.queries), checked(self.targets), self.matches)


def _distinct(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the distinct texts, and the position of each text among them."""
    ids = [caption_id(text) for text in texts]
    first = dict(zip(reversed(ids), reversed(texts), strict=True))
    places = {identity: place for place, identity in enumerate(dict.fromkeys(ids))}
    return [first[identity] for identity in places], [places[identity] for identity in ids]
