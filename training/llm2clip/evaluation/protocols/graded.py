"""Retrieval where judges found more right pairs than those of the captions: ECCV Caption and CxC, by their package."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass

import torch
from torch import Tensor

from llm2clip.evaluation.benchmark import BenchmarkError, Measurement
from llm2clip.evaluation.graded_data import GradedData, Qrels, eccv_caption
from llm2clip.evaluation.metrics import KS, TILE_SIZE
from llm2clip.evaluation.session import Session
from llm2clip.models.embeddings import inner_products

# Computes scores by name from the ranking and the right candidates of queries, by the ids of the queries.
Metrics = Callable[[Qrels, Qrels], dict[str, float]]


@dataclass(frozen=True)
class GradedRecall:
    """CxC: recall@1, 5 and 10, where any right candidate among the first k is a hit."""

    def measure(self, session: Session, data: GradedData) -> Measurement:
        """Measure both directions; only the captions and images that have a right partner are queries.

        Raises:
            BenchmarkError: There is no right pair.
            ImportError: The package `eccv_caption` is not installed.
        """
        recall = eccv_caption().compute_r_at_k

        def metrics(ranking: Qrels, qrels: Qrels) -> dict[str, float]:
            return {f"recall@{k}": recall(ranking, qrels, k) for k in KS}

        return _measured(session, data, metrics, "any right one", "recall@1")


@dataclass(frozen=True)
class GradedPrecision:
    """ECCV Caption: mAP@R, R-precision and recall@1, over the first R ranks of a query with R right candidates.

    mAP@R is the mean over the R ranks of the precision up to the rank, 0 at ranks of wrong candidates; R-precision is
    the share of right candidates among the first R.
    """

    def measure(self, session: Session, data: GradedData) -> Measurement:
        """Measure both directions; see [`GradedRecall.measure`]."""
        compute = eccv_caption().compute_eccv_metrics
        names = {"map@r": "eccv_map_at_r", "r_precision": "eccv_rprecision", "recall@1": "eccv_r1"}

        def metrics(ranking: Qrels, qrels: Qrels) -> dict[str, float]:
            with redirect_stderr(io.StringIO()):  # a progress bar, also of one query
                scores = compute(ranking, qrels)
            return {name: scores[theirs] for name, theirs in names.items()}

        return _measured(session, data, metrics, "all right ones", "map@r")


def _measured(session: Session, data: GradedData, metrics: Metrics, hit: str, compared: str) -> Measurement:
    if not data.text_qrels or not data.image_qrels:
        raise BenchmarkError("there is no right pair of an image and a caption.")
    images, texts = session.embed_images(data.images), session.embed_texts(data.texts)
    of_texts = _values(texts, images, data.text_ids, data.image_ids, data.text_qrels, metrics)
    of_images = _values(images, texts, data.image_ids, data.text_ids, data.image_qrels, metrics)
    text_values = {f"text_to_image_{name}": values for name, values in of_texts.items()}
    return Measurement(
        protocol={"name": "graded retrieval", "positives": "judged", "hit": hit, "ties": "one order"},
        values=text_values | {f"image_to_text_{name}": values for name, values in of_images.items()},
        compared=(f"image_to_text_{compared}", f"text_to_image_{compared}"),
        # The captions of an image are found or missed together.
        clusters=dict.fromkeys(text_values, data.owners[_rows(data.text_ids, data.text_qrels)]),
        counts={**data.counts(), **session.count_cut(data.texts)},
    )


def _values(
    queries: Tensor,
    corpus: Tensor,
    query_ids: Sequence[int],
    corpus_ids: Sequence[int],
    qrels: Qrels,
    metrics: Metrics,
) -> dict[str, Tensor]:
    """Rank the corpus for each query of `qrels`, and compute its metrics: `(queries,)` float64 each."""
    deepest = max(*KS, *map(len, qrels.values()))
    depth = min(deepest, len(corpus))
    # A part of the set may have fewer candidates than are right.
    absent = list(range(depth - deepest, 0))
    ids, judged, values = torch.tensor(corpus_ids), iter(qrels.items()), []
    for rows in _rows(query_ids, qrels).split(TILE_SIZE):
        scores = inner_products(queries[rows], corpus, corpus.new_empty(len(rows), len(corpus)))
        for ranking in ids[scores.topk(depth).indices].tolist():
            query, right = next(judged)
            values.append(metrics({query: ranking + absent}, {query: right}))
    return {name: torch.tensor([value[name] for value in values], dtype=torch.float64) for name in values[0]}


def _rows(ids: Sequence[int], qrels: Qrels) -> Tensor:
    rows = {number: row for row, number in enumerate(ids)}
    return torch.tensor([rows[query] for query in qrels])
