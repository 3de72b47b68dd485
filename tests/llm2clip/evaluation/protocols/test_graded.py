"""Metrics of ECCV Caption and CxC, against direct formulas written as plain loops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.graded_data import GradedData
from llm2clip.evaluation.protocols.graded import GradedPrecision, GradedRecall
from tests.llm2clip.evaluation.fake_session import FakeSession, numbered_images

IMAGES, TEXTS = 30, 150


def metrics_of_order(order: list[int], right: set[int]) -> tuple[float, float, float]:
    """Compute mAP@R, R-precision and recall@1 of a ranking as ECCV Caption defines them."""
    total = 0.0
    for rank in range(1, len(right) + 1):
        if order[rank - 1] in right:
            total += len([item for item in order[:rank] if item in right]) / rank
    r_precision = len([item for item in order[: len(right)] if item in right]) / len(right)
    return total / len(right), r_precision, float(order[0] in right)


def judged() -> tuple[GradedData, FakeSession, Tensor]:
    """Five captions of each image and judgements that differ between the directions; only some are queries."""
    generator = torch.Generator().manual_seed(5)
    images = torch.nn.functional.normalize(torch.randn(IMAGES, 6, generator=generator), dim=1)
    owners = torch.arange(IMAGES).repeat_interleave(5)
    texts = images[owners] + 0.8 * torch.randn(TEXTS, 6, generator=generator)
    texts = torch.nn.functional.normalize(texts, dim=1)
    of_texts = {(text, (text * 7 + step) % IMAGES) for text in range(0, TEXTS, 3) for step in range(1 + text % 4)}
    of_texts |= {(text, int(owners[text])) for text in range(0, TEXTS, 3)}
    of_images = {(image, (image * 11 + 13 * step) % TEXTS) for image in range(1, IMAGES, 2) for step in range(9)}
    of_images |= {(image, 5 * image + step) for image in range(1, IMAGES, 2) for step in range(5)}
    # Ids that are no positions.
    image_ids, text_ids = [1000 - image for image in range(IMAGES)], [7 * text + 3 for text in range(TEXTS)]
    data = GradedData(
        numbered_images(IMAGES),
        [f"caption {row}" for row in range(TEXTS)],
        owners,
        image_ids=image_ids,
        text_ids=text_ids,
        text_qrels=qrels(of_texts, text_ids, image_ids),
        image_qrels=qrels(of_images, image_ids, text_ids),
    )
    session = FakeSession(images=images, texts=dict(zip(data.texts, texts, strict=True)), max_words=1)
    return data, session, texts @ images.T


def qrels(pairs: set[tuple[int, int]], queries: list[int], corpus: list[int]) -> dict[int, list[int]]:
    right: dict[int, list[int]] = {}
    for query, candidate in sorted(pairs):
        right.setdefault(queries[query], []).append(corpus[candidate])
    return right


def rankings(data: GradedData, similar: Tensor) -> Iterator[tuple[str, list[tuple[list[int], set[int]]]]]:
    """Ids of the candidates in order, and the right ones of each query, in both directions."""
    for side, scores, right, queries, corpus in (
        ("text_to_image", similar, data.text_qrels, data.text_ids, data.image_ids),
        ("image_to_text", similar.T, data.image_qrels, data.image_ids, data.text_ids),
    ):
        orders = {query: row.argsort(descending=True).tolist() for query, row in zip(queries, scores, strict=True)}
        yield side, [([corpus[place] for place in orders[query]], set(ids)) for query, ids in right.items()]


def test_eccv_caption_metrics_in_both_directions() -> None:
    data, session, similar = judged()
    found = GradedPrecision().measure(session, data)
    assert next(iter(found.scores)) == "text_to_image_map@r"
    assert found.compared == ("image_to_text_map@r", "text_to_image_map@r")
    for side, queries in rankings(data, similar):
        expected = [metrics_of_order(order, right) for order, right in queries]
        for name, values in zip(("map@r", "r_precision", "recall@1"), zip(*expected, strict=True), strict=True):
            assert found.values[f"{side}_{name}"].tolist() == pytest.approx(list(values))
            assert found.scores[f"{side}_{name}"] == pytest.approx(sum(values) / len(values))
    assert found.counts == {**data.counts(), "truncated_texts": TEXTS}


def test_cxc_recall_in_both_directions() -> None:
    data, session, similar = judged()
    found = GradedRecall().measure(session, data)
    for side, queries in rankings(data, similar):
        for k in (1, 5, 10):
            hits = [any(item in right for item in order[:k]) for order, right in queries]
            assert found.scores[f"{side}_recall@{k}"] == pytest.approx(sum(hits) / len(hits))
            assert found.values[f"{side}_recall@{k}"].tolist() == hits
    assert 0 < found.scores["text_to_image_recall@1"] < found.scores["text_to_image_recall@5"] < 1


def test_what_is_right_but_not_in_the_corpus_counts_and_is_never_found(capfd: pytest.CaptureFixture[str]) -> None:
    """As two captions of ECCV Caption; and a part of the set may have fewer candidates than are right."""
    images, texts = torch.eye(2), {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])}
    data = GradedData(
        numbered_images(2), list(texts), torch.arange(2), image_ids=[5, 6], text_ids=[50, 60],
        text_qrels={50: [5]}, image_qrels={5: [50, 71], 6: [60, 50, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80]},
    )  # fmt: skip
    session = FakeSession(images=images, texts=texts)
    found = GradedPrecision().measure(session, data)
    assert found.values["image_to_text_r_precision"].tolist() == pytest.approx([1 / 2, 2 / 12])
    assert found.values["image_to_text_map@r"].tolist() == pytest.approx([1 / 2, 2 / 12])
    assert GradedRecall().measure(session, data).scores["image_to_text_recall@10"] == 1
    assert "it/s" not in capfd.readouterr().err
    with pytest.raises(BenchmarkError, match="no right pair"):
        GradedPrecision().measure(session, replace(data, text_qrels={}))
