"""Caption retrieval accuracy, against plain loops and the metrics of the package."""

from __future__ import annotations

import pytest
import torch

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.data import CaptionPairData
from llm2clip.evaluation.metrics import caption_retrieval_metrics
from llm2clip.evaluation.protocols.caption_retrieval import CaptionRetrievalAccuracy
from tests.llm2clip.evaluation.fake_session import FakeSession

PAIRS = 40


def test_the_second_caption_of_the_same_image_is_looked_for() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(2 * PAIRS, 4, generator=generator), dim=1)
    rows[PAIRS:] = torch.nn.functional.normalize(rows[:PAIRS] + 0.3 * rows[PAIRS:], dim=1)
    names = [f"text number {row}" for row in range(2 * PAIRS)]
    # Two images have the same second caption: neither order of them counts.
    names[PAIRS + 1], rows[PAIRS + 1], rows[0], rows[1] = names[PAIRS], rows[PAIRS], rows[PAIRS], rows[PAIRS]
    session = FakeSession(images=[], texts=dict(zip(names, rows, strict=True)), max_words=2)
    found = CaptionRetrievalAccuracy().measure(session, CaptionPairData(names[:PAIRS], names[PAIRS:]))
    hits = 0.5 + 0.5
    for query in range(2, PAIRS):
        nearest = max(range(PAIRS), key=lambda target: float(rows[query] @ rows[PAIRS + target]))
        hits += nearest == query
    assert 1 < hits < PAIRS - 1
    assert found.scores["recall@1"] == pytest.approx(hits / PAIRS)
    metrics = caption_retrieval_metrics(rows[:PAIRS], rows[PAIRS:])
    assert found.scores == {name: pytest.approx(metrics[name]) for name in ("recall@1", "recall@5", "recall@10")}
    assert found.values["recall@1"][:2].tolist() == [0.5, 0.5]
    assert found.counts == {"pairs": PAIRS, "truncated_texts": 2 * PAIRS, "tied_text_queries": 2}
    assert found.protocol["pair"] == "caption 1 to caption 2"
    assert found.protocol["gallery"] == "40 captions"
    with pytest.raises(BenchmarkError, match="no pair of captions"):
        CaptionRetrievalAccuracy().measure(session, CaptionPairData([], []))
