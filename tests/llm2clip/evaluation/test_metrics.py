"""Retrieval metrics: compared with the original code, and with a naive implementation of their definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llm2clip.evaluation import metrics as evaluation_metrics
from llm2clip.evaluation.metrics import caption_retrieval_metrics, retrieval_metrics, retrieval_ranks
from tests.golden import load_golden

DIRECTIONS = {"text_to_image": "image_retrieval", "image_to_text": "text_retrieval"}


def rank_of_best_match(queries: torch.Tensor, candidates: torch.Tensor, qrels: torch.Tensor) -> torch.Tensor:
    return retrieval_ranks(candidates, queries, qrels)[0].expected()


def diagonal(rows: int) -> Tensor:
    return torch.arange(rows)[:, None].expand(-1, 2)


def naive_ranks(queries: Tensor, candidates: Tensor, qrels: Tensor) -> list[int]:
    """Count for each query the wrong candidates that are closer than the closest correct one."""
    scores = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(candidates).T
    ranks = []
    for query, row in enumerate(scores.tolist()):
        correct = {candidate for q, candidate in qrels.tolist() if q == query}
        best = max(row[candidate] for candidate in correct)
        ranks.append(sum(score > best for candidate, score in enumerate(row) if candidate not in correct))
    return ranks


def noisy_captions(images: int, per_image: int, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Image embeddings, text embeddings in random order, and (text, image) pairs in random order."""
    image = torch.randn(images, width)
    owner = torch.arange(images).repeat_interleave(per_image)[torch.randperm(images * per_image)]
    text = image[owner] + 1.5 * torch.randn(len(owner), width)
    qrels = torch.stack([torch.arange(len(owner)), owner], dim=1)
    return image, text, qrels[torch.randperm(len(qrels))]


