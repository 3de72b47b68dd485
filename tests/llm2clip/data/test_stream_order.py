"""The order of a stream is arithmetic: no lane is of two readers, and no row is walked through."""

from __future__ import annotations

import pytest

from llm2clip.data.stream_order import Lanes, SourceOrder


@pytest.mark.parametrize(("batch", "world", "workers"), [(32, 1, 1), (32, 4, 2), (10, 3, 4), (7, 2, 6), (64, 64, 8)])
def test_no_lane_is_of_two_readers(batch: int, world: int, workers: int) -> None:
    lanes = Lanes.choose(batch, world, workers)
    owners: dict[int, set[tuple[int, int]]] = {}
    for step in range(4 * workers * lanes.number):
        for rank in range(world):
            first = (step * world + rank) * batch
            assert first % lanes.chunk == 0
            for chunk in range(first // lanes.chunk, (first + batch) // lanes.chunk):
                owners.setdefault(chunk % lanes.number, set()).add((rank, step % workers))
    assert {len(readers) for readers in owners.values()} == {1}


def test_lanes_do_not_depend_on_usual_numbers_of_readers() -> None:
    cuts = {Lanes.choose(256 // world, world, workers) for world in (1, 2, 4, 8) for workers in (1, 2, 4, 8)}
    assert len(cuts) == 1


def test_a_place_far_on_is_found_at_once() -> None:
    """A hundred million rows, of which none is walked through."""
    order = SourceOrder(100_000_000, Lanes.choose(512, 8, 8))
    chunk = 290_000_000 // order.lanes.chunk
    (piece,) = order.pieces(chunk)
    assert piece.epoch == 2
    assert piece.lane == chunk % order.lanes.number
