"""Exact search without an index, compared with a plain sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm2clip.search import top_k as module
from llm2clip.search.top_k import top_k


def sorted_by_score_and_row(queries: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores, rows = (queries @ candidates.T).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], rows[:, :k]


@pytest.mark.parametrize("tile_size", [1, 7, 400, 10_000])
@pytest.mark.parametrize(("k", "queries_at_once"), [(1, 1000), (10, 4), (40, 1000)])
def test_top_k_equals_a_plain_sort_in_any_tiling(
    k: int, queries_at_once: int, tile_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", queries_at_once)
    queries, candidates = torch.randn(11, 6), torch.randn(1500, 6)
    scores, rows = top_k(queries, candidates, k, tile_size)
    expected_scores, expected_rows = sorted_by_score_and_row(queries, candidates, k)
    assert torch.equal(rows, expected_rows)
    torch.testing.assert_close(scores, expected_scores)


@pytest.mark.parametrize("tile_size", [64, 500, 10_000])
def test_equal_scores_are_ranked_in_candidate_order(tile_size: int) -> None:
    # Small integers make products exact and most scores equal, including zeros of both signs.
    queries, candidates = torch.randint(-1, 2, (9, 4)).float(), torch.randint(-1, 2, (1500, 4)).float()
    scores, rows = top_k(queries, candidates, 30, tile_size)
    expected_scores, expected_rows = sorted_by_score_and_row(queries, candidates, 30)
    assert torch.equal(rows, expected_rows)
    assert torch.equal(scores, expected_scores)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_the_full_score_matrix_is_never_allocated() -> None:
    queries, candidates = torch.randn(600, 4), torch.randn(5000, 4)
    with LargestTensor() as largest:
        top_k(queries, candidates, 3, tile_size=500)
    assert largest.numel <= module.QUERIES_AT_ONCE * 500


def test_invalid_arguments_are_named_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"matrices of equal width, but are \(2, 3\) and \(4, 5\)"):
        top_k(torch.randn(2, 3), torch.randn(4, 5), 1)
    with pytest.raises(ValueError, match="at least 1, but are 0 and 16384"):
        top_k(torch.randn(2, 3), torch.randn(4, 3), 0)
