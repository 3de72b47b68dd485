"""Requests have their turns: none waits for the whole of another one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from llm2clip.serving.turns import Kind, Turns, Work


def work(name: str, count: int, kind: Kind = "text", cost: int = 10) -> Work:
    names = [f"{name}{row}" for row in range(count)]
    return Work(kind, names, names, [cost] * count, 4)


def taken(turns: Turns, *arrived: Work, only_full: bool = False) -> list[str]:
    return [name for part in turns.take(arrived, only_full) for name in part.inputs]


@pytest.fixture
def turns() -> Turns:
    return Turns({"text": 40, "image": 40})


async def order(turns: Turns, arrivals: Sequence[Sequence[Work]]) -> list[str]:
    """Take batches until nothing waits; return the names of the requests in each."""
    batches = []
    for arrived in arrivals:
        batches.append(taken(turns, *arrived))
    while turns:
        batches.append(taken(turns))
    return ["".join(sorted({name[0] for name in batch})) for batch in batches]


def test_requests_share_a_batch_equally_and_the_first_ones_take_what_is_left(turns: Turns) -> None:
    async def run() -> list[list[str]]:
        large, small = [work("a", 6), work("b", 6)], [work(name, 1) for name in "xyz"]
        return [taken(turns, *large), taken(turns, *small), taken(turns), taken(turns, work("w", 1)), taken(turns)]

    assert asyncio.run(run()) == [
        ["a0", "a1", "b0", "b1"],
        ["x0", "y0", "z0", "a2"],
        ["b2", "b3", "a3", "a4"],
        ["w0", "b4", "b5", "a5"],
        [],
    ]


def test_a_request_that_arrives_goes_before_the_rest_of_one_that_had_its_turn(turns: Turns) -> None:
    async def run() -> list[str]:
        return await order(turns, [[work("a", 12)], [work("x", 1)]])

    assert asyncio.run(run()) == ["a", "ax", "a", "a"]


def test_texts_and_images_do_not_share_a_batch_and_take_turns(turns: Turns) -> None:
    async def run() -> list[str]:
        return await order(turns, [[work("t", 8), work("i", 8, "image"), work("x", 1)]])

    assert asyncio.run(run()) == ["tx", "i", "t", "i", "t"]


def test_what_is_larger_than_a_batch_is_one_of_its_own(turns: Turns) -> None:
    async def run() -> list[str]:
        return await order(turns, [[work("a", 2, cost=100), work("x", 1)]])

    assert asyncio.run(run()) == ["a", "x", "a"]


def test_a_batch_of_a_slow_model_is_smaller(turns: Turns) -> None:
    async def run() -> list[str]:
        long = work("a", 20)
        first = turns.take([long])
        assert len(first[0].rows) == 4
        turns.measure(first, 8.0)  # 5 of cost a second
        return taken(turns)

    assert asyncio.run(run()) == ["a4"]


def test_only_a_full_batch_is_taken_before_its_time(turns: Turns) -> None:
    async def run() -> None:
        assert taken(turns, work("a", 2), only_full=True) == []
        assert taken(turns, work("b", 3), only_full=True) == ["a0", "a1", "b0", "b1"]
        assert taken(turns, only_full=True) == []
        assert taken(turns) == ["b2"]

    asyncio.run(run())


def test_what_nobody_waits_for_is_left_out(turns: Turns) -> None:
    async def run() -> None:
        gone, failed = work("a", 2), work("b", 2)
        gone.future.cancel()
        failed.has_failed = True
        assert taken(turns, gone, work("c", 1), failed) == ["c0"]
        assert not turns

    asyncio.run(run())
