"""The work of the rows about search indexes at a small size."""

from __future__ import annotations

import pytest

from benchmarks.rows import r15_index_build, r16_index_search

COUNT = 3000


def test_the_index_finds_what_an_exact_search_finds() -> None:
    ours = r16_index_search._ours(COUNT)()
    exact = r16_index_search._faiss(r16_index_search.EXACT, COUNT)()
    for name in r16_index_search.CONDITIONS:
        assert ours.metrics[f"missed{name}"] <= r16_index_search.ALLOWED_MISSED
        assert exact.metrics[f"missed{name}"] < 0.01  # equal scores in 16 bits may come in another order
        assert ours.values[f"score{name}"] == pytest.approx(exact.values[f"score{name}"], abs=1e-3)


def test_both_builds_hold_all_rows() -> None:
    assert r15_index_build._ours(COUNT)().values == {"images": COUNT}
    assert r15_index_build._faiss(COUNT)().values == {"images": COUNT}


def test_every_goal_is_against_a_figure() -> None:
    (contest,) = r16_index_search.contests("cpu")
    allowed = r16_index_search._allowed()().metrics
    assert {goal.metric for goal in contest.goals if goal.against == r16_index_search.ALLOWED} <= set(allowed)
