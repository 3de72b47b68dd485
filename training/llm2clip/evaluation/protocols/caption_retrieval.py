"""Caption retrieval accuracy (CRA): how often a model finds another caption of the same image."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llm2clip.evaluation.benchmark import BenchmarkError, Measurement
from llm2clip.evaluation.data import CaptionPairData
from llm2clip.evaluation.metrics import caption_retrieval_metrics, retrieval_ranks
from llm2clip.evaluation.session import Session


@dataclass(frozen=True)
class CaptionRetrievalAccuracy:
    """One caption of an image is the query, another one the target, among those of all images; ties are averaged.

    It needs no images, so that text towers are measured as well as whole models. The embeddings are those that
    `embed_texts` gives: of an LLM2CLIP model after its adapter, of a text tower without one.

    Args:
        pair: Which captions of each image, in words.
    """

    pair: str = "caption 1 to caption 2"

    def measure(self, session: Session, data: CaptionPairData) -> Measurement:
        """Measure recall@1, which the paper reports, and recall@5 and 10.

        Raises:
            BenchmarkError: There is no pair.
        """
        count = len(data.queries)
        if count == 0:
            raise BenchmarkError("there is no pair of captions.")
        embeds = session.embed_texts([*data.queries, *data.targets])
        qrels = torch.arange(count)[:, None].expand(-1, 2) if data.qrels is None else data.qrels
        ranks, _, _ = retrieval_ranks(embeds[count:], embeds[:count], qrels)
        return Measurement(
            protocol={
                "name": "caption retrieval",
                "pair": self.pair,
                "gallery": f"{len(data.targets)} captions",
                "prompt": "of the model",
                "ties": "expected value",
            },
            values=ranks.recalls(),
            ranks=ranks.mean_and_median(),
            counts={
                "pairs": len(qrels),
                **session.count_cut([*data.queries, *data.targets]),
                "tied_text_queries": int(ranks.is_tied.sum()),
            },
        )


def caption_pair_metrics(session: Session, data: CaptionPairData) -> dict[str, float | int]:
    """Measure caption retrieval while a model trains: see [`caption_retrieval_metrics`]."""
    return caption_retrieval_metrics(session.embed_texts(data.queries), session.embed_texts(data.targets), data.qrels)
