"""A stream goes on from any place: with as many readers as it would have, with others reading what is left."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from llm2clip.data import CaptionSource, StreamingCaptionImageDataset, tar_rows
from llm2clip.data.captioned_images import SampleMaker
from llm2clip.data.opened_table import SourceError
from llm2clip.data.sample_stream import SampleStream
from llm2clip.data.stream_place import Layout, Place
from tests.llm2clip.data.test_streams import PER_TAR, every_caption, write_tars

TARS, BATCH = 9, 2


def opened(source: CaptionSource, rank: int, world: int, **options: Any) -> StreamingCaptionImageDataset:
    options = {"row_counts": [PER_TAR] * TARS, "repeat": True, "shuffle_buffer": 4, **options}
    return StreamingCaptionImageDataset(source, None, rank=rank, world_size=world, **options)


def layout(stream: SampleStream, workers: int) -> Layout:
    return Layout(stream.world_size, max(1, workers), BATCH, buffers=tuple(stream.buffers))


def batches(stream: SampleStream, workers: int, place: Place) -> Iterator[list[str]]:
    stream.place = place.with_layout(layout(stream, workers))
    loader = DataLoader(stream, batch_size=BATCH, num_workers=workers, collate_fn=list)
    return ([sample["caption"] for sample in batch] for batch in loader)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CaptionSource:
    return write_tars(tmp_path_factory.mktemp("tars"), TARS)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_nine_tars_are_read_once_each_by_any_number_of_loaders(
    world: int, workers: int, source: CaptionSource
) -> None:
    found = []
    for rank in range(world):
        stream = opened(source, rank, world, repeat=False)
        for batch in DataLoader(stream, batch_size=BATCH, num_workers=workers, collate_fn=list):
            found += [sample["caption"] for sample in batch]
    assert sorted(found) == every_caption(TARS)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("buffer", [0, 4])
def test_a_resumed_loader_goes_on_where_it_was(workers: int, buffer: int, source: CaptionSource) -> None:
    """In the first epoch, at its end, and in the second one."""
    for rank in range(2):
        stream = opened(source, rank, 2, shuffle_buffer=buffer)
        unbroken = list(itertools.islice(batches(stream, workers, Place()), 16))
        for step in (1, 4, 5, 6, 7, 9, 14):
            place = Place((layout(stream, workers),), step)
            assert list(itertools.islice(batches(stream, workers, place), 16 - step)) == unbroken[step:]


def test_a_resume_reads_no_more_than_a_buffer_again(source: CaptionSource, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    read: list[str] = []
    make, decoded = SampleMaker.__call__, tar_rows._decoded
    monkeypatch.setattr(SampleMaker, "__call__", lambda self, *a: (made.append(a[1]), make(self, *a))[1])
    monkeypatch.setattr(tar_rows, "_decoded", lambda path, key, *a: (read.append(key), decoded(path, key, *a))[1])
    stream = opened(source, 0, 1)
    place = Place((layout(stream, 0),), 10)
    next(batches(stream, 0, place))
    assert len(made) == BATCH
    assert len(read) <= 4 + BATCH


def counted(source: CaptionSource, runs: list[tuple[int, int, int]]) -> Counter[str]:
    """How often each caption is read, by runs that go on one after another: processes, workers, steps."""
    found: Counter[str] = Counter()
    place = Place()
    for world, workers, steps in runs:
        streams = [opened(source, rank, world) for rank in range(world)]
        for stream in streams:
            for batch in itertools.islice(batches(stream, workers, place), steps):
                found.update(batch)
        assert streams[0].place is not None
        place = streams[0].place.at(place.step + steps)
    return found


def test_other_numbers_of_processes_read_what_is_left(source: CaptionSource) -> None:
    """Twenty-six of 27 rows in the first epoch, then more than one epoch."""
    assert set(counted(source, [(2, 0, 3), (1, 2, 4), (3, 0, 1)]).values()) == {1}
    total = counted(source, [(2, 2, 4), (4, 0, 3), (1, 1, 7)])
    assert sum(total.values()) == 54
    assert set(total.values()) == {2}


def test_streams_of_unknown_length_pass_over_rows(source: CaptionSource) -> None:
    stream = opened(source, 0, 1, row_counts=None)
    unbroken = list(itertools.islice(batches(stream, 1, Place()), 20))
    resumed = batches(stream, 1, Place((layout(stream, 1),), 17))
    assert list(itertools.islice(resumed, 3)) == unbroken[17:]
    stream.place = Place((Layout(2, 1, BATCH),), 3).with_layout(layout(stream, 0))
    with pytest.raises(SourceError, match="cannot be read by another number of processes or workers"):
        next(iter(stream))


def test_fewer_rows_than_readers_are_an_error(source: CaptionSource) -> None:
    with pytest.raises(SourceError, match="has 27 rows, fewer than 32 readers"):
        opened(source, 0, 8).require_files(4)


def test_shards_that_lack_rows_are_named(tmp_path: Path) -> None:
    stream = opened(write_tars(tmp_path, TARS), 0, 1, row_counts=[PER_TAR] * (TARS - 1) + [PER_TAR + 1])
    with pytest.raises(SourceError, match=r"00008\.tar has no row 3: it has fewer rows than were counted"):
        list(itertools.islice(stream, TARS * PER_TAR + 1))
