"""Caption retrieval of a text encoder: does it find the other caption of the same picture (paper, appendix D)?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from llm2clip.data import PairDataset, PairSource, caption_id
from llm2clip.embedding.sharding import encode_sharded
from llm2clip.evaluation.metrics import caption_retrieval_metrics
from modeling_llm2clip import LLM2CLIPTextModel


class CaptionRetrieval:
    """Queries and targets, and which belong together: the pairs, and all whose texts are equal.

    Args:
        queries: Query of each pair.
        targets: Target of each pair.
    """

    def __init__(self, queries: Sequence[str], targets: Sequence[str]) -> None:
        self.queries, query_of = _distinct(queries)
        self.targets, target_of = _distinct(targets)
        pairs = sorted(set(zip(query_of, target_of, strict=True)))
        self.matches = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)

    @classmethod
    def from_source(cls, source: PairSource) -> CaptionRetrieval:
        """The anchors of a source as queries, its positives as targets; of caption columns, the first two."""
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
        """Measure how often the right target is among the first k. See `caption_retrieval_metrics`."""
        device = model.get_input_embeddings().weight.device
        assert isinstance(device, torch.device)
        queries, targets = (
            encode_sharded(
                len(texts),
                lambda part, texts=texts: model.encode(  # type: ignore[misc]
                    texts[part.start : part.stop], tokenizer, batch_size, show_progress_bar
                ),
                device,
            )
            for texts in (self.queries, self.targets)
        )
        return caption_retrieval_metrics(queries, targets, self.matches)


def _distinct(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The texts without those that equal an earlier one, and the place of each text among them."""
    places: dict[int, int] = {}
    distinct: list[str] = []
    index = []
    for text in texts:
        identity = caption_id(text)
        if identity not in places:
            places[identity] = len(distinct)
            distinct.append(text)
        index.append(places[identity])
    return distinct, index