@pytest.mark.parametrize(
    "name", ["retrieval_global_a", "retrieval_global_b", "retrieval_multi_a", "retrieval_multi_b"]
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_recalls_and_ranks_equal_the_original(name: str, direction: str) -> None:
    golden = load_golden(name)
    image, text = (golden[f"in/{key}"] @ golden["in/projection"] for key in ("images", "texts"))
    text = text.reshape(-1, text.shape[-1])
    texts = torch.arange(len(text))
    qrels = torch.stack([texts, texts // (len(text) // len(image))], dim=1)
    # Two queries where scores are equal, whose order is torch.topk's in the original (the fixture says so).
    queries = len(text if direction == "text_to_image" else image)
    tolerance = 1e-6 + (2 / queries if golden.meta["has_ties"] else 0)
    recalls = {
        int(key.rpartition("@")[2]): value
        for key, value in golden.meta["metrics"].items()
        if key.startswith(f"{DIRECTIONS[direction]}_recall@")
    }
    assert {1, 5, 10} <= set(recalls)
    ours = retrieval_metrics(image, text, qrels, sorted(recalls))
    for k, original in recalls.items():
        assert ours[f"{direction}_recall@{k}"] == pytest.approx(original, abs=tolerance)
    if "global" in name:
        ranks = golden.meta["get_metrics"]
        assert ours[f"{direction}_mean_rank"] == pytest.approx(ranks[f"{direction}_mean_rank"], abs=tolerance)
        assert ours[f"{direction}_median_rank"] == ranks[f"{direction}_median_rank"]


@pytest.mark.parametrize("tile_size", [1, 7, 1000])
def test_five_captions_per_image_equal_a_naive_count_in_any_tiling(
    tile_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_metrics, "TILE_SIZE", tile_size)
    image, text, qrels = noisy_captions(images=12, per_image=5)
    to_image, to_text = naive_ranks(text, image, qrels), naive_ranks(image, text, qrels.flip(1))
    assert max(to_image) > 5, "the example must have failures"
    assert max(to_text) > 1
    assert rank_of_best_match(text, image, qrels).tolist() == to_image
    assert rank_of_best_match(image, text, qrels.flip(1)).tolist() == to_text
    metrics = retrieval_metrics(image, text, qrels, ks=(1, 3))
    for direction, ranks in (("text_to_image", to_image), ("image_to_text", to_text)):
        for k in (1, 3):
            assert metrics[f"{direction}_recall@{k}"] == pytest.approx(sum(r < k for r in ranks) / len(ranks))
        assert metrics[f"{direction}_mean_rank"] == pytest.approx(1 + sum(ranks) / len(ranks))


def test_several_images_per_caption_count_as_correct() -> None:
    """A caption such as "a dog" that several images share, as the concepts of the bundled data do."""
    image = torch.randn(30, 6)
    text = torch.randn(8, 6)
    qrels = torch.cat([torch.stack([torch.randint(8, (30,)), torch.arange(30)], 1), diagonal(8)])
    # A pair that is listed twice is one pair.
    qrels = torch.cat([qrels, qrels[:5]])
    assert rank_of_best_match(text, image, qrels).tolist() == naive_ranks(text, image, qrels)
    assert rank_of_best_match(image, text, qrels.flip(1)).tolist() == naive_ranks(image, text, qrels.flip(1))


def test_a_collapsed_model_scores_like_guessing() -> None:
    one = torch.randn(1, 16)
    metrics = retrieval_metrics(one.expand(40, -1), one.expand(40, -1), diagonal(40), ks=(1, 10))
    assert metrics["text_to_image_recall@1"] == pytest.approx(1 / 40)
    assert metrics["image_to_text_recall@10"] == pytest.approx(10 / 40)
    assert metrics["text_to_image_mean_rank"] == 20.5
    zeros = caption_retrieval_metrics(torch.zeros(5, 4), torch.zeros(5, 4))
    assert zeros["recall@1"] == pytest.approx(1 / 5)


def test_ties_count_as_the_mean_over_all_orders() -> None:
    """Two correct and three wrong candidates with one score, one wrong candidate before them, one behind."""
    query = torch.tensor([[1.0, 0.0]])
    candidates = torch.tensor([[2.0, 0.0]] + 5 * [[1.0, 1.0]] + [[0.0, 1.0]])
    qrels = torch.tensor([[0, 1], [0, 2], [0, 6]])
    ranks = []
    for order in itertools.permutations(range(1, 6)):
        ranks.append(1 + min(order.index(1), order.index(2)))
    assert rank_of_best_match(query, candidates, qrels).item() == pytest.approx(sum(ranks) / len(ranks))
    metrics = caption_retrieval_metrics(query, candidates, qrels, ks=(1, 2, 3, 4, 5, 6))
    for k in (1, 2, 3, 4, 5, 6):
        assert metrics[f"recall@{k}"] == pytest.approx(sum(rank < k for rank in ranks) / len(ranks))


def test_scores_within_rounding_errors_are_ties() -> None:
    """A copy of the correct vector has the same score at every position, although rounding depends on it."""
    candidates = torch.randn(300, 129)
    candidates[torch.tensor([3, 150, 299])] = candidates[0].clone()
    candidates[7] = candidates[0] + 0.01 * torch.randn(129)
    qrels = torch.tensor([[0, 0], [0, 299]])
    # Two of four equal ones are correct: the mean number of wrong ones before the first of them.
    assert rank_of_best_match(candidates[:1] * 3, candidates, qrels).tolist() == [pytest.approx(2 / 3)]


def test_an_image_without_text_is_a_wrong_candidate_but_not_a_query() -> None:
    image, text = torch.eye(3), torch.eye(3)[1:] + torch.tensor([2.0, 0.0, 0.0])
    metrics = retrieval_metrics(image, text, torch.tensor([[0, 1], [1, 2]]), ks=(1, 2))
    assert metrics["text_to_image_recall@1"] == 0.0
    assert metrics["text_to_image_recall@2"] == 1.0
    assert metrics["image_to_text_recall@1"] == 1.0
    assert (metrics["num_images"], metrics["num_images_with_text"]) == (3, 2)


def test_norm_and_dtype_of_embeddings_do_not_change_the_metrics() -> None:
    image, text, qrels = noisy_captions(images=10, per_image=2)
    expected = retrieval_metrics(image, text, qrels)
    scaled = retrieval_metrics(image * torch.rand(10, 1).add(0.1), 1e4 * text, qrels)
    assert scaled == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retrieval_metrics(image.double(), text.requires_grad_(), qrels) == expected
    half = retrieval_metrics(image.half(), text.detach().half(), qrels)
    assert half["text_to_image_mean_rank"] == pytest.approx(expected["text_to_image_mean_rank"], abs=0.2)


def test_caption_retrieval_pairs_rows_by_default() -> None:
    query = torch.randn(20, 6)
    target = query + torch.randn(20, 6)
    metrics = caption_retrieval_metrics(query, target, ks=(1, 2))
    ranks = naive_ranks(query, target, diagonal(20))
    assert metrics["recall@1"] == pytest.approx(sum(rank == 0 for rank in ranks) / 20)
    assert metrics["recall@2"] == pytest.approx(sum(rank < 2 for rank in ranks) / 20)
    assert metrics["mean_rank"] == pytest.approx(1 + sum(ranks) / 20)
    assert (metrics["num_queries"], metrics["num_targets"]) == (20, 20)
    order = torch.randperm(20)
    shuffled = caption_retrieval_metrics(query, target[order], torch.stack([order, torch.arange(20)], 1), ks=(1, 2))
    assert shuffled == metrics
    more_targets = caption_retrieval_metrics(query[:5], target, diagonal(5))
    assert (more_targets["num_queries"], more_targets["num_targets"]) == (5, 20)


def test_median_of_two_middle_ranks_is_rounded_down() -> None:
    # Ranks 1 and 4 (from 1), whose middle is 2.5.
    targets = torch.eye(4)
    queries = torch.tensor([[9.0, 1.0, 1.0, 1.0], [3.0, 0.0, 2.0, 1.0]])
    metrics = caption_retrieval_metrics(queries, targets, torch.tensor([[0, 0], [1, 1]]))
    assert metrics["mean_rank"] == 2.5
    assert metrics["median_rank"] == 2


IMAGE, TEXT = torch.eye(4, 3), torch.eye(5, 3)
MATCHES = torch.tensor([[0, 0], [1, 1], [2, 2], [3, 3], [4, 3]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval_metrics(IMAGE, TEXT, MATCHES[:3]), "correct image in qrels; 3, 4 of 5 have none"),
        (
            lambda: retrieval_metrics(IMAGE, TEXT, MATCHES + torch.tensor([0, 1])),
            "qrels name image 4",
        ),
        (lambda: rank_of_best_match(TEXT, IMAGE, MATCHES.float()), r"int64 pairs of shape \(p, 2\)"),
        (lambda: caption_retrieval_metrics(IMAGE, TEXT), "Without qrels"),
        (lambda: rank_of_best_match(TEXT[:, :2], IMAGE, MATCHES), "matrices of one width"),
        (lambda: caption_retrieval_metrics(IMAGE[:0], TEXT[:0]), "no query embeddings"),
        (lambda: caption_retrieval_metrics(IMAGE, IMAGE, ks=(0,)), "k of at least 1"),
    ],
    ids=["unmatched", "unknown", "dtype", "lengths", "widths", "empty", "k"],
)
def test_invalid_qrels_and_shapes_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_embeddings_are_named_by_row(value: float) -> None:
    image, text = torch.randn(6, 3), torch.randn(6, 3)
    text[4, 1] = value
    with pytest.raises(ValueError, match=r"Non-finite text embeddings in rows 4\."):
        retrieval_metrics(image, text, diagonal(6))
    broken = torch.full((30, 3), value)
    with pytest.raises(ValueError, match=r"rows 0, 1, 2, .*, 19 and 10 more"):
        caption_retrieval_metrics(torch.randn(30, 3), broken)
