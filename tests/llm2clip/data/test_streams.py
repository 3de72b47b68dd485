"""The readers of a stream share its rows: the same order for all numbers of them, every row once an epoch."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
from torch.utils.data import DataLoader

from llm2clip.data import CaptionImageDataset, CaptionSource, StreamingCaptionImageDataset
from llm2clip.data import tars as tar_reader
from llm2clip.data.formats import SourceError
from llm2clip.data.shards import ShardedSource
from llm2clip.data.stream_order import Lanes
from llm2clip.trainers.stage2_data import count_stream
from tests.builders.tables import write_table
from tests.llm2clip.data.streams import (
    BATCH,
    PER_TAR,
    TARS,
    batches,
    caption,
    every_caption,
    opened,
    steps_of,
    write_tars,
)
from tests.tars import write_tar


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CaptionSource:
    return write_tars(tmp_path_factory.mktemp("tars"), TARS)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("tars", "rows", "world", "workers", "size"),
    [
        *((9, 27, world, workers, 8 // world) for world, workers in ((1, 2), (2, 0), (4, 2), (8, 0), (8, 2))),
        *(
            (7, 150, 1, 4, 10),
            (3, 50, 2, 3, 7),
            (1, 40, 4, 2, 3),
            (5, 9, 2, 2, 8),
            (2, 23, 2, 3, 5),
            (3, 400, 1, 1, 29),
        ),
    ],
)
def test_all_numbers_of_readers_have_one_order_with_every_row_once_in_an_epoch(
    tars: int, rows: int, world: int, workers: int, size: int, tmp_path: Path
) -> None:
    """Three epochs, also where the share of a reader is no multiple of the batch."""
    counts = [rows // tars + (shard < rows % tars) for shard in range(tars)]
    source, lanes = write_tars(tmp_path, tars, counts), Lanes.choose(size * world, 4)
    alone = steps_of([opened(source, row_counts=counts)], 0, lanes, size=size * world)
    together = [opened(source, rank, world, row_counts=counts) for rank in range(world)]
    expected = list(itertools.islice(alone, -(-3 * rows // (size * world))))
    assert list(itertools.islice(steps_of(together, workers, lanes, size=size), len(expected))) == expected
    read = list(itertools.chain(*expected))
    epochs = [read[epoch * rows : (epoch + 1) * rows] for epoch in range(3)]
    assert {len(set(epoch)) for epoch in epochs} == {rows}
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("world", "workers"), [(2, 2), (8, 0)])
def test_one_pass_ends_with_the_last_row(world: int, workers: int, source: CaptionSource) -> None:
    found = []
    for rank in range(world):
        stream = opened(source, rank, world, repeat=False)
        for batch in DataLoader(stream, batch_size=BATCH, num_workers=workers, collate_fn=list):
            found += map(caption, batch)
    assert sorted(found) == every_caption(TARS)


@pytest.mark.parametrize(("workers", "block"), [(0, 4), (1, 0), (2, 4)])
def test_a_resumed_stream_goes_on_where_it_was(workers: int, block: int, source: CaptionSource) -> None:
    """In the first epoch, at its end, and in the second one; with other numbers of processes and workers too."""
    lanes = Lanes.choose(2 * BATCH, block)
    streams = [opened(source, rank, 2, shuffle_block=block) for rank in range(2)]
    unbroken = list(itertools.islice(steps_of(streams, workers, lanes), 16))
    for step in (1, 6, 7, 14):
        start = step * 2 * BATCH
        assert list(itertools.islice(steps_of(streams, workers, lanes, start), 16 - step)) == unbroken[step:]
        alone = steps_of([opened(source, shuffle_block=block)], 2 - workers, lanes, start, 2 * BATCH)
        assert list(itertools.islice(alone, 16 - step)) == unbroken[step:]


def test_a_resume_reads_no_more_than_a_block_of_each_lane(
    source: CaptionSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    decoded = tar_reader._decoded
    monkeypatch.setattr(tar_reader, "_decoded", lambda path, key, *a: (read.append(key), decoded(path, key, *a))[1])
    next(batches(opened(source, shuffle_block=3), 0, Lanes(1, 4, BATCH), 10))  # lanes of 6 or 7 rows
    assert 2 <= len(read) <= 2 * 3


def test_counted_first_rows_are_a_stream_of_their_own(source: CaptionSource) -> None:
    first = replace(source, max_samples=7)
    counts = count_stream(ShardedSource(first), 0, 1)
    assert counts == [3, 3, 1, 0, 0, 0, 0, 0, 0]
    streams = [opened(first, rank, 2, row_counts=counts) for rank in range(2)]
    read = list(itertools.chain(*itertools.islice(steps_of(streams, 2, Lanes.choose(2), size=1), 7)))
    assert sorted(read[:7]) == sorted(read[7:]) == every_caption(TARS)[:7]


def test_files_are_read_in_order_without_a_shuffle(source: CaptionSource) -> None:
    stream = opened(source, repeat=False, shuffle_block=0)
    for epoch in range(2):
        stream.set_epoch(epoch)
        assert list(map(caption, stream)) == every_caption(TARS)


def test_batches_have_rows_of_different_files(tmp_path: Path) -> None:
    counts = [40] * 20
    stream = opened(write_tars(tmp_path, 20, counts), row_counts=counts, shuffle_block=16)
    for batch in itertools.islice(batches(stream, 0, Lanes.choose(32, 16), size=32), 20):
        assert len({text.split()[1] for text in batch}) >= 10


def test_shards_that_lack_rows_are_named(tmp_path: Path) -> None:
    stream = opened(write_tars(tmp_path, TARS), row_counts=[PER_TAR] * (TARS - 1) + [PER_TAR + 1])
    with pytest.raises(SourceError, match=r"00008\.tar has no row 3: it has fewer rows than were counted"):
        list(itertools.islice(stream, TARS * PER_TAR + 1))


def test_a_connection_that_ends_while_other_files_are_read_is_made_again(
    source: CaptionSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> list[list[str]]:
        return list(itertools.islice(batches(opened(source, shuffle_block=1), 0, Lanes(1, 4, BATCH)), 12))

    expected, read, opens = rows(), tar_reader.tar_rows, Counter[str]()

    def interrupted(path: str, columns: Any, rows: Any) -> Iterator[Any]:
        opens[path] += 1
        for number, row in enumerate(read(path, columns, rows)):
            if number == 1 and opens[path] == 1:
                raise RuntimeError("Response payload is not completed")  # what a client for HTTP may raise
            yield row

    monkeypatch.setattr("llm2clip.data.shards.tar_rows", interrupted)
    with pytest.raises(SourceError, match=r"\.tar cannot be read: RuntimeError: Response payload is not completed"):
        rows()
    opens.clear()
    monkeypatch.setattr(ShardedSource, "is_remote", lambda self, file: True)
    assert rows() == expected
    assert max(opens.values()) > 1


def test_local_tars_are_counted_once_on_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In later runs nothing of them is read, until one changes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = ShardedSource(write_tars(tmp_path / "tars", 2))
    assert list(files.counts()) == [PER_TAR] * 2
    read: list[str] = []
    grouped = tar_reader._grouped
    monkeypatch.setattr(tar_reader, "_grouped", lambda path, *a, **o: (read.append(path), grouped(path, *a, **o))[1])
    tar_reader._row_offsets.cache_clear()  # as a new process
    assert list(files.counts()) == [PER_TAR] * 2
    assert not read
    write_tar(tmp_path / "tars" / "00001.tar", [(f"{row}.txt", b"new") for row in range(5)])
    assert list(files.counts()) == [PER_TAR, 5]


def test_files_are_counted_side_by_side(source: CaptionSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remote ones take a while each."""
    all_at_once = threading.Barrier(TARS, timeout=30)
    monkeypatch.setattr(ShardedSource, "_count", lambda self, file: (all_at_once.wait(), PER_TAR + file)[1])
    assert list(ShardedSource(source).counts()) == [PER_TAR + file for file in range(TARS)]


