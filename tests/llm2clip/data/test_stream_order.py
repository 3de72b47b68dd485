"""The order of a stream is arithmetic: every row once an epoch for any numbers, and no lane of two readers."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest

from llm2clip.data.stream_order import EvenMixture, Lanes, SourceOrder


def rows_of(order: SourceOrder, chunk: int) -> list[tuple[int, int]]:
    """The epoch and number of each row of a chunk."""
    found = []
    for piece in order.pieces(chunk):
        start = 0 if piece.lane is None else int(order.cut(piece.epoch).starts[piece.lane])
        found += [(piece.epoch, start + row) for row in range(piece.first, piece.last)]
    return found


@pytest.mark.parametrize("trial", range(20))
def test_every_row_comes_once_in_its_epoch_and_any_chunk_is_known_without_those_before_it(trial: int) -> None:
    draw = np.random.default_rng(trial)
    rows, chunk, number = (int(draw.integers(1, top)) for top in (400, 30, 40))
    order = SourceOrder(rows, Lanes(chunk, number))
    read = list(itertools.chain.from_iterable(rows_of(order, at) for at in range(-(-3 * rows // chunk))))
    for epoch in range(3):
        assert sorted(read[epoch * rows : (epoch + 1) * rows]) == [(epoch, row) for row in range(rows)]
    mixture = EvenMixture([rows, 77], rows + 77)
    one, *fresh = (SourceOrder(rows, Lanes(chunk, number), partial(mixture.before, 0)) for _ in range(11))
    for at, other in zip(draw.integers(0, 3 * rows // chunk + 2, 10).tolist(), fresh, strict=True):
        assert rows_of(one, at) == rows_of(other, at)


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
