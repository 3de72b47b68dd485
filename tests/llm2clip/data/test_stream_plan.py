"""The order of a reader is known without reading: its place after any number of rows, and what is left of an epoch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llm2clip.data.stream_plan import Part, ReaderOrder, RowPlan, Segment, TablePlan


def rows_of(order: ReaderOrder) -> list[tuple[int, int]]:
    """The order, row by row, as a buffer that is filled and drawn from would give it."""
    turns, places = order.start(0).turns, order.places(0)
    walk = ReaderOrder(order.parts, order.width, order.num_rows, 0).start(0)
    buffer = [(order.parts[part].file, order.parts[part].rows[at]) for part, at in filter(None, walk.held)]
    buffer = buffer[: order.size]
    found = []
    while (turn := turns.next()) is not None:
        place = next(places)
        found.append(buffer[place])
        buffer[place] = (order.parts[turn[0]].file, order.parts[turn[0]].rows[turn[1]])
    return [*found, *(buffer[place] for place in order.last_places())]


@pytest.mark.parametrize("trial", range(12))
def test_the_rest_of_a_share_is_known_at_every_row(trial: int) -> None:
    draw = np.random.default_rng(trial)
    parts = [Part(file, range(int(draw.integers(30)))) for file in range(draw.integers(1, 20))]
    order = ReaderOrder([*parts, Part(99, range(3, 5))], int(draw.integers(1, 6)), int(draw.integers(40)), trial)
    rows = rows_of(order)
    assert len(set(rows)) == len(rows) == order.num_rows
    for done in range(order.num_rows + 1):
        left = [(part.file, row) for part in order.remaining(done) for row in part.rows]
        assert sorted(left) == sorted(rows[done:])


def test_a_large_buffer_mixes_the_open_files() -> None:
    order = RowPlan([50] * 20, 0).order(0, 1, 0, 200)
    files = [file for file, _ in rows_of(order)]
    assert len(set(files[:200])) >= 10
    assert len(set(files)) == 20


def everything(
    plan: RowPlan, epoch: int, num_readers: int, delivered: list[int] | None = None
) -> list[tuple[int, int]]:
    """What all readers read in an epoch, after the rows that they have yielded of it."""
    found = []
    for reader in range(num_readers):
        at, done = plan.locate(delivered[reader], num_readers, reader) if delivered else (epoch, 0)
        assert at == epoch
        found += rows_of(plan.order(epoch, num_readers, reader, 7))[done:]
    return found


@pytest.mark.parametrize("kind", [RowPlan, TablePlan])
def test_other_readers_read_what_is_left_of_an_epoch(kind: type[RowPlan]) -> None:
    counts = [13, 0, 8, 21, 5] if kind is RowPlan else [47]
    every = sorted((file, row) for file, rows in enumerate(counts) for row in range(rows))
    plan = kind(counts, 3)
    assert sorted(everything(plan, 0, 3)) == every
    before = [rows_of(plan.order(0, 3, reader, 7))[: 5 + reader] for reader in range(3)]
    plan.earlier.append(Segment(3, 7, [5, 6, 7]))
    plan.earlier.append(Segment(2, 4, [3, 3]))
    between = [rows_of(plan.order(0, 2, reader, 4, depth=1))[:3] for reader in range(2)]
    assert sorted([*itertools.chain(*before, *between), *everything(plan, 0, 4, [0] * 4)]) == every
    assert sorted(everything(plan, 1, 4)) == every


def test_readers_of_different_epochs_are_followed_up() -> None:
    plan = RowPlan([10, 10], 0)
    ahead, behind = (rows_of(plan.order(epoch, 2, reader, 4)) for epoch, reader in ((1, 0), (0, 1)))
    plan.earlier.append(Segment(2, 4, [13, 8]))
    assert sorted(everything(plan, 0, 2, [0] * 2)) == sorted(behind[8:])
    left = sorted(row for reader in range(3) for row in rows_of(plan.order(1, 3, reader, 4)))
    assert len(left) == 17
    assert not set(left) & set(ahead[:3])


def test_places_far_on_are_found_at_once() -> None:
    """Thirty million rows, of which none may be walked through."""
    plan = RowPlan([5000] * 6000, 0)
    order = plan.order(0, 1, 0, 20_000)
    start = order.start(29_000_000)
    held = [place for place in start.held if place is not None]
    assert len(set(held)) == 20_000
    left = sum(len(order.parts[part].rows) - at for part, at in start.turns.rest())
    assert left + len(held) == 1_000_000
