"""The work of the rows about students at a small size."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.rows import r19_one_query, r20_serve
from benchmarks.small_llama import new_folder
from benchmarks.student_inputs import queries, write_student
from llm2clip import Student


def test_one_query_has_nearly_the_same_vector_in_every_precision() -> None:
    works = (
        r19_one_query._torch(layers=1),
        r19_one_query._torch("bfloat16", layers=1),
        r19_one_query._int8(layers=1),
    )
    expected, *others = (work().values["embeddings"] for work in works)
    assert (expected @ expected.T).triu(1).max() < 0.99  # queries differ by more than precisions do
    for rows in others:
        assert (rows * expected).sum(dim=1).min() > 0.999
        assert not rows.equal(expected)


@pytest.mark.slow
def test_answers_of_the_server_are_those_of_the_student() -> None:
    answered = r20_serve._served(r20_serve._ours, 12, 40, layers=1)().values["embeddings"]
    expected = Student.from_pretrained(write_student(new_folder(), layers=1)).encode(queries(40, 12))
    torch.testing.assert_close(torch.from_numpy(answered).float(), expected, atol=1e-5, rtol=0)


def test_a_server_that_does_not_start_is_an_error() -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match="the server ended with status 3"):
        r20_serve._served(lambda folder, port: (command, "/"), 12, 2, layers=1)


@pytest.mark.parametrize("row", [r19_one_query, r20_serve])
def test_every_goal_is_against_a_contestant(row) -> None:
    for contest in row.ROW.contests("cpu"):
        assert contest.goals
        assert {goal.against for goal in contest.goals} <= set(contest.contestants)
