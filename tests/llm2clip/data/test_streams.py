"""The readers of a stream share its files: every row once per epoch, with a key that no order changes."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from torch.utils.data import DataLoader

from llm2clip import Stage2Config, Stage2Trainer
from llm2clip.data import CaptionSource, StreamingCaptionImageDataset, load_source
from llm2clip.data.opened_table import SourceError
from llm2clip.data.shard_rows import ShardRows
from llm2clip.data.shards import ShardedSource
from llm2clip.data.stream_plan import Part, RowPlan, share_of_rows
from llm2clip.data.streams import StreamReader, share_of_files, shuffled
from llm2clip.utils.processes import leave_process_group, process_state
from tests.modeling_llm2clip import tiny
from tests.processes import run_ranks
from tests.tars import write_tar

PER_TAR = 3


def write_tars(folder: Path, count: int) -> CaptionSource:
    for shard in range(count):
        files = [(f"s{shard}r{row}.txt", f"caption {shard} {row}".encode()) for row in range(PER_TAR)]
        write_tar(folder / f"{shard:05d}.tar", files)
    return CaptionSource(str(folder), caption_columns=["txt"], streaming=True)


def every_caption(count: int) -> list[str]:
    return sorted(f"caption {shard} {row}" for shard in range(count) for row in range(PER_TAR))


def captions_of(dataset: StreamingCaptionImageDataset, num_workers: int = 0) -> Iterator[str]:
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
    return (sample["caption"] for sample in loader)


@pytest.mark.parametrize(("files", "readers"), [(9, 8), (8, 8), (23, 8), (5, 2)])
def test_every_file_has_one_reader_in_every_epoch(files: int, readers: int) -> None:
    read: Counter[int] = Counter()
    for epoch in range(readers):
        shares = [share_of_files(files, readers, reader, epoch) for reader in range(readers)]
        assert sorted(itertools.chain(*shares)) == list(range(files))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        read.update({reader: len(share) for reader, share in enumerate(shares)})
    assert set(read.values()) == {files}, "in the long run, all readers read equally much"


def test_nine_tars_on_eight_processes_are_read_once_each(tmp_path: Path) -> None:
    source = write_tars(tmp_path, 9)
    streams = [
        StreamingCaptionImageDataset(source, None, rank=rank, world_size=8, shuffle_buffer=5) for rank in range(8)
    ]
    opened: Counter[str] = Counter()

    def counted(self: WebDataset, tar_paths: list[str], tar_iterators: list[object]) -> Iterator[object]:
        opened.update(os.path.basename(str(path)) for path in tar_paths)
        return WebDataset._generate_examples(self, tar_paths, tar_iterators)

    for stream in streams:
        base = stream.table._ex_iterable
        while hasattr(base, "ex_iterable"):
            base = base.ex_iterable
        base.generate_examples_fn = counted.__get__(base.generate_examples_fn.__self__)
    found = [list(captions_of(stream)) for stream in streams]
    assert sorted(itertools.chain(*found)) == every_caption(9)
    assert sorted(map(len, found)) == [PER_TAR] * 7 + [2 * PER_TAR]
    assert opened == {f"{shard:05d}.tar": 1 for shard in range(9)}


@pytest.mark.parametrize(("tars", "world", "workers"), [(5, 2, 2), (7, 3, 2), (4, 1, 3)])
def test_workers_of_all_ranks_read_every_row_once(tars: int, world: int, workers: int, tmp_path: Path) -> None:
    source = write_tars(tmp_path, tars)
    found: list[str] = []
    for rank in range(world):
        stream = StreamingCaptionImageDataset(source, None, rank=rank, world_size=world, shuffle_buffer=4)
        stream.set_epoch(1)
        found += captions_of(stream, workers)
    assert sorted(found) == every_caption(tars)


def test_keys_do_not_depend_on_order_epoch_and_number_of_readers(tmp_path: Path) -> None:
    source = write_tars(tmp_path, 4)
    expected = {f"caption {shard} {row}": f"{shard}-{row}" for shard in range(4) for row in range(PER_TAR)}
    for world, epoch, buffer in ((1, 0, 0), (1, 1, 6), (2, 0, 6), (4, 2, 6)):
        keys: dict[str, str] = {}
        for rank in range(world):
            stream = StreamingCaptionImageDataset(source, None, rank=rank, world_size=world, shuffle_buffer=buffer)
            stream.columns = stream.columns._replace(key=None)  # every tar has keys
            stream.set_epoch(epoch)
            keys |= {sample["caption"]: sample["key"] for sample in stream}  # type: ignore[index, call-overload]
        assert keys == expected


def test_first_rows_are_shared_too(tmp_path: Path) -> None:
    source = write_tars(tmp_path, 3)
    source.max_samples = 7
    found = []
    for rank in range(2):
        found += captions_of(StreamingCaptionImageDataset(source, None, rank=rank, world_size=2), 2)
    assert sorted(found) == every_caption(3)[:7]


def test_fewer_tars_than_readers_are_an_error_before_training(tmp_path: Path) -> None:
    stream = StreamingCaptionImageDataset(write_tars(tmp_path, 3), None, rank=0, world_size=2)
    message = r"has 3 files, which is fewer than 4 readers \(2 processes with 2 DataLoader workers each\)\. Split the"
    with pytest.raises(SourceError, match=message):
        stream.require_files(2)
    args = Stage2Config(output_dir=str(tmp_path / "out"), max_steps=1, dataloader_num_workers=2, use_cpu=True)
    trainer = Stage2Trainer(model=tiny.joint_model(), args=args, train_dataset=stream)
    with pytest.raises(SourceError, match=message):
        trainer.train()
    three = StreamingCaptionImageDataset(stream.source, None, rank=0, world_size=4)
    with pytest.raises(SourceError, match=r"3 files, which is fewer than 4 readers \(4 processes\)"):
        next(iter(three))


def test_fewer_first_rows_than_readers_are_an_error_on_every_rank(tmp_path: Path) -> None:
    source = write_tars(tmp_path, 3)
    source.max_samples = 3
    for rank in range(2):
        stream = StreamingCaptionImageDataset(source, None, rank=rank, world_size=2)
        with pytest.raises(SourceError, match="has 3 rows, fewer than 4 readers"):
            stream.require_files(2)


def test_a_reader_without_rows_is_an_error_where_a_stream_is_repeated(tmp_path: Path) -> None:
    source = write_tars(tmp_path, 1)
    source.max_samples = 100  # more than there are
    ranks = [
        StreamingCaptionImageDataset(source, None, rank=rank, world_size=4, repeat=True, seed=1) for rank in range(4)
    ]
    assert [next(iter(stream))["caption"] for stream in ranks[:3]] == every_caption(1)
    with pytest.raises(SourceError, match="reader 4 of 4 finds no row in the stream"):
        next(iter(ranks[3]))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_equal_shares_of_rows_are_complete_in_every_epoch(world: int, workers: int, tmp_path: Path) -> None:
    """Nine files do not divide by any of these numbers of readers."""
    source = write_tars(tmp_path, 9)
    shards = ShardRows(
        load_source(source, with_images=False), ["txt"], [shard.path for shard in ShardedSource(source).shards]
    )
    reader, plan = StreamReader(shards, False, [PER_TAR] * 9), RowPlan([PER_TAR] * 9, 0)
    readers = world * workers
    for epoch in range(2):
        shares = [list(reader.planned(plan.order(epoch, readers, number, 4))) for number in range(readers)]
        read = [(row.file, row.number) for share in shares for row in share]
        assert sorted(read) == [(file, number) for file in range(9) for number in range(PER_TAR)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_of_rows_begin_and_end_within_files() -> None:
    parts = [Part(file, range(rows)) for file, rows in ((3, 8), (1, 0), (0, 5), (2, 3))]
    assert share_of_rows(parts, 1, 0) == [(3, range(8)), (0, range(5)), (2, range(3))]
    assert [share_of_rows(parts, 3, reader) for reader in range(3)] == [
        [(3, range(5))],
        [(3, range(5, 8)), (0, range(2))],
        [(0, range(2, 5)), (2, range(3))],
    ]


def test_a_buffer_shuffles_without_loss() -> None:
    assert list(shuffled(range(20), 0, 1)) == list(range(20))
    order = list(shuffled(range(200), 50, 1))
    assert sorted(order) == list(range(200))
    assert order == list(shuffled(range(200), 50, 1)) != list(shuffled(range(200), 50, 2))
    assert sum(abs(place - item) for place, item in enumerate(order)) > 200 * 10


def run_in_process(folder: Path) -> None:
    state = process_state()
    source = CaptionSource(str(folder / "tars"), caption_columns=["txt"], streaming=True)
    dataset = StreamingCaptionImageDataset(source, None, rank=state.process_index, world_size=state.num_processes)
    args = Stage2Config(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=1,
        dataloader_num_workers=2,
        use_cpu=True,
        max_steps=1,
    )
    trainer = Stage2Trainer(model=tiny.joint_model(), args=args, data_collator=list, train_dataset=dataset)
    found = [sample["caption"] for batch in trainer.get_train_dataloader() for sample in batch]
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes_read_every_row_once(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", 5)
    run_ranks(["-m", "tests.llm2clip.data.test_streams", str(tmp_path)], 2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert sorted(found[0] + found[1]) == every_caption(5)
    assert {len(found[0]), len(found[1])} == {2 * PER_TAR, 3 * PER_TAR}


if __name__ == "__main__":
    run_in_process(Path(sys.argv[1]))
    leave_process_group()
