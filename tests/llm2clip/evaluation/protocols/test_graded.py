"""Metrics of ECCV Caption and CxC, against direct formulas written as plain loops and averages over orders of ties."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, permutations

import pytest
import torch
from torch import Tensor

from llm2clip.evaluation.data import GradedData
from llm2clip.evaluation.protocols import graded
from llm2clip.evaluation.protocols.graded import GradedPrecision, GradedRecall, precision_at_r
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


def metrics(scores: list[float], right: set[int]) -> tuple[float, float, float]:
    """Average them over all orders of the candidates that agree with the scores."""
    orders = [
        list(order)
        for order in permutations(range(len(scores)))
        if all(scores[one] >= scores[other] for one, other in pairwise(order))
    ]
    found = [metrics_of_order(order, right) for order in orders]
    first, second, third = zip(*found, strict=True)
    return sum(first) / len(found), sum(second) / len(found), sum(third) / len(found)


@pytest.mark.parametrize(
    ("scores", "right"),
    [
        ([0.9, 0.7, 0.5, 0.3, 0.1], {0, 2, 4}),
        ([0.5, 0.5, 0.5, 0.5, 0.5], {1, 3}),
        ([0.9, 0.5, 0.5, 0.5, 0.1], {0, 2, 3}),
        ([0.5, 0.5, 0.5, 0.2, 0.2], {3, 4, 0}),
        ([0.9, 0.8, 0.8, 0.2, 0.2], {0}),
        ([0.1, 0.2, 0.2, 0.2, 0.2], {0, 1, 2, 3, 4}),
    ],
)
def test_precision_is_the_mean_over_the_orders_of_ties(scores: list[float], right: set[int]) -> None:
    # A candidate of cosine s to the query (1, 0).
    candidates = torch.tensor([[score, (1 - score**2) ** 0.5] for score in scores])
    matches = torch.tensor([[0, place] for place in sorted(right)])
    found, _ = precision_at_r(torch.tensor([[1.0, 0.0]]), candidates, matches)
    assert [value.item() for value in found.values()] == pytest.approx(metrics(scores, right))


@pytest.mark.parametrize("margin", [1, 64])
def test_a_tie_that_ends_far_behind_is_taken_whole(margin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graded, "MARGIN", margin)
    candidates = torch.tensor([[1.0, 0.0]] * 200 + [[0.0, 1.0]] * 50)
    found, is_tied = precision_at_r(torch.tensor([[1.0, 0.0]]), candidates, torch.tensor([[0, 3], [0, 249]]))
    assert (found["r_precision"].item(), found["recall@1"].item()) == pytest.approx((1 / 200, 1 / 200))
    assert is_tied.tolist() == [True]


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
    data = GradedData(
        numbered_images(IMAGES),
        [f"caption {row}" for row in range(TEXTS)],
        owners,
        torch.tensor(sorted(of_texts)),
        torch.tensor(sorted(of_images)),
    )
    session = FakeSession(images=images, texts=dict(zip(data.texts, texts, strict=True)), max_words=1)
    return data, session, texts @ images.T


def rankings(data: GradedData, similar: Tensor) -> Iterator[tuple[str, list[tuple[list[int], set[int]]]]]:
    """Order of the candidates and right ones of each query, in both directions."""
    for side, scores, matches in (
        ("text_to_image", similar, data.matches),
        ("image_to_text", similar.T, data.image_matches),
    ):
        assert matches is not None
        right: dict[int, set[int]] = {}
        for query, candidate in matches.tolist():
            right.setdefault(query, set()).add(candidate)
        yield side, [(scores[query].argsort(descending=True).tolist(), right[query]) for query in sorted(right)]


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
    ties = {"tied_text_queries": 0, "tied_image_queries": 0}
    assert found.counts == {**data.counts(), "truncated_texts": TEXTS, **ties}


def test_cxc_recall_in_both_directions() -> None:
    data, session, similar = judged()
    found = GradedRecall().measure(session, data)
    for side, queries in rankings(data, similar):
        for k in (1, 5, 10):
            hits = [any(item in right for item in order[:k]) for order, right in queries]
            assert found.scores[f"{side}_recall@{k}"] == pytest.approx(sum(hits) / len(hits))
            assert found.values[f"{side}_recall@{k}"].tolist() == hits
    assert 0 < found.scores["text_to_image_recall@1"] < found.scores["text_to_image_recall@5"] < 1