def test_first_tars_without_rows_are_no_error(tmp_path: Path) -> None:
    source = write_tars(tmp_path / "tars", 4, [0, 0, 2, 0])
    for streaming in (True, False):
        dataset: Any = (
            StreamingCaptionImageDataset(source, False)
            if streaming
            else CaptionImageDataset(replace(source, streaming=False), 0, False)
        )
        assert sorted(map(caption, dataset)) == ["caption 2 0", "caption 2 1"]
    write_tars(tmp_path / "tars", 4, [0] * 4)
    with pytest.raises(SourceError, match="no tar of the data has a row"):
        StreamingCaptionImageDataset(source, False)


@pytest.mark.parametrize(("world", "epoch", "block"), [(1, 0, 0), (2, 0, 6), (4, 2, 6)])
def test_keys_do_not_depend_on_order_epoch_and_number_of_readers(
    world: int, epoch: int, block: int, tmp_path: Path
) -> None:
    source, keys = write_tars(tmp_path, 4), dict[str, str]()
    for rank in range(world):
        stream = opened(source, rank, world, row_counts=[PER_TAR] * 4, repeat=False, shuffle_block=block)
        stream.files.columns = stream.files.columns._replace(key=None)  # every tar has keys
        stream.set_epoch(epoch)
        keys |= {caption(row): row["key"] for row in stream}
    assert keys == {f"caption {shard} {row}": f"{shard}-{row}" for shard in range(4) for row in range(PER_TAR)}


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "json", "parquet", "remote"])
@pytest.mark.parametrize("limit", [None, 4])
def test_rows_are_counted_in_files_of_every_kind(kind: str, limit: int | None, tmp_path: Path) -> None:
    rows, columns = [2, 3, 1], ["caption"]
    for number, count in enumerate(rows):
        texts = [f"{number} {row}" for row in range(count)]
        if kind in ("tar", "tar.gz", "remote"):
            files = [(f"{row}.txt", text.encode()) for row, text in enumerate(texts)]
            ending = "tar" if kind == "remote" else kind
            write_tar(tmp_path / f"{number}.{ending}", files, "w:gz" if kind == "tar.gz" else "w")
            columns = ["txt"]
        else:
            write_table(tmp_path / f"{number}.{kind}", {"caption": texts})
    path = str(tmp_path / f"*.{kind}")
    if kind == "remote":
        fsspec.filesystem("memory").put(str(tmp_path), "/counted", recursive=True)
        path = "memory://counted/*.tar"
    source = CaptionSource(path, caption_columns=columns, streaming=True, max_samples=limit)
    stream = StreamingCaptionImageDataset(source, False, training=False)
    expected = rows if limit is None else [2, 2, 0]
    assert stream.row_counts == expected
    assert len({*map(caption, stream)}) == sum(expected) == (limit or 6)


def test_the_log_says_once_and_beforehand_that_remote_files_are_read_to_be_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    message, said_before = "2 remote files, memory:///announced/00000.tar and so on: they are read whole", []

    def counted(path: str) -> int:
        assert "://" in path, "local tars are counted by their headers"
        said_before.append(message in caplog.text)
        return PER_TAR

    monkeypatch.setattr("llm2clip.data.shards.count_tar_rows", counted)
    local = write_tars(tmp_path / "tars", 2)
    fsspec.filesystem("memory").put(str(tmp_path / "tars"), "/announced", recursive=True)
    remote = replace(local, path="memory://announced/*.tar")
    with caplog.at_level("INFO", "llm2clip"):
        assert opened(local, row_counts=None).row_counts == [PER_TAR] * 2
        assert not caplog.text
        for _ in range(2):
            assert opened(remote, row_counts=None).row_counts == [PER_TAR] * 2
    assert said_before == [True] * 2, "the counts of a machine are kept"
    assert caplog.text.count("sidecars, which llm2clip embed writes") == 1
