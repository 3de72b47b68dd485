"""The order of a stream is arithmetic: every batch is of all lanes, whoever reads it, and no row is walked through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from llm2clip.data.stream_order import BLOCK, Lanes, SourceOrder, row_reader

FILES, PER_FILE = 60, 1_000
ROWS = FILES * PER_FILE


def read_rows(epoch: int, file: int, rows: Iterator[int]) -> Iterator[int]:
    """Rows of the data by their number, of files of `PER_FILE` rows each."""
    return (file * PER_FILE + row for row in rows)


def batches(
    batch: int, seed: int = 0, block: int = BLOCK, reader: int = 0, readers: int = 1, counts: list[int] | None = None
) -> Iterator[np.ndarray]:
    """The rows of this reader's share of the batches of an epoch: the whole batch, or every `readers`th part."""
    counts = counts or [PER_FILE] * FILES
    lanes, share = Lanes.choose(batch, block), batch // readers
    order = SourceOrder(sum(counts), lanes, seed=seed)
    reading = row_reader(read_rows, counts, order, block, lambda places: places // share % readers == reader)
    for first in range(reader * share, sum(counts) - batch, batch):
        chunks = range(first // lanes.chunk, -(-(first + share) // lanes.chunk))
        places = [(chunk, max(first, chunk * lanes.chunk), (chunk + 1) * lanes.chunk) for chunk in chunks]
        parts = [(chunk, begin % lanes.chunk, min(end, first + share)) for chunk, begin, end in places]
        yield np.array(
            [row for chunk, begin, end in parts for row in reading(chunk, begin, end - chunk * lanes.chunk)]
        )


def runs(rows: np.ndarray) -> int:
    """Into how many runs of consecutive rows of the data a batch falls."""
    return 1 + int((np.diff(np.sort(rows)) > 1).sum())


@pytest.mark.parametrize(("batch", "processes"), [(4096, 8), (1024, 8), (250, 2), (16384, 8)])
def test_a_batch_and_the_share_of_a_process_are_drawn_from_all_of_the_data(batch: int, processes: int) -> None:
    """Of 60 files and 60,000 rows: most rows of a batch have no neighbour in it."""
    found = list(itertools.islice(batches(batch), 3 if batch > ROWS // 8 else 7))
    assert len({*np.concatenate(found)}) == len(found) * batch
    for rows in found:
        assert len({*(rows // PER_FILE)}) >= 45, "files"
        assert runs(rows) > 0.49 * batch, "also while the first blocks are short"
        shares = np.split(rows, processes)
        assert min(map(runs, shares)) >= 64
        assert len({*(rows // BLOCK)}) >= 64, "places of the data"
    assert runs(found[-1]) > (0.6 if batch > ROWS // 8 else 0.75) * batch
    place = np.arange(len(found) * batch)
    at_random = (place**2 + (ROWS - place) ** 2) / (2 * ROWS)
    assert np.abs(np.concatenate(found) - place).mean() == pytest.approx(at_random.mean(), rel=0.1)


@pytest.mark.parametrize(("batch", "block"), [(64, 8), (64, 1024), (1536, 64), (4096, 64), (4096, 256), (4096, 1024)])
def test_rows_that_are_shuffled_together_are_in_different_batches(batch: int, block: int) -> None:
    """At every size of batch and block; and other ones with another seed."""
    found, other = (next(itertools.islice(batches(batch, seed, block), 4, 5)) for seed in (0, 1))
    assert runs(found) > 0.75 * batch
    assert len({*found} & {*other}) < 0.15 * batch


def test_without_a_shuffle_rows_are_in_order() -> None:
    assert np.array_equal(np.concatenate(list(itertools.islice(batches(4096, 3, 0), 4))), np.arange(4 * 4096))


@pytest.mark.parametrize("readers", [2, 3, 5, 6, 8, 12])
@pytest.mark.parametrize("counts", [None, [7, 0, 5_000, 1, 300]])
def test_readers_share_a_batch_that_does_not_depend_on_them(readers: int, counts: list[int] | None) -> None:
    batch = 120
    expected = list(itertools.islice(batches(batch, counts=counts), 30))
    shares = [batches(batch, reader=reader, readers=readers, counts=counts) for reader in range(readers)]
    for step, rows in enumerate(expected):
        assert np.array_equal(np.concatenate([next(share) for share in shares]), rows), step


@pytest.mark.parametrize("batch", [1, 30, 64, 250, 1000, 4096, 2018, 16384, 65536])
def test_chunks_divide_every_batch(batch: int) -> None:
    for block in (1, 8, 256, 1024):
        chunk, number, rows = Lanes.choose(batch, block)
        assert rows == batch
        assert batch % chunk == 0
        assert 64 <= number < 1024
        assert chunk <= max(1, block // 4) or number >= 512


def test_a_small_epoch_has_another_order_every_time() -> None:
    """Of fewer rows than lanes."""
    order = [SourceOrder(40, Lanes.choose(8), seed=seed, first_epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    readers = [row_reader(read_rows, [40], one, BLOCK, lambda places: places >= 0) for one in order]
    orders = {tuple(row for chunk in range(40) for row in read(chunk, 0, 1)) for read in readers}
    assert {len(set(rows)) for rows in orders} == {40}
    assert len(orders) == 4


def test_a_place_far_on_is_found_at_once() -> None:
    """A hundred million rows, of which none is walked through."""
    order = SourceOrder(100_000_000, Lanes.choose(4096))
    chunk = 290_000_000 // order.lanes.chunk
    (piece,) = order.pieces(chunk)
    assert piece.epoch == 2
    assert piece.lane == chunk % order.lanes.number
    places = order.places(2, chunk, 200)
    size, step = order.lanes.chunk, order.lanes.chunk * order.lanes.number
    assert np.array_equal(places[:200], [chunk * size + row // size * step + row % size for row in range(200)])
